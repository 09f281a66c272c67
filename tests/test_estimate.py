"""What a recipe takes, said before it is run: beside hand counts and measured peaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig

from rlreason.cli import app
from rlreason.policy.load import PolicyError
from rlreason.policy.weightless import LiveBytes, bytes_of, config_of, weightless
from rlreason.runs import estimate as estimates
from rlreason.runs.estimate import (
    Machine,
    Models,
    Work,
    estimate,
    remedy,
)
from rlreason.runs.profiles import load_recipe

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
WORK = Work(solved=16, asked=8, judged=4, prompt=64, response=64)
CPU = Machine(gpus=0, memory=8e9)
QUESTIONS, K = 8, 16
PPO = {"micro_tokens": 512, "rollouts": 32, "n": 1, "epochs": 1, "batch_size": 16}
PPO |= {"lora": None}
PPO |= {"kl": {"coef": 0.1}, "credit": {"kind": "gae", "value": {"kind": "head"}}}


@pytest.fixture
def folder(tmp_path) -> str:
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "shape")  # config.json alone
    return str(tmp_path / "shape")


def recipe_of(folder: str, **changes):
    fields = {"sft.batch_size": 16, "sft.micro_tokens": 1024, "max_new_tokens": 64}
    fields |= {path.replace("__", "."): value for path, value in changes.items()}
    return load_recipe("tiny", {"policy": folder, "sizes": [], **fields})


# --- Sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their model cards' files count them
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_models_of_the_profiles_are_known_without_a_network(name, parameters):
    model = weightless(config_of(name), torch.bfloat16).model
    assert sum(w.numel() for w in model.parameters()) == parameters
    assert bytes_of(model.parameters()) == 2 * parameters


@pytest.mark.parametrize("name", ["smol", "paper"])
def test_the_papers_tasks_are_known_without_their_files(name, monkeypatch):
    """The command asked the hub for them, and failed without a network."""
    recipe, data = load_recipe(name), os.environ.get("RLREASON_DATA")
    monkeypatch.setenv("RLREASON_DATA", "nowhere")
    known = Work.of(recipe)
    if data:  # as counted where they are
        monkeypatch.setenv("RLREASON_DATA", data)
        monkeypatch.setattr(estimates, "KNOWN", {})
        assert Work.of(recipe) == known


def test_a_config_alone_is_enough_and_without_one_it_is_said_what_to_do(folder):
    assert config_of(folder).hidden_size == 256
    with pytest.raises(PolicyError, match=r"not at hand.*config\.json into a folder"):
        config_of("nobody/has-this-model")


def test_keys_and_values_of_a_token_of_7b():
    recipe = load_recipe("paper")
    models = Models(recipe, Machine(1, 80e9), WORK)
    # 2 of them, 32 layers of 32 heads of 128 numbers of two bytes
    assert models.checked.token_bytes == 2 * 32 * 32 * 128 * 2 == 524_288


# --- Counting ------------------------------------------------------------------------


def test_living_bytes_are_those_of_the_tensors_that_live():
    with LiveBytes() as live:
        first = torch.empty(1000, device="meta")
        second = first + 1
        assert first[:10].shape == (10,)  # a view has no memory of its own
        assert live.now == 8000
        del second
        assert live.now == 4000
    assert live.peak == 8000


def test_attention_keeps_no_matrix_of_scores(folder):
    def peak(rows: int, length: int, attention: str | None = None) -> int:
        model = weightless(config_of(folder), torch.float32).model
        if attention:
            model.set_attn_implementation(attention)
        ids = torch.ones((rows, length), dtype=torch.int64, device="meta")
        with LiveBytes() as live:
            model(input_ids=ids, use_cache=False)
        return live.peak

    assert peak(1, 512) == pytest.approx(peak(8, 64), rel=0.01)
    # Wrong: what PyTorch chooses where tensors have no memory
    assert peak(1, 512, "sdpa") > 1.2 * peak(8, 64, "sdpa")


def test_a_pass_over_one_prompt_costs_much_less_than_the_weights(folder):
    models = Models(recipe_of(folder), Machine(1, 80e9), WORK)
    (cost,) = models.by_depth(partial(estimates.prefill_cost, width=64, rows=1))
    assert 0 < cost < 0.2 * models.weights


def test_what_grows_by_the_layer_is_measured_at_two_depths(folder):
    models = Models(recipe_of(folder), CPU, WORK)
    settings = models.recipe.sft
    shallow = models.fine_tuning(settings)
    models.by_depth = lambda measure: list(
        measure(weightless(models.config, models.dtype))
    )
    assert shallow == pytest.approx(models.fine_tuning(models.recipe.sft), rel=1e-6)


def test_masters_and_moments_are_shared_and_gradients_are_not(folder):
    recipe = recipe_of(folder)

    def update(gpus: int) -> int:
        # As many examples a device, whatever the number of devices
        settings = recipe.sft.model_copy(update={"batch_size": 16 * gpus})
        return Models(recipe, Machine(gpus, 80e9), WORK).fine_tuning(settings)

    parameters = Models(recipe, Machine(1, 80e9), WORK).parameters
    saved = update(1) - update(4)
    assert saved == pytest.approx(12 * parameters * 3 / 4, rel=0.01)
    wrong = (12 + 2) * parameters * 3 / 4  # gradients shared too
    assert abs(saved - wrong) > 0.1 * wrong


def test_adapters_need_no_moments_of_the_weights_under_them(folder):
    few = {"sft__batch_size": 2, "sft__micro_tokens": 128}  # activations are not it
    recipe = recipe_of(folder, **few)
    models = Models(recipe, Machine(1, 80e9), WORK)
    adapted = recipe_of(folder, **few, sft__lora={"rank": 4, "alpha": 4.0}).sft
    whole = models.fine_tuning(recipe.sft)
    # Neither a gradient, nor a master and moments
    saved = whole - models.fine_tuning(adapted)
    assert saved == pytest.approx((2 + 12) * models.parameters, rel=0.2)


# --- Measured ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    """Peaks of a process of its own, less what it had before the model was there."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # As it does with a large model's tensors, glibc gives back what is freed
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peak_of_sampling_is_within_a_fifth(folder, measured):
    models = Models(recipe_of(folder), CPU, WORK)
    expected, rows = models.sampling(models.weights, QUESTIONS, K)
    assert rows == QUESTIONS * K
    assert expected == pytest.approx(measured["sampling"], rel=0.2)
    assert models.weights < 0.8 * measured["sampling"]  # the weights alone are not it


def test_peak_of_an_update_is_within_a_fifth(folder, measured):
    models = Models(recipe_of(folder), CPU, WORK)
    expected = models.fine_tuning(models.recipe.sft)
    assert expected == pytest.approx(measured["update"], rel=0.2)
    wrong = 4 * models.weights  # weights, gradient, moments, and no activations
    assert wrong != pytest.approx(measured["update"], rel=0.2)


def test_peak_of_ppo_is_within_a_fifth(folder, measured):
    recipe = recipe_of(folder, **{f"ppo__{name}": value for name, value in PPO.items()})
    models = Models(recipe, CPU, WORK)
    started = models.weights  # which waits
    _, _, update = models.ppo()
    assert started + update == pytest.approx(measured["ppo"], rel=0.2)
    # Wrong: a reference that is forgotten, and the optimiser's moments
    assert update - 2 * models.weights != pytest.approx(measured["ppo"], rel=0.2)


def test_on_a_gpu_who_waits_is_not_there_and_who_rewards_is(folder):
    def need(gpus: int, **changes):
        recipe = recipe_of(folder, ppo__micro_tokens=1024, **changes)
        return estimate(recipe, Machine(gpus, 80e9), WORK, ["ppo"])["ppo"]

    one = Models(recipe_of(folder), Machine(1, 80e9), WORK).weights
    started, base = need(1), need(1, start="base")
    assert started.load == 2 * one  # base and start, before they are set aside
    assert started.update == base.update
    paid = need(1, reward__kind="dense-orm")
    assert paid.update == started.update + one
    # On a CPU there is no other place to wait
    assert need(0).update > need(0, start="base").update


def _measure() -> None:
    """What the process above does: prints the peaks of sampling, an update, and PPO."""
    import gc

    from tiny_models import PROBLEMS, tiny_policy, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from rlreason.algorithms.batching import Example
    from rlreason.algorithms.finetune import FinetuneSettings, finetune
    from rlreason.algorithms.ppo import PpoSettings, ppo
    from rlreason.policy.load import make_policy
    from rlreason.policy.sampler import sample
    from rlreason.tasks.problem import Problem

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])

    def forget_peak() -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    small = tiny_policy()  # what is imported and allocated once is there
    sample(small, PROBLEMS, k=2, max_new_tokens=4, progress=False)
    finetune(small, [Example((1, 2), (3, 4))], FinetuneSettings(epochs=1))
    gc.collect()
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    policy = make_policy(model, tiny_tokenizer(), name="measured")
    # No two begin alike, so that no prompt is shared between questions
    problems = [Problem(f"p/{i}", chr(65 + i) * 57, "", "1") for i in range(32)]
    peaks = {"sampling": 0}
    for _ in range(2):  # a busy system may have taken pages back for a while
        forget_peak()
        sample(policy, problems[:QUESTIONS], k=K, max_new_tokens=64)
        peaks["sampling"] = max(peaks["sampling"], resident("VmHWM") - before)
    forget_peak()
    examples = [Example((i, *(1,) * 63), (5,) * 64) for i in range(16)]
    settings = FinetuneSettings(epochs=2, batch_size=16, micro_tokens=1024)
    finetune(policy, examples, settings)
    peaks["update"] = resident("VmHWM") - before
    forget_peak()
    ppo(policy, problems, PpoSettings(phases=1, max_new_tokens=64, **PPO))
    peaks["ppo"] = resident("VmHWM") - before
    print(json.dumps(peaks))


# --- The plan ------------------------------------------------------------------------


def test_micro_batches_that_are_measured_are_estimated_too(folder):
    measured = estimate(recipe_of(folder, ppo__micro_tokens=None), CPU, WORK, ["ppo"])
    small = estimate(recipe_of(folder, ppo__micro_tokens=1), CPU, WORK, ["ppo"])
    assert measured["ppo"].update > small["ppo"].update


def test_tokens_are_those_of_the_recipe(folder):
    recipe = recipe_of(folder, ppo__epochs=3)
    needs = estimate(recipe, CPU, WORK)
    responses = recipe.ppo.phases * recipe.ppo.rollouts
    assert needs["ppo"].sampled == responses * 64
    assert needs["ppo"].scored == 2 * responses * 128  # policy and reference
    assert needs["ppo"].trained == 3 * responses * 128
    assert needs["sft"].trained == 16 * 128 * recipe.sft.epochs
    assert needs["evaluation"].sampled == 4 * 97 * 64
    # One GPU: 64 tokens a response at 64 a second, and each token learned or read
    hours = replace(needs["ppo"], scored=0, trained=0).hours(CPU, (64.0, 1.0))
    assert hours * 3600 == pytest.approx(responses)


def test_what_does_not_fit_fits_with_what_is_said(folder):
    wide = replace(WORK, prompt=128, response=128)
    recipe = recipe_of(folder, sft__micro_tokens=4096)
    full = estimate(recipe, Machine(1, 80e9), wide, ["sft"])["sft"].peak
    machine = Machine(1, 0.8 * full)
    changes, gpus = remedy("sft", recipe, machine, wide)
    assert set(changes) == {"sft.micro_tokens"}
    assert gpus == 1
    then = estimate(recipe.changed(changes), machine, wide, ["sft"])
    assert then["sft"].peak <= machine.memory
    assert remedy("evaluation", recipe, Machine(0, 1e6), wide) is None


@pytest.mark.parametrize("memory", ["1e-3", "1e-2"])
def test_where_no_example_fits_the_row_says_no_and_the_remedy_follows(folder, memory):
    arguments = ["plan", "tiny", "--gpus", "1", "--memory", memory]
    for path in ("policy", "sft.micro_tokens", "orm.micro_tokens", "ppo.micro_tokens"):
        arguments += ["--set", path, folder if path == "policy" else "null"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert re.search(r"sft .* NO", said)
    assert re.search("sft (fits with --set|does not fit, whatever is set)", said)


def test_the_command_says_it():
    arguments = ["plan", "tiny", "--gpus", "0", "--memory", "8", "--rates", "1000", "9"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "nano: 931,840 parameters in float32" in said
    assert re.search(r"ppo +\S+ +\S+ +\S+ +\S+ +256 +yes", said)
    assert "hours at 1,000 tokens a second sampled and 9 trained" in said


if __name__ == "__main__":
    _measure()

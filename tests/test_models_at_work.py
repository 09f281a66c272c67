"""The profiles ``smol`` and ``paper`` as they would run, on models of two layers.

Data in the formats and sizes of the releases, random weights and no network. Of the
models' few words one states the answer, so that what they say at random is right now
and then, and every branch has something to do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import side_by_side
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlreason.execution import recording
from rlreason.experiments.rows import read_rows
from rlreason.runs import profiles
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.runs.profiles import load_recipe, profile_path, read_yaml
from rlreason.runs.recipes import Recipe, put
from rlreason.tasks import loaders

REPOSITORY = Path(profiles.__file__).parents[2]


def question(i: int) -> tuple[str, str]:
    """A question of its own, and its solution. All have the answer 1."""
    a, b = i % 2, 1 - i % 2
    text = f"Ann has {a} pens on day {i} and buys {b}. How many has she?"
    return text, f"{a}+{b}=<<{a}+{b}=1>>1\n#### 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of the released layout and sizes."""
    return write_data(tmp_path_factory.mktemp("data"), train=7473, test=1319)


def write_data(folder: Path, *, train: int, test: int) -> Path:
    """A folder of the released layout, with so many problems of GSM8K."""
    (folder / "gsm8k").mkdir(parents=True)
    (folder / "svamp").mkdir()
    for split, numbers in (("train", range(train)), ("test", range(8000, 8000 + test))):
        rows = [
            dict(zip(("question", "answer"), question(i), strict=True)) for i in numbers
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(lines)
    rows = [
        {
            "ID": f"chal-{i}",
            "Body": f"Ann had {i % 2} pens on day {i}, and bought {1 - i % 2}",
            "Question": "How many has she?",
            "Equation": f"( {i % 2}.0 + {1 - i % 2}.0 )",
            "Answer": 1.0,
            "Type": "Addition",
        }
        for i in range(1, 1001)
    ]
    (folder / "svamp" / "SVAMP.json").write_text(json.dumps(rows, indent=4))
    return folder


def random_model(folder: Path) -> None:
    """Two layers of random weights; whatever is no mark or digit is one word."""
    words = ["<unk>", "<s>", "</s>", "#### 1", "\n", "0"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"#### 1|\n|0|[^0\n#]+|#"), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def smaller(name: str, folder: Path, changes: dict) -> Path:
    """A built-in profile with some values changed, as a file of a like name."""
    values = read_yaml(profile_path(name))
    for path, value in changes.items():
        put(values["recipe"], path, value)
    file = folder / f"smaller-{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


# What makes the work small: numbers of problems, tokens, phases and layers. Batches,
# rates, samples a question, adapters and all else are the profile's own
FEW = {
    "seeds": 1,
    "max_new_tokens": 32,
    "task.solutions": 16,
    "task.questions": 16,
    "evaluation.problems": 4,
    "evaluation.sampled_problems": 4,
    "evaluation.validation_problems": 4,
    "ppo.credit.value.layers": 2,
}
ARMS = (
    *("expert-iteration-orm", "rcrl-orm", "ppo-dense-orm"),
    *("expert-iteration-base", "ppo-base", "expert-iteration-shifted"),
)


def test_a_dry_run_of_paper_goes_through_all_that_its_tables_need(
    tmp_path, monkeypatch
):
    few = {"train": 400, "test": 200}  # all of which the base answers 97 times
    monkeypatch.setattr(loaders, "GSM8K_ROWS", few)
    monkeypatch.setenv("RLREASON_DATA", str(write_data(tmp_path / "data", **few)))
    monkeypatch.setenv("RLREASON_QUIET", "1")
    random_model(tmp_path / "7b")
    small = {"policy": str(tmp_path / "7b"), "sizes": [], "ppo.phases": 1}
    small |= {"task.solutions": 4, "task.questions": 4}  # each is asked 400 times
    profile = smaller("paper", tmp_path, {**FEW, **small, "ppo_phases_from_base": 1})
    recipe = load_recipe(profile)
    assert (recipe.expert_iteration.k, recipe.ppo.lora.rank) == (96, 128)
    assert (recipe.ppo.rollouts, recipe.sft.batch_size) == (1024, 128)
    said = []
    for measures, work in (
        (["greedy", "curve"], {"names": ARMS}),
        (["samples"], {"names": ["base"], "seed": 0}),
    ):
        recorder = recording.recorder(str(profile), out=tmp_path, measures=measures)
        recorder.carry_out_here(recorder.work(**work), said.append)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row.arm for row in rows} >= set(ARMS)
    assert not [line for line in said if "failed" in line]
    of = {row.key: row for row in rows}
    rounds = of["expert-iteration-base", "7b", 0, "curve"].values["rows"]
    drawn = [row["rollouts"] for row in rounds if row["kind"] == "round"]
    assert drawn == [4 * (16 + 96 * i) for i in range(5)]
    assert of["base", "7b", 0, "samples"].values["k"] == 96


def test_two_processes_go_through_adapters_and_a_phase_of_paper(
    tmp_path, monkeypatch, data, runs
):
    monkeypatch.setenv("RLREASON_DATA", str(data))
    monkeypatch.setenv("RLREASON_QUIET", "1")
    random_model(tmp_path / "7b")
    small = {"policy": str(tmp_path / "7b"), "ppo.phases": 1, "ppo.rollouts": 256}
    adapters = {"sft.lora": dict(load_recipe("paper").ppo.lora)}
    profile = smaller("paper", tmp_path, {**FEW, **small, **adapters})
    train = ["-m", "rlreason.cli", "train", "ppo", "--profile", str(profile)]
    first, second = side_by_side(train)
    assert (first.split(":")[0], second) == ("phase 1", "")  # one of them tells
    plan = plan_of("ppo", load_recipe(profile))
    together = [folder_of(each).metrics for each in (plan.start, plan)]
    (phase,) = [row for row in together[1] if row["kind"] == "phase"]
    assert phase["rollouts"] == 256
    assert 0 < phase["reward"] < 1
    # One process comes to the same adapters
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "alone"))
    alone = obtain(plan.start).run.metrics
    assert [row["kind"] for row in alone] == [row["kind"] for row in together[0]]
    for one, other in zip(alone, together[0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# One percent of the problems and rollouts of smol
ONE_PERCENT = {
    **FEW,
    "task.solutions": 72,
    "task.questions": 72,
    "ppo.phases": 1,
    "ppo.rollouts": 16,
    "evaluation.problems": 13,
    "evaluation.sampled_problems": 2,
    "evaluation.k": 2,
}


def test_gpu_smol_runs_its_stages_and_its_archive_is_taken_over(
    tmp_path, monkeypatch, data, runs
):
    model = tmp_path / "models" / "SmolLM2-135M-Instruct"
    random_model(model)
    profile = smaller("smol", tmp_path, ONE_PERCENT)
    environment = {
        **os.environ,
        "RLREASON_DATA": str(data),
        "RLREASON_QUIET": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    script = REPOSITORY / "scripts" / "gpu_smol.sh"
    told = subprocess.run(
        ["sh", script, model, "100", profile],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    log = (runs / "smol-results" / "log.txt").read_text()
    assert told.returncode == 0, told.stderr + log
    archive = tmp_path / "results.tgz"
    assert archive.stat().st_size < 16e6
    results = tmp_path / "book" / "results"
    monkeypatch.setenv("RLREASON_DATA", str(data))
    monkeypatch.setenv("RLREASON_MODELS", str(model.parent))
    monkeypatch.setattr("rlreason.experiments.rows.results_folder", lambda _: results)
    recorder = recording.recorder(str(profile))
    said = recorder.take_over(archive)
    rows = read_rows(results / "rows.jsonl")
    assert said.startswith(f"{len(rows)} rows are in ")
    measured = {(row.arm, row.measure, row.task) for row in rows}
    for arm in ("base", "sft", "expert-iteration", "ppo", "rcrl", "ppo-base"):
        assert {(arm, "greedy", "gsm8k"), (arm, "samples", "gsm8k")} <= measured
    for arm in ("base-shifted", "expert-iteration-shifted", "ppo-shifted"):
        assert {(arm, "greedy", "svamp"), (arm, "samples", "svamp")} <= measured
    assert ("orm", "reranking", "gsm8k") in measured
    # The rows of another model are refused
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model)).save_pretrained(model)
    with pytest.raises(recording.RecordError, match=f"{len(rows)} of {len(rows)} rows"):
        recording.recorder(str(profile)).take_over(archive)


def leaves(values: dict, path: str = ""):
    """Paths of all values of nested mappings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def settings_of_the_paper(part, path: str = ""):
    """Paths of all that has a value, and by its own class comes from the paper."""
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, profiles.Settings):
            yield from settings_of_the_paper(value, f"{path}{name}.")
            continue
        source = (field.json_schema_extra or {}).get("source")
        if source == "paper" and value not in (None, [], {}):
            yield f"{path}{name}"


def test_paper_says_every_setting_of_the_paper_and_where_each_comes_from():
    recipe = read_yaml(profile_path("paper"))["recipe"]
    said = set(leaves(recipe))
    asked = set(settings_of_the_paper(load_recipe("paper")))
    assert asked - said == set()
    assert isinstance(load_recipe("paper"), Recipe)
    sources = r"# (verified|second hand|digitised|memory|precursor|ours)\b"
    for line in profile_path("paper").read_text().splitlines():
        opens = line.endswith(":") or line.startswith(("#", "description"))
        if not opens and not line.lstrip().startswith("#"):
            assert re.search(sources, line), line

"""What is handed from one part to the next: weights, shots, judges, masters, places.

Each test holds the neighbour that it could be taken for: SFT in place of the base, one
number a solution in place of one a token, rounded weights in place of exact ones.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from threading import Barrier, Event, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from tiny_models import tiny_policy
from torch import Tensor, nn
from toys import (
    TOY_PROBLEMS,
    UPDATE,
    InterruptedRunError,
    Memory,
    examples_of,
    run_toy,
    same_bits,
    toy_policy,
    toy_profile,
    toy_recipe,
    toy_solutions,
    weights,
)

from rlreason import cli, sample
from rlreason.algorithms import ppo as ppo_module
from rlreason.algorithms import rcrl as rcrl_module
from rlreason.algorithms.finetune import FinetuneSettings, finetune, load_model_tensors
from rlreason.algorithms.optim import (
    MasterAdamW,
    adamw,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.ppo import GaeSettings, PpoSettings, ppo
from rlreason.algorithms.rcrl import BAD, GOOD, RcrlSettings, rcrl
from rlreason.experiments import gains
from rlreason.policy.load import Policy
from rlreason.policy.lora import merge_adapters, trainable_tensors, with_lora
from rlreason.policy.value import ValueSettings
from rlreason.policy.vocabulary import add_tokens
from rlreason.rewards.orm import OutcomeRewardModel, score, score_tokens
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs import folder as run_folder
from rlreason.runs import steps as train
from rlreason.runs.folder import RunFolder, RunFolderError
from rlreason.runs.profiles import load_recipe
from rlreason.runs.recipes import Recipe, RewardSettings
from rlreason.settings import Settings, SettingsError, load_settings
from rlreason.tasks.prompts import format_prompt

TRAIN = dict(train.TRAIN)  # as they are when nothing stands in for anything
NAMES = ("sft", "expert-iteration", "orm")


@lru_cache
def moved(name: str) -> Policy:
    """A policy of the toy's kind with weights of its own. Not to be changed."""
    policy = toy_policy().clone()
    generator = torch.Generator().manual_seed(1 + NAMES.index(name))
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    return policy


@lru_cache
def judge() -> OutcomeRewardModel:
    """Scores that differ from token to token: the likelihood's. Not to be changed."""
    return OutcomeRewardModel(moved("orm"), likelihood=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base, problems and profile of the toy on disk."""
    folder = tmp_path_factory.mktemp("toy")
    toy_profile(folder)
    return folder


class Clock:
    """Time that passes when told so, in place of ``time`` of run folders."""

    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_folder, "time", clock)
    return clock


@pytest.fixture
def starts(monkeypatch, clock) -> list[str]:
    """The runs that others start from: known policies, each an hour of work.

    Returns:
        Their names in the order in which they are asked for.
    """
    made: list[str] = []

    def make(name: str, result: SimpleNamespace, *_: Any, **__: Any) -> Any:
        made.append(name)
        clock.work(3600)
        return result

    for name, function in zip(
        NAMES,
        ("train_sft", "train_expert_iteration", "train_reward_model"),
        strict=True,
    ):
        result = SimpleNamespace(policy=moved(name), orm=judge())
        monkeypatch.setattr(train, function, partial(make, name, result))
    return made


# Where PPO starts


@pytest.fixture
def handed(monkeypatch) -> list[SimpleNamespace]:
    """What ``ppo`` is called with, which then returns its start."""
    calls = []

    def note(start, problems, settings, *, reward, shots, recorder, on_phase):
        calls.append(SimpleNamespace(**locals()))
        return start.clone()

    monkeypatch.setattr(train, "ppo", note)
    return calls


def test_ppo_from_the_base_starts_from_the_base_with_the_shots(
    folder, starts, handed, monkeypatch
):
    recipe = toy_recipe(folder, shots=2, ppo_temperature_from_base=0.2)
    base = weights(recipe.base())
    paths = [train.train_ppo(recipe, from_sft=sft).run.path for sft in (False, True)]
    assert starts == ["sft"]  # for the second one alone
    assert paths[0] != paths[1]
    from_base, from_sft = handed
    assert same_bits(weights(from_base.start), base)
    assert list(from_base.shots) == list(recipe.shot_problems())
    assert len(from_base.shots) == 2
    assert from_base.settings.temperature == 0.2
    # Wrong from the base, and right here: SFT's weights, which need no shots
    assert same_bits(weights(from_sft.start), weights(moved("sft")))
    assert not same_bits(weights(from_sft.start), base)
    assert list(from_sft.shots) == []
    assert from_sft.settings.temperature == recipe.ppo.temperature == 1.0
    # A policy that learns with shots is looked at with shots
    seen = []
    monkeypatch.setattr(
        train, "evaluate_recipe", lambda *_, **given: seen.append(given) or 1 / 0
    )
    for call in handed:
        with pytest.raises(ZeroDivisionError):
            call.on_phase(recipe.validate_every, call.start)
    assert [given["prompted"] for given in seen] == [True, False]


def test_the_temperature_of_the_base_is_that_of_sft_where_none_is_given(folder):
    recipe = toy_recipe(folder)
    temperatures = [
        train.ppo_run(recipe, 0, from_sft=sft).algorithm.temperature
        for sft in (False, True)
    ]
    assert temperatures == [1.0, 1.0]


def test_the_shots_of_ppo_stand_before_every_question(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ppo_module, "sample_prompts", lambda _, prompts, **__: seen.append(prompts)
    )
    settings = PpoSettings(phases=1, rollouts=12, n=2, lora=None, credit=HEAD)
    for shots in (TOY_PROBLEMS[:2], ()):
        with pytest.raises(TypeError):  # nothing was sampled
            ppo(toy_policy(), TOY_PROBLEMS[2:], settings, shots=shots)
    for prompts, shots in zip(seen, (TOY_PROBLEMS[:2], ()), strict=True):
        expected = {
            tuple(toy_policy().encode_prompt(format_prompt(problem, shots)))
            for problem in TOY_PROBLEMS[2:]
        }
        assert {prompt.tokens for prompt in prompts} == expected


def test_the_profile_of_the_paper_is_the_papers_ppo():
    recipe = load_recipe("paper")
    run, from_base = (
        train.ppo_run(recipe, 0, from_sft=sft).algorithm for sft in (True, False)
    )
    values = {"rollouts": 1024, "n": 4, "epochs": 4, "batch_size": 256, "lr": 1e-6}
    values |= {"temperature": 0.7, "clip": 0.2, "max_new_tokens": 256, "keep": None}
    assert {name: getattr(run, name) for name in values} == values
    assert run.lora.rank == 128
    assert (run.kl.coef, run.kl.target) == (0.05, None)
    assert (run.gae.gamma, run.gae.lam) == (1.0, 0.95)
    assert run.gae.value == ValueSettings(kind="branch", layers=4, detach=True)
    # From the base another temperature, and nothing else
    assert from_base.temperature == 0.2
    assert from_base.model_copy(update={"temperature": 0.7}) == run
    assert train.ppo_run(recipe, 0, from_sft=False).shots == 2


# Who samples, who judges, who learns


def test_labels_from_orm_hand_over_a_score_for_every_token(folder, starts, monkeypatch):
    calls = []

    def note(expert, base, problems, settings, *, orm, recorder):
        calls.append(SimpleNamespace(expert=expert, base=base, orm=orm))
        return add_tokens(base, [GOOD, BAD])

    monkeypatch.setattr(train, "rcrl", note)
    command = ["train", "rcrl", "--profile", str(folder / "toy.yaml")]
    for options in (["--set", "rcrl_labels", "orm"], []):
        shown = CliRunner().invoke(cli.app, [*command, *options])
        assert shown.exit_code == 0, shown.output
    assert starts == ["expert-iteration", "orm", "expert-iteration"]
    by_orm, by_rollouts = calls
    assert by_rollouts.orm is None
    rollouts = sample(toy_policy(), TOY_PROBLEMS[:2], k=2, max_new_tokens=24, seed=3)
    scores = by_orm.orm(rollouts)
    assert scores == score_tokens(judge(), rollouts)
    assert [len(each) for each in scores] == [len(r.tokens) for r in rollouts]
    # Wrong: the score of the solution, which every step of it would get
    assert score(judge(), rollouts) == [each[-1] for each in scores]
    assert any(len(set(each)) > 1 for each in scores)
    # The expert samples, the base learns
    base = weights(toy_recipe(folder).base())
    for call in calls:
        assert same_bits(weights(call.expert), weights(moved("expert-iteration")))
        assert same_bits(weights(call.base), base)
    assert not same_bits(base, weights(moved("expert-iteration")))


@pytest.mark.parametrize("samples", ["sft", "expert-iteration"])
def test_orm_samples_says_whose_samples_and_weights_the_judge_gets(
    samples, folder, starts, monkeypatch
):
    judged = []

    def note(policy, problems, settings, recorder, *, judge):
        judged.append(policy)
        return OutcomeRewardModel(policy)

    monkeypatch.setattr(train, "train_orm", note)
    recipe = toy_recipe(folder, orm_samples=samples)
    trained = TRAIN["orm"](recipe)
    assert starts == [samples]
    assert same_bits(weights(judged[0]), weights(moved(samples)))
    # What is loaded is what was trained, and not the base
    expected = OutcomeRewardModel(moved(samples)).tensors()
    assert same_bits(trained.orm.tensors(), expected)
    (other,) = {"sft", "expert-iteration"} - {samples}
    assert not same_bits(expected, OutcomeRewardModel(moved(other)).tensors())
    # The judge without training is that of the same policy
    untrained = train.likelihood_judge(recipe)
    expected = OutcomeRewardModel(moved(samples), likelihood=True).tensors()
    assert same_bits(untrained.tensors(), expected)


def test_rcrl_samples_from_the_expert_and_learns_from_the_base(monkeypatch):
    asked, learners = [], []

    def ask(whole, policy, *args, **options):
        asked.append(policy)
        return whole(policy, *args, **options)

    for name in ("sample", "sample_prompts"):
        whole = getattr(rcrl_module, name)
        monkeypatch.setattr(rcrl_module, name, partial(ask, whole))
    monkeypatch.setattr(
        rcrl_module,
        "fit",
        lambda model, *_, **__: learners.append(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ),
    )
    expert, base = moved("expert-iteration"), toy_policy()
    settings = RcrlSettings(samples=4, k=2, max_new_tokens=24)
    student = rcrl(expert, base, TOY_PROBLEMS, settings)
    assert len(asked) == 2  # solutions, and labels
    assert all(policy is expert for policy in asked)
    untrained = weights(add_tokens(base, [GOOD, BAD]))
    assert same_bits(learners[0], untrained)
    assert same_bits(weights(student), untrained)
    # Wrong: the expert learns on
    rcrl(expert, expert, TOY_PROBLEMS, settings)
    assert not same_bits(learners[1], untrained)


# LoRA


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_add_alpha_over_rank_times_b_a(kind):
    before = weights(tiny_policy(kind))
    policy = with_lora(tiny_policy(kind), rank=4, alpha=10.0, targets="all-linear")
    generator = torch.Generator().manual_seed(0)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, weight in trainable_tensors(policy.model).items():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        place, factor = name.removeprefix("base_model.model.").split(".lora_")
        pairs.setdefault(f"{place}.weight", {})[factor[0]] = weight.clone()
    merged = weights(merge_adapters(policy))
    assert merged.keys() == before.keys()
    assert pairs.keys() == {
        name for name in merged if not merged[name].equal(before[name])
    }
    for name, pair in pairs.items():
        a, b = pair["A"], pair["B"]  # (rank, in), (out, rank)
        assert a.shape[0] == b.shape[1] == 4
        product = b @ a  # (out, in)
        # GPT-2 stores its matrices the other way round
        product = product.T if kind == "gpt2" else product
        delta = merged[name] - before[name]
        assert torch.allclose(delta, 10.0 / 4 * product, atol=1e-4), name
        for wrong in (10.0, 4 / 10.0, 10.0 / 4**0.5, 1.0):
            assert not torch.allclose(delta, wrong * product, atol=1e-4)


def test_ppo_gives_its_alpha_to_the_adapters(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ppo_module, "with_lora", lambda _, **given: seen.append(given) or 1 / 0
    )
    lora = {"rank": 2, "alpha": 6.0, "targets": "all-linear"}
    settings = load_settings(PpoSettings, {"lora": lora})
    with pytest.raises(ZeroDivisionError):
        ppo(toy_policy(), TOY_PROBLEMS, settings)
    assert seen == [{**lora, "seed": 0}]


# Masters of weights in half precision

OPTIONS = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds exactly, as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().float()


def step(optimizer, pairs: list[tuple[nn.Parameter, Tensor]], times: int = 1) -> None:
    """Updates from a constant gradient."""
    for _ in range(times):
        for weight, gradient in pairs:
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(weight.grad is None for weight, _ in pairs)


def test_p33_masters_move_as_float32_weights_do_and_the_model_follows():
    start, beside = random(2000), random(50, seed=1)
    gradients = random(2000, seed=2), random(50, seed=3)

    def trained(dtype: torch.dtype, make) -> tuple[Any, nn.Parameter, nn.Parameter]:
        pair = nn.Parameter(start.clone().to(dtype)), nn.Parameter(beside.clone())
        optimizer = make(list(pair), **OPTIONS)
        places = [weight.data_ptr() for weight in pair]
        step(optimizer, list(zip(pair, gradients, strict=True)), times=100)
        assert [weight.data_ptr() for weight in pair] == places
        return optimizer, *pair

    plain = partial(torch.optim.AdamW, fused=True)
    _, full, full_beside = trained(torch.float32, plain)
    assert 0.9e-4 < (full - start).abs().mean() < 1.1e-4
    optimizer, rounded, same = trained(torch.bfloat16, adamw)
    assert isinstance(optimizer, MasterAdamW)
    assert list(optimizer.masters) == [0]  # what is float32 has none
    assert optimizer.masters[0].dtype == torch.float32
    assert optimizer.masters[0].equal(full)
    assert rounded.dtype == torch.bfloat16
    assert rounded.equal(full.bfloat16())
    assert same.equal(full_beside)
    # Wrong: the update is made to the rounded weights, and rounded away
    _, stuck, _ = trained(torch.bfloat16, plain)
    assert (stuck == start).float().mean() > 0.99
    assert (rounded != start).float().mean() > 2 * (stuck != start).float().mean()
    # Where all weights are float32 there is nothing to keep
    optimizer, *_ = trained(torch.float32, adamw)
    assert type(optimizer) is torch.optim.AdamW


def test_masters_learn_at_the_rate_of_their_group():
    weights_ = [nn.Parameter(random(50).bfloat16()) for _ in range(2)]
    groups = [{"params": [weights_[0]]}, {"params": [weights_[1]], "lr_scale": 10.0}]
    optimizer = adamw(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    set_lr(optimizer, 1e-4)
    step(optimizer, [(weight, torch.ones(50)) for weight in weights_])
    by = [(random(50) - optimizer.masters[i]).mean().item() for i in (0, 1)]
    assert by == pytest.approx([1e-4, 1e-3], rel=1e-2)


@pytest.mark.parametrize("lost", [None, "master", "exp_avg_sq"])
def test_an_optimiser_that_comes_back_goes_on_to_the_bit(lost):
    def fresh(start: list[Tensor]) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
        pair = [nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": [weight]} for weight in pair]
        return pair, adamw(groups, **OPTIONS | {"lr": 1e-4})

    gradients = random(200, seed=2), random(50, seed=3)
    pair, optimizer = fresh([random(200).bfloat16(), random(50, seed=1)])
    step(optimizer, list(zip(pair, gradients, strict=True)), times=5)
    kept = {k: t.clone() for k, t in optimizer_tensors(optimizer, "adamw").items()}
    assert "adamw.0.master" in kept
    assert "adamw.1.master" not in kept
    again, resumed = fresh([weight.detach() for weight in pair])
    if lost:  # the wrong version: a part of the state is not saved
        fresh_state = {"master": resumed.masters[0].clone(), "exp_avg_sq": None}[lost]
        name = f"adamw.0.{lost}"
        kept[name] = torch.zeros(200) if fresh_state is None else fresh_state
    load_optimizer_tensors(resumed, "adamw", kept)
    for weights_, each in ((pair, optimizer), (again, resumed)):
        step(each, list(zip(weights_, gradients, strict=True)), times=5)
    one, other = (optimizer_tensors(each, "adamw") for each in (optimizer, resumed))
    assert same_bits(one, other) is (lost is None)
    assert again[1].equal(pair[1])
    if not lost:
        assert again[0].equal(pair[0])


def coarse(policy: Policy, dtype: torch.dtype = torch.bfloat16) -> Policy:
    """A clone whose weights bfloat16 holds, in that type or another one."""
    clone = policy.clone()
    clone.model.bfloat16().to(dtype)
    return clone


SLOW = FinetuneSettings(
    epochs=40, batch_size=4, lr=1e-4, lr_floor=1e-4, warmup=0.0, micro_tokens=2000
)


def lesson(policy: Policy) -> list:
    """Four examples of one of the two answers."""
    return [
        example
        for problem in TOY_PROBLEMS[:4]
        for example in examples_of(policy, problem, toy_solutions(2)[:1])
    ]


def test_p33_fine_tuning_in_half_precision_learns_as_in_single(monkeypatch):
    def losses(dtype: torch.dtype) -> list[float]:
        recorder = Memory(save_every=10**9)
        policy = coarse(toy_policy(), dtype)
        finetune(policy, lesson(policy), SLOW, recorder)
        assert {weight.dtype for weight in policy.model.parameters()} == {dtype}
        return [row["loss"] for row in recorder.rows]

    single, half = losses(torch.float32), losses(torch.bfloat16)
    gained = single[0] - single[-1]
    assert gained > 0.05
    assert half[0] - half[-1] == pytest.approx(gained, rel=0.1)
    # Wrong: without masters most of it is rounded away
    monkeypatch.setattr("rlreason.algorithms.optim.MasterAdamW", torch.optim.AdamW)
    stuck = losses(torch.bfloat16)
    assert stuck[0] - stuck[-1] < 0.8 * gained


def test_fine_tuning_in_half_precision_goes_on_to_the_bit(monkeypatch):
    settings = SLOW.model_copy(update={"epochs": 6})

    def run(recorder: Memory) -> dict[str, Tensor]:
        policy = coarse(toy_policy())
        return weights(finetune(policy, lesson(policy), settings, recorder))

    def stopped_and_gone_on() -> dict[str, Tensor]:
        recorder = Memory(save_every=2, die_at=5)
        with pytest.raises(InterruptedRunError):
            run(recorder)
        assert recorder.saved[2] == 4
        return run(recorder)

    undisturbed = run(Memory(save_every=2))
    assert same_bits(stopped_and_gone_on(), undisturbed)
    # Wrong: the masters begin again from the rounded weights
    keep = optimizer_tensors
    monkeypatch.setattr(
        "rlreason.algorithms.finetune.optimizer_tensors",
        lambda *given: {k: t for k, t in keep(*given).items() if "master" not in k},
    )
    assert not same_bits(stopped_and_gone_on(), undisturbed)


HEAD = GaeSettings(lam=1.0, value=ValueSettings(kind="head", detach=False))
PPO = PpoSettings(
    phases=1,
    rollouts=12,
    n=2,
    temperature=1.0,
    max_new_tokens=24,
    epochs=1,
    batch_size=12,
    lr=1e-6,
    lr_floor=1e-6,
    weight_decay=0.0,
    max_grad_norm=1e-3,
    lora=None,
    credit=HEAD,
    micro_tokens=2000,
)


def learner_of(dtype: torch.dtype) -> ppo_module._Learner:
    """A learner after one update, by rollouts that are the same for every type."""
    policy = coarse(toy_policy(), dtype)
    learner = ppo_module._Learner(policy, PPO)
    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=2, max_new_tokens=24, seed=1)
    paid = sparse_token_rewards(rollouts, TOY_PROBLEMS)
    experience = learner.credit(learner.pay(learner.score(rollouts), paid))
    learner.learn(experience, 0)
    return learner


def test_ppo_in_half_precision_moves_masters_by_clipped_gradients():
    half, single = learner_of(torch.bfloat16), learner_of(torch.float32)
    start = [w.detach() for w in coarse(toy_policy(), torch.float32).model.parameters()]
    masters = [half.optimizer.masters[i] for i in range(len(start))]
    assert len(half.optimizer.masters) == len(start)  # the new layer of V has none
    model = list(half.policy.model.parameters())
    assert all(w.equal(m.bfloat16()) for w, m in zip(model, masters, strict=True))
    # Those that it clips are the model's own, which hold the gradients
    assert [id(w) for w in half.trained[0]] == [id(w) for w in model]

    def by(ends) -> Tensor:
        moves = [(e.detach() - s).flatten() for e, s in zip(ends, start, strict=True)]
        return torch.cat(moves)

    one, other = by(masters), by(single.policy.model.parameters())
    assert torch.cosine_similarity(one, other, dim=0) > 0.9
    assert one.norm() == pytest.approx(other.norm().item(), rel=0.05)
    # The first moment is a tenth of the clipped gradient, and so small as the limit
    state = half.optimizer.state_dict()["state"]
    moment = torch.cat([state[i]["exp_avg"].flatten() for i in range(len(start))])
    assert moment.norm() == pytest.approx(0.1 * PPO.max_grad_norm, rel=0.02)
    # Wrong: plain AdamW moves nearly none of the rounded weights
    stuck = coarse(toy_policy())
    optimizer = torch.optim.AdamW(stuck.model.parameters(), lr=1e-6, weight_decay=0.0)
    for weight, single_ in zip(
        stuck.model.parameters(), single.policy.model.parameters(), strict=True
    ):
        weight.grad = (single_.detach() - weight.detach().float()).bfloat16()
    optimizer.step()
    unmoved = by([w.detach().float() for w in stuck.model.parameters()]) == 0
    assert unmoved.float().mean() > 0.99


def test_ppo_in_half_precision_goes_on_to_the_bit():
    settings = PPO.model_copy(update={"phases": 3, "lr": 1e-4})

    def run(recorder: Memory) -> dict[str, Tensor]:
        start = coarse(toy_policy())
        return weights(ppo(start, TOY_PROBLEMS, settings, recorder=recorder))

    undisturbed, recorder = Memory(), Memory(die_at=2)
    expected = run(undisturbed)
    with pytest.raises(InterruptedRunError):
        run(recorder)
    assert any("master" in name for name in recorder.saved[0])
    assert same_bits(run(recorder), expected)
    assert recorder.rows == undisturbed.rows
    assert not same_bits(expected, weights(coarse(toy_policy())))


# Weights that do not fit, and rates below the floor


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", None])
def test_a_model_takes_exactly_its_own_tensors_or_none(fault):
    policy = tiny_policy()
    before = weights(policy)
    tensors = {f"model.{name}": tensor + 1 for name, tensor in before.items()}
    tensors["adamw.0.step"] = torch.ones(())  # what is not the model's is passed over
    last = [name for name in tensors if name.startswith("model.")][-1]
    if fault == "missing":
        del tensors[last]
    elif fault == "unknown":
        tensors["model.more"] = torch.ones(1)
    elif fault == "shape":
        tensors[last] = tensors[last][:1]  # would be broadcast
    if fault is None:
        load_model_tensors(policy.model, tensors)
        loaded = weights(policy)
        assert all(loaded[name].equal(before[name] + 1) for name in before)
        return
    named = "model.more" if fault == "unknown" else last
    with pytest.raises(ValueError, match="missing, unknown or of another") as error:
        load_model_tensors(policy.model, tensors)
    assert named in str(error.value)
    assert same_bits(weights(policy), before)


def test_a_rate_below_the_floor_does_not_rise():
    def rates(train_, settings) -> list[float]:
        recorder = Memory(save_every=10**9)
        train_(settings, recorder)
        return [row["lr"] for row in recorder.rows]

    def tune(settings, recorder) -> None:
        policy = toy_policy().clone()
        finetune(policy, lesson(policy), settings, recorder)

    def learn(settings, recorder) -> None:
        ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=recorder)

    below = FinetuneSettings(lr=1e-7, epochs=10, batch_size=4, warmup=0.1)
    assert below.lr_floor > below.lr
    assert rates(tune, below) == [1e-7] * 10
    settings = PPO.model_copy(update={"lr": 1e-7, "phases": 3})
    assert settings.lr_floor > settings.lr
    assert rates(learn, settings) == [1e-7] * 3
    # Above it, it ends near the floor
    above = rates(tune, below.model_copy(update={"lr": 1e-3, "lr_floor": 1e-5}))
    assert above[0] == 1e-3
    assert above == sorted(above, reverse=True)
    assert above[-1] < 1e-4


# Run folders


class Toy(Settings):
    """Settings of a run that does nothing."""

    number: int = 0


def is_free(run: RunFolder) -> bool:
    """Whether nobody holds a run's lock; asks without waiting."""
    lock = FileLock(run.path / "lock")
    with lock.acquire(timeout=0):
        return lock.is_locked


def stop_after_a_checkpoint(root: Path) -> None:
    with suppress(KeyboardInterrupt), RunFolder("toy", Toy(), root=root) as run:
        run.log("update", loss=1.0)
        run.save({"a": torch.ones(2)}, {})
        raise KeyboardInterrupt


def test_a_run_that_cannot_begin_gives_its_lock_back(tmp_path):
    stop_after_a_checkpoint(tmp_path)
    tries = [RunFolder("toy", Toy(), root=tmp_path) for _ in range(2)]
    (tries[0].path / "metrics.jsonl").write_bytes(b"")
    for run in tries:  # all alive: a lock that nobody refers to is free by itself
        with pytest.raises(RunFolderError, match="it was changed by hand"), run:
            pytest.fail("it began")
        assert is_free(run)
    # Of use once more when it is mended
    (tries[0].path / "metrics.jsonl").write_bytes(b'{"kind": "update", "loss": 1.0}\n')
    with tries[0] as run:
        assert run.metrics == [{"kind": "update", "loss": 1.0}]
        with pytest.raises(TimeoutError):
            is_free(run)
    assert run.done


@pytest.mark.parametrize("also_within", [False, True])
def test_an_error_at_the_end_gives_the_lock_back(also_within, tmp_path, monkeypatch):
    run = RunFolder("toy", Toy(), root=tmp_path)

    def full(_) -> None:
        raise OSError("no space left")

    def use() -> None:
        with run:
            run.log("update", loss=1.0)
            if also_within:
                raise KeyboardInterrupt

    whole = RunFolder._close_logs
    monkeypatch.setattr(RunFolder, "_close_logs", full)
    with pytest.raises(OSError, match="no space left"):
        use()
    assert is_free(run)
    assert not run.done
    monkeypatch.setattr(RunFolder, "_close_logs", whole)
    run._close_logs()
    with RunFolder("toy", Toy(), root=tmp_path) as again:
        assert again.metrics == []  # there was no checkpoint
    assert again.done


@pytest.mark.parametrize(
    ("save_every", "took", "wait"), [(30, 7, 140), (30, 1, 30), (0, 7, 0)]
)
def test_saving_costs_a_twentieth_of_the_time_at_most(
    save_every, took, wait, tmp_path, clock, monkeypatch
):
    write = run_folder.save_file
    monkeypatch.setattr(
        run_folder, "save_file", lambda *given: (clock.work(took), write(*given))
    )
    with RunFolder("toy", Toy(), root=tmp_path, save_every=save_every) as run:
        for _ in range(2):
            run.save({"a": torch.ones(2)}, {})
            for passed in (0, wait - 1, wait, wait + 1):
                clock.work(passed)
                assert run.due() is (passed >= wait)
                clock.work(-passed)
    assert run.status["seconds"] == 2 * took


def run_of_rcrl(expert, base, problems, settings, *, orm, recorder) -> Policy:
    return add_tokens(base, [GOOD, BAD])


# What stands in for the work of a run: where it is called from, and what it returns
RUNS = {
    "expert-iteration": ("expert_iteration", lambda start, *_, **__: start.clone()),
    "ppo": ("ppo", lambda start, *_, **__: start.clone()),
    "orm": ("train_orm", lambda policy, *_, **__: OutcomeRewardModel(policy)),
    "rcrl": ("rcrl", run_of_rcrl),
}
STARTS = {
    "expert-iteration": ["sft", "orm"],
    "ppo": ["sft", "orm"],
    "orm": ["sft"],
    "rcrl": ["expert-iteration", "orm"],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_time_of_a_run_is_its_own(name, folder, starts, clock, monkeypatch):
    where, result = RUNS[name]

    def work(*args, **options):
        clock.work(7)
        return result(*args, **options)

    monkeypatch.setattr(train, where, work)
    recipe = toy_recipe(
        folder,
        reward={"kind": "sparse-orm"},
        expert_iteration={"orm_threshold": 0.5, "finetune": UPDATE},
        rcrl_labels="orm",
    )
    trained = TRAIN[name](recipe, 0)
    assert starts == STARTS[name]
    assert clock.now > 5000 + 3600  # which would count, were they made within the run
    assert trained.seconds == 7
    assert TRAIN[name](recipe, 0).seconds == 7
    assert starts == STARTS[name]  # a run that is done asks for nothing


def test_throughput_is_tokens_over_the_seconds_of_each_stage(tmp_path, clock):
    with RunFolder("ppo", Toy(), root=tmp_path) as run:
        for number, tokens in enumerate((100, 300)):
            for stage, seconds in (("sampling", 10), ("scoring", 4), ("learning", 20)):
                with run.clock(stage):
                    clock.work(seconds if number or stage != "scoring" else 0)
            clock.work(1000)  # of no stage
            with run.clock("judging"):
                clock.work(5)
            run.log("phase", phase=number, response_tokens=tokens)
            run.log("other")
    assert train.Trained(toy_policy(), run).throughput == [
        {"sampling": 10, "learning": 5},
        {"sampling": 30, "scoring": 75, "learning": 15},
    ]


# What would be overwritten


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"ppo": {"max_new_tokens": 100}},
            "ppo.max_new_tokens .* set the recipe's max",
        ),
        (
            {"expert_iteration": {"max_new_tokens": 100}},
            "expert_iteration.max_new_tokens .* set the recipe's max_new_tokens, which",
        ),
        (
            {"orm": {"max_new_tokens": 100}},
            "orm.max_new_tokens .* set the recipe's max",
        ),
        (
            {"rcrl": {"max_new_tokens": 9}},
            "rcrl.max_new_tokens .* set the recipe's max",
        ),
        (
            {"ppo": {"seed": 3}},
            "ppo.seed would be overwritten: give the seed to the co",
        ),
        (
            {"sft": {"seed": 3}},
            "sft.seed would be overwritten: give the seed to the co",
        ),
        ({"rcrl": {"seed": 3}}, "rcrl.seed would be .*: give the seed to the command"),
    ],
)
def test_what_would_be_overwritten_is_refused_with_its_remedy(changes, remedy, folder):
    with pytest.raises(SettingsError, match=remedy):
        toy_recipe(folder, **changes)
    # It would be: a run takes the recipe's limit, and the command's seed
    run = train.ppo_run(toy_recipe(folder), 5).algorithm
    assert (run.max_new_tokens, run.seed) == (24, 5)


def test_what_is_said_twice_alike_is_no_contradiction(folder):
    recipe = toy_recipe(folder, ppo={"max_new_tokens": 24, "seed": 0})
    assert train.ppo_run(recipe, 0).algorithm.max_new_tokens == 24


def test_steps_must_earn_less_than_the_answer():
    for size in (1.0, 1.5):
        with pytest.raises(SettingsError, match="must earn less than the final answer"):
            load_settings(RewardSettings, {"kind": "dense", "size": size})
    assert load_settings(RewardSettings, {"kind": "dense", "size": 0.9}).size == 0.9
    assert load_settings(RewardSettings, {"kind": "shaped", "size": 1.0}).size == 1.0


# Several seeds, each in its place


@pytest.fixture
def places(folder, monkeypatch):
    """Run seeds on so many GPUs; tells where each was, with two busy at a time."""
    monkeypatch.setitem(train.TRAIN, "sft", lambda _, seed: seed)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(gpus: int, seeds: list[int]) -> dict[int, str | None]:
        seen: dict[int, str | None] = {}
        busy: list[str | None] = []
        lock, first, others = Lock(), Barrier(2), Event()

        def process(command, *, env, **_):
            seed, place = int(command[-1]), env.get("CUDA_VISIBLE_DEVICES")
            with lock:
                assert place is None or place not in busy
                busy.append(place)
                seen[seed] = place
            assert env["OMP_NUM_THREADS"] == "1"
            if seed in seeds[:2]:
                first.wait(timeout=20)
            if seed == seeds[0]:  # the first one is done when all others are
                assert others.wait(timeout=20)
            with lock:
                busy.remove(place)
                if len(seen) == len(seeds):
                    others.set()
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(train, "cores", lambda: 2)
        monkeypatch.setattr(train.subprocess, "run", process)
        assert train.train_seeds(toy_recipe(folder), "sft", seeds) == seeds
        return seen

    return run


@pytest.mark.parametrize("visible", [None, "3,5"])
def test_each_seed_has_a_gpu_of_its_own(visible, places, monkeypatch):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = places(2, [7, 8, 9, 10])
    slow, fast = seen[7], seen[8]
    assert {slow, fast} == set(visible.split(",") if visible else "01")
    # Wrong, and noticed above: every second seed, also where one is still at work
    assert seen == {7: slow, 8: fast, 9: fast, 10: fast}


def test_without_a_gpu_none_is_named(places):
    assert places(0, [7, 8, 9]) == {7: None, 8: None, 9: None}


# A reward model on the command line


@pytest.fixture(scope="module")
def reward_model(folder) -> Path:
    """The root of a reward model's run and of the SFT that it judges."""
    root = folder / "runs"
    run_toy(TRAIN["orm"], toy_recipe(folder), root)
    return root


def run_in(root: Path, kind: str) -> Path:
    (path,) = root.glob(f"{kind}-*")
    return path


def test_a_policy_is_judged_with_a_reward_model(reward_model, folder, monkeypatch):
    monkeypatch.setenv("RLREASON_RUNS", str(reward_model))
    sft, orm = (str(run_in(reward_model, kind)) for kind in ("sft", "orm"))
    seen, evaluate = [], train.evaluate

    def note(*args, orm, **options):
        seen.append(orm)
        return evaluate(*args, orm=orm, **options)

    monkeypatch.setattr(train, "evaluate", note)
    command = ["evaluate", sft, "--profile", str(folder / "toy.yaml")]

    def metrics(*options: str) -> list[str]:
        shown = CliRunner().invoke(cli.app, [*command, *options])
        assert shown.exit_code == 0, shown.output
        return [line.split()[0] for line in shown.output.splitlines() if "@" in line]

    assert "rerank@4" in metrics("--orm", orm)
    assert "rerank@4" not in metrics()
    assert seen[1] is None
    trained = train.train_reward_model(toy_recipe(folder)).orm
    assert same_bits(seen[0].tensors(), trained.tensors())
    # Greedy, there is one answer and nothing to choose from
    refused = CliRunner().invoke(cli.app, [*command, "--orm", orm, "--greedy"])
    assert refused.exit_code == 2
    assert "--orm chooses among samples, and --greedy draws none" in refused.output
    assert len(seen) == 2


def test_only_a_finished_reward_model_is_one(reward_model, tmp_path):
    for other in (run_in(reward_model, "sft"), tmp_path, Path("nano")):
        with pytest.raises(ValueError, match="no run folder of `rlreason train orm`"):
            train.load_reward_model(other)
    orm = run_in(reward_model, "orm")
    for state in (orm / "checkpoints").glob("*/state.json"):
        half = tmp_path / orm.name / state.relative_to(orm)
        half.parent.mkdir(parents=True)
        half.write_text('{"updates": 1}')
        weights_ = state.with_name("weights.safetensors").read_bytes()
        half.with_name("weights.safetensors").write_bytes(weights_)
    settings = (orm / "settings.json").read_bytes()
    (tmp_path / orm.name / "settings.json").write_bytes(settings)
    with pytest.raises(ValueError, match="not finished; run its `rlreason train`"):
        train.load_reward_model(tmp_path / orm.name)
    assert train.load_reward_model(orm).tensors()


# The variants of PPO, and what is recorded of all


def differences(one: Any, other: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two dumps of settings differ, by the path of the field."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {at: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*one, *(key for key in other if key not in one)]:
        path = f"{at}.{key}" if at else key
        found |= differences(one.get(key), other.get(key), path)
    return found


@pytest.mark.parametrize("name", gains.VARIANTS)
@pytest.mark.parametrize("profile", ["tiny", "paper"])
def test_a_variant_changes_what_it_names_and_nothing_else(name, profile):
    recipe = load_recipe(profile)
    changed = gains.variant_of(recipe, name)
    found = differences(recipe.model_dump(), changed.model_dump())
    kind = name.removeprefix("ppo-")
    if name in gains.BASELINES:
        assert found.pop("ppo.credit.kind") == ("gae", name)
        # What a value function has is gone with it
        assert all(path.startswith("ppo.credit.") for path in found)
        assert dict(changed.ppo.credit) == {"kind": name}
    elif name in gains.REWARDS:
        assert found == {"reward.kind": ("sparse", kind)}
    elif name in gains.CURRICULA:
        assert found.pop("ppo.curriculum.kind") == ("uniform", kind)
        assert all(path.startswith("ppo.curriculum.") for path in found)
        assert type(changed.ppo.curriculum)() == changed.ppo.curriculum
    elif name in gains.FILTERED:
        assert found == {"expert_iteration.orm_threshold": (None, 0.5)}
    elif name == "rcrl-orm":
        assert found == {"rcrl_labels": ("rollouts", "orm")}
    elif name in gains.LABELLED:
        ratio = float(name.removeprefix("rcrl-"))
        assert found == {"rcrl.positive_ratio": (1.0, ratio)}
    elif name == gains.WEAK:
        judge = changed.orm
        assert {path.partition(".")[0] for path in found} == {
            *("orm", "orm_samples", "reward", "ppo"),
        } - ({"orm_samples"} if recipe.orm_samples == "sft" else set())
        assert (judge.likelihood, changed.orm_samples) == (False, "sft")
        assert (judge.lr, judge.lr_floor) == (recipe.sft.lr, recipe.sft.lr_floor)
        assert changed.reward.kind == "sparse-orm"
        assert {path for path in found if path[:4] == "ppo."} == {"ppo.kl.coef"}
        assert changed.ppo.kl.coef == 0
    else:
        batch = recipe.ppo.batch_size
        assert found == {
            "ppo.keep": (None, recipe.ppo.n // 2),
            "ppo.batch_size": (batch, batch // 2),
        }
    # It reaches the runs of its algorithm, and those that start from them at most
    first, second = (settings_of(name, each, 0) for each in (recipe, changed))
    assert first != second
    untouched = {"ppo", "expert-iteration"} - {gains.algorithm_of(name)}
    for other in untouched:
        assert settings_of(other, recipe, 0) == settings_of(other, changed, 0)


def settings_of(name: str, recipe: Recipe, seed: int) -> Settings:
    """What decides a run of an algorithm or of a variant of it."""
    runs = {
        "expert-iteration": train.expert_iteration_run,
        "orm": train.orm_run,
        "ppo": train.ppo_run,
        "rcrl": train.rcrl_run,
    }
    return runs[gains.algorithm_of(name)](recipe, seed)


def test_a_reward_of_another_kind_takes_no_size_along(folder):
    recipe = toy_recipe(folder, reward={"kind": "shaped", "size": 0.3})
    assert gains.variant_of(recipe, "ppo-sparse-orm").reward.size is None
    assert gains.variant_of(recipe, "ppo-dense").reward.size is None


def test_the_best_half_makes_as_many_updates(folder):
    recipe = toy_recipe(folder)
    half = gains.variant_of(recipe, gains.BEST)
    assert (recipe.ppo.n, half.ppo.keep) == (2, 1)
    wrong = half.ppo.model_copy(update={"batch_size": recipe.ppo.batch_size})

    def updates(settings: PpoSettings) -> int:
        recorder = Memory(save_every=10**9)
        short = {"phases": 1, "epochs": 2, "lora": None, "max_new_tokens": 24}
        ppo(
            toy_policy(),
            TOY_PROBLEMS,
            settings.model_copy(update=short),
            recorder=recorder,
        )
        return recorder.rows[0]["updates"]

    counts = [updates(settings) for settings in (recipe.ppo, half.ppo, wrong)]
    assert counts == [4, 4, 2]


RECORDED = gains.read_table(gains.gains_path("tiny"))


def recorded(algorithm: str, metric: str) -> dict[str, float]:
    (row,) = (
        row
        for row in RECORDED
        if row["algorithm"] == algorithm and row["metric"].startswith(metric)
    )
    return {key: float(row[key]) for key in ("after", "gain", "low", "high")}


def test_what_the_book_claims_is_recorded():
    ppo_row = recorded("ppo", "maj@1")
    assert ppo_row["gain"] >= 0.04
    assert ppo_row["low"] > 0
    assert recorded("expert-iteration", "maj@1")["low"] > 0
    assert recorded("rcrl", "maj@1 of [GOOD] against [BAD]")["low"] > 0
    assert recorded("orm", "AUC")["after"] >= 0.8
    assert recorded("orm", "rerank@96 against maj@96")["low"] > 0
    for row in RECORDED:
        low, gain, high = (float(row[key]) for key in ("low", "gain", "high"))
        assert low <= gain <= high
        assert row["seeds"] == "3"
        assert float(row["minutes"]) > 0
        if row["algorithm"] in ("expert-iteration", "ppo", "rcrl", "orm"):
            assert float(row["minutes"]) <= 4


def test_what_is_recorded_is_of_the_settings_as_they_are():
    recipe = load_recipe("tiny")
    phases = gains.read_table(gains.phases_path("tiny"))
    for row in [*RECORDED, *(row for row in phases if row["seed"] == "0")]:
        name = row["algorithm"]
        own = gains.variant_of(recipe, name)
        path, other = (
            RunFolder(name, settings_of(name, own, seed)).path for seed in (0, 1)
        )
        assert path.name == f"{name}-{row['settings']}", name
        assert other != path


def test_every_phase_of_every_seed_is_recorded_of_all_that_is_ppo():
    recipe = load_recipe("tiny")
    recorded = [
        (row["algorithm"], int(row["seed"]), int(row["phase"]))
        for row in gains.read_table(gains.phases_path("tiny"))
    ]
    seeds, phases = range(recipe.seeds), range(1, recipe.ppo.phases + 1)
    assert recorded == list(product(("ppo", *gains.OF_PPO), seeds, phases))

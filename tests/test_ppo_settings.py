"""PPO's settings: each does what its description says, from ``ppo()`` to the update.

The wrong versions are those in which a setting is read and then lost on the way.
"""

from __future__ import annotations

import math
import typing
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial

import pytest
import torch
from margins import effect
from torch import Tensor
from torch.distributions import Categorical
from toys import TOY_PROBLEMS, Memory, same_bits, toy_policy, toy_solutions, weights

from rlreason import sample
from rlreason.algorithms import ppo as algorithm
from rlreason.algorithms.credit import explained_variance, whiten
from rlreason.algorithms.curriculum import (
    BacktrackingSettings,
    QuestionSampler,
    ReplaySettings,
    UniformSettings,
    learning_scores,
)
from rlreason.algorithms.experience import check_phase
from rlreason.algorithms.optim import DivergedError
from rlreason.algorithms.ppo import Experience, Learner, ppo
from rlreason.algorithms.ppo_settings import (
    BaselineSettings,
    GaeSettings,
    KlSettings,
    LoraSettings,
    PpoSettings,
)
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.logprobs import pad_batch, token_logprobs, trunk_of
from rlreason.policy.packing import packs
from rlreason.policy.value import ValueSettings
from rlreason.rewards.base import last_token_reward
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.settings import Settings
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

HEAD = ValueSettings(kind="head", layers=1, detach=False)
BRANCH = ValueSettings(kind="branch", layers=1, detach=True)
NETWORK = ValueSettings(kind="network")
LORA = LoraSettings(rank=4, alpha=8.0)
QUICK = PpoSettings(
    phases=2,
    rollouts=8,
    n=2,
    temperature=0.7,
    max_new_tokens=20,
    epochs=2,
    batch_size=4,
    lr=2e-3,
    lr_floor=1e-3,
    lora=None,
    max_kl=50.0,
    credit=GaeSettings(lam=1.0, value=HEAD),
)


def quick(**changes) -> PpoSettings:
    return PpoSettings.model_validate({**dict(QUICK), **changes})


def run(recorder=None, *, settings=QUICK, problems=TOY_PROBLEMS, **options):
    return ppo(toy_policy(), problems, settings, recorder=recorder, **options)


@lru_cache(maxsize=16)
def plain_run(settings: PpoSettings) -> dict[str, Tensor]:
    """The weights after an undisturbed run, for others to be compared with."""
    return weights(run(settings=settings))


def learner_of(settings: PpoSettings) -> Learner:
    return Learner(toy_policy(), TOY_PROBLEMS, settings)


@torch.no_grad()
def move(learner: Learner, seed: int) -> None:
    """Change all that is trained, as some phases of learning would."""
    generator = torch.Generator().manual_seed(seed)
    policy = 0.01 if learner.settings.lora is None else 0.05
    for group, scale in zip(learner.trained, (policy, 0.02), strict=True):
        for weight in group:
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module")
def rollouts():
    """Twelve answers at QUICK's temperature, of which some are cut."""
    found = sample(
        toy_policy(),
        TOY_PROBLEMS,
        k=2,
        temperature=QUICK.temperature,
        max_new_tokens=QUICK.max_new_tokens,
        seed=1,
    )
    assert {rollout.finished for rollout in found} == {True, False}
    assert len({len(rollout.tokens) for rollout in found}) > 1
    return found


def experiences(monkeypatch) -> list[Experience]:
    """What each phase of the runs to come learns from, before whitening."""
    known = []

    class Noted(Learner):
        def learn(self, experience, phase):
            known.append(experience)
            return super().learn(experience, phase)

    monkeypatch.setattr(algorithm, "Learner", Noted)
    return known


def credited(learner, rollouts):
    paid = sparse_token_rewards(rollouts, TOY_PROBLEMS)
    return learner.credit(learner.pay(learner.score(rollouts), paid))


def gradients(learner) -> Tensor:
    parts = [
        torch.zeros(weight.numel()) if weight.grad is None else weight.grad.flatten()
        for group in learner.trained
        for weight in group
    ]
    learner.optimizer.zero_grad()
    return torch.cat(parts)


@contextmanager
def seen_at(modules, measure):
    """Collect ``measure(args, kwargs, output)`` of each call of each of the modules."""
    found = []

    def note(_, args, kwargs, output):
        found.append(measure(args, kwargs, output))

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def differ(one: Tensor, other: Tensor) -> float:
    """How far apart, as a part of the size of the other."""
    return float((one - other).norm() / other.norm())


# The price of the KL


def estimate(kind: str, d: float) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_p20_what_is_taken_off_is_the_chosen_estimate(kind, rollouts):
    learner = learner_of(quick(kl=KlSettings(coef=0.3, estimator=kind)))
    move(learner, seed=0)
    experience = learner.pay(learner.score(rollouts), [()] * len(rollouts))
    errors: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for row, rollout in enumerate(rollouts):
        for t in range(len(rollout.tokens)):
            d = float(experience.logprobs[row, t] - experience.ref_logprobs[row, t])
            price = float(experience.penalties[row, t])
            for other, found in errors.items():
                found.append(abs(price - 0.3 * estimate(other, d)))
    assert max(errors.pop(kind)) < 1e-5
    assert min(map(max, errors.values())) > 1e-4  # wrong: one of the others
    assert not experience.penalties[~experience.response_mask].any()


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": KlSettings(reference="swap")}, {"lora": LORA}],
    ids=["copy", "swap", "lora"],
)
def test_p03_the_reference_is_scored_at_the_temperature_of_sampling(changes, rollouts):
    learner = learner_of(quick(**changes))
    move(learner, seed=0)
    experience = learner.score(rollouts)

    def by_the_start(temperature):
        prompts = [rollout.prompt_tokens for rollout in rollouts]
        tokens = [rollout.tokens for rollout in rollouts]
        with torch.no_grad():
            found, _ = token_logprobs(
                toy_policy().model, prompts, tokens, temperature=temperature
            )
        return found

    assert torch.allclose(experience.ref_logprobs, by_the_start(0.7), atol=1e-4)
    # Wrong: at temperature 1, or the policy that has moved
    wrong = by_the_start(1.0) - experience.ref_logprobs
    assert wrong.abs().max() > 1e-2
    assert (experience.logprobs - experience.ref_logprobs).abs().max() > 1e-2


def test_a_reference_is_a_second_model_only_where_it_is_asked_for(rollouts):
    def models(learner) -> set[int]:
        """The models that score a phase."""
        seen = set()

        def spy(policy, *args, **options):
            seen.add(id(policy.model))
            return score(policy, *args, **options)

        score = algorithm.score
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(algorithm, "score", spy)
            learner.score(rollouts)
        return seen

    for changes, count in (
        ({"kl": KlSettings(reference="copy")}, 2),
        ({"kl": KlSettings(reference="swap")}, 1),
        ({"lora": LORA}, 1),
    ):
        learner = learner_of(quick(**changes))
        assert (learner.reference.copy is None) == (count == 1)
        assert len(models(learner)) == count
    learner = learner_of(quick(kl=KlSettings(reference="swap")))
    assert all(t.device.type == "cpu" for t in learner.reference.weights.values())


# The gradient of an update

FULL = quick(
    entropy_coef=0.1, credit=GaeSettings(value=HEAD, value_coef=0.3), micro_tokens=100
)
# As in the paper: adapters, and a branch that leaves the trunk alone
PAPER = quick(
    entropy_coef=0.1,
    credit=GaeSettings(value=BRANCH, value_coef=0.3),
    lora=LORA,
    micro_tokens=100,
)


def loop_gradients(
    learner,
    experience,
    rows,
    *,
    temperature: float | None = None,
    bonus: float = 1.0,
    detach: bool | None = None,
) -> Tensor:
    """The gradient of a mini-batch, token by token; with wrong versions to choose."""
    settings, value = learner.settings, learner.value_function
    temperature = temperature or settings.temperature
    detach = settings.gae.value.detach if detach is None else detach
    count = sum(len(experience.rollouts[row].tokens) for row in rows)
    total, seen = 0.0, Counter()
    for row in rows:
        rollout = experience.rollouts[row]
        ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        output = learner.policy.model(ids, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        if settings.gae.value.kind == "branch":  # one layer, the topmost
            below = output.hidden_states[-2]
            below = below.detach() if detach else below
            hidden = value.body(inputs_embeds=below, use_cache=False)[0]
        first = len(rollout.prompt_tokens) - 1
        for t, token in enumerate(rollout.tokens):
            step = Categorical(logits=output.logits[0, first + t] / temperature)
            new = step.log_prob(torch.tensor(token))
            ratio = (new - experience.logprobs[row, t]).exp()
            advantage = experience.advantages[row, t]
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
            total = total - bonus * settings.entropy_coef * step.entropy()
            v = hidden[0, first + t] @ value.weight + value.bias
            old, wanted = experience.values[row, t], experience.returns[row, t]
            near = old + (v - old).clamp(-0.2, 0.2)
            error = torch.maximum((v - wanted) ** 2, (near - wanted) ** 2)
            total = total + settings.gae.value_coef * 0.5 * error
            seen["clipped"] += bool(ratio != clipped)
            seen["V clipped"] += bool(v != near)
            seen["tokens"] += 1
    for kind in ("clipped", "V clipped"):
        assert 0 < seen[kind] < seen["tokens"], seen
    (total / count).backward()
    return gradients(learner)


@pytest.fixture(scope="module", params=[FULL, PAPER], ids=["full", "paper"])
def update(request, rollouts):
    """A learner in the middle of a phase, its experience, rows and their gradient."""
    learner = learner_of(request.param)
    move(learner, seed=0)
    experience = credited(learner, rollouts)
    move(learner, seed=1)
    rows = [1, 4, 8, 9, 11]
    learner.accumulate(experience, rows)
    return learner, experience, rows, gradients(learner)


def test_an_update_with_entropy_at_a_temperature_is_that_of_the_loop(update):
    learner, experience, rows, found = update
    assert differ(found, loop_gradients(learner, experience, rows)) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"bonus": -1.0}, {"bonus": 0.0}, {"temperature": 1.0}],
    ids=["entropy-is-lowered", "no-entropy", "temperature-of-1"],
)
def test_a_wrong_update_is_another_than_that_of_the_loop(wrong, update):
    learner, experience, rows, found = update
    assert differ(found, loop_gradients(learner, experience, rows, **wrong)) > 1e-2


@pytest.mark.parametrize("update", [PAPER], ids=["paper"], indirect=True)
def test_a_branch_whose_gradient_enters_the_trunk_is_another_update(update):
    learner, experience, rows, found = update
    wrong = loop_gradients(learner, experience, rows, detach=False)
    assert differ(found, wrong) > 1e-2


@effect(above=0.5)
def an_entropy_bonus_raises_the_entropy(seed: int) -> float:
    def last_entropy(coef: float) -> float:
        changes = {"phases": 3, "rollouts": 24, "batch_size": 12, "temperature": 1.0}
        recorder = Memory()
        run(recorder, settings=quick(**changes, entropy_coef=coef, seed=seed))
        return recorder.rows[-1]["entropy"]

    return last_entropy(10.0) - last_entropy(0.0)


@pytest.mark.learning
def test_an_entropy_bonus_raises_the_entropy():
    an_entropy_bonus_raises_the_entropy.check()


# What only saves memory


def places(args, kwargs, output) -> int:
    """Tokens that go through a trunk at once, padding included."""
    ids = kwargs.get("input_ids")
    return (args[0] if ids is None else ids).numel()


def test_logit_rows_bounds_the_rows_of_logits_that_are_held_at_once(rollouts):
    def rows_held(logit_rows: int | None) -> tuple[list[int], list[int]]:
        learner = learner_of(quick(logit_rows=logit_rows))
        models = (learner.policy.model, learner.reference.copy.model)
        heads = [model.get_output_embeddings() for model in models]

        def height(args, kwargs, output):
            return output.numel() // output.shape[-1]

        with seen_at(heads, height) as scoring:
            experience = credited(learner, rollouts)
        with seen_at(heads, height) as learning:
            learner.accumulate(experience, [0, 3, 5])
        return scoring, learning

    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    of_update = sum(len(rollouts[row].tokens) for row in (0, 3, 5))
    scoring, learning = rows_held(7)
    assert max(scoring) == max(learning) == 7
    assert sum(scoring) == 2 * tokens  # policy and reference
    assert sum(learning) == 2 * of_update  # once more in the backward pass
    # Without it, all rows of a micro-batch at once
    assert rows_held(None) == ([tokens, tokens], [of_update])


@pytest.mark.parametrize("value", [HEAD, BRANCH, NETWORK], ids=lambda v: v.kind)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_checkpointed_layers_are_computed_again_in_the_backward_pass(
    lora, value, rollouts
):
    def calls(checkpointing: bool) -> dict[str, tuple[int, int]]:
        """Of a layer of each model: forward passes to score, and for one update."""
        settings = quick(
            gradient_checkpointing=checkpointing,
            lora=lora,
            credit=GaeSettings(value=value),
            max_kl=None,
            kl=KlSettings(coef=0.0),
        )
        learner = learner_of(settings)
        trunks = {"policy": trunk_of(learner.policy.model)}
        if learner.value_function.body is not None:
            trunks["value"] = learner.value_function.body
        found = {}
        for name, trunk in trunks.items():
            # Of a part: hooks of the layer itself may stay outside the checkpoint
            parts = [layer.self_attn for layer in trunk.layers]
            if name == "policy" or value is NETWORK:
                packs(trunk, 1)  # looks once at a model, by passes of its own
            with seen_at(parts, lambda *_: 1) as scoring:
                experience = credited(learner, rollouts)
            with seen_at(parts, lambda *_: 1) as learning:
                learner.accumulate(experience, [0, 3, 5])
            found[name] = len(scoring) / len(parts), len(learning) / len(parts)
        return found

    plain, again = calls(False), calls(True)
    assert plain.keys() == again.keys()
    assert set(plain.values()) == {(1, 1)}
    assert set(again.values()) == {(1, 2)}


def test_a_policy_comes_back_without_gradient_checkpointing():
    def checkpoints(model) -> bool:
        return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

    settings = quick(phases=1, gradient_checkpointing=True)
    assert checkpoints(learner_of(settings).policy.model)
    model = run(settings=settings).model
    assert not model.training
    assert not checkpoints(model)


def test_micro_tokens_bounds_what_goes_through_a_model_at_once(rollouts):
    longest = max(len(r.prompt_tokens) + len(r.tokens) for r in rollouts)
    whole = len(rollouts) * longest
    pairs = [(r.prompt_tokens, r.tokens) for r in rollouts]
    tokens = len(pad_batch(*zip(*pairs, strict=True)).layout.tokens)

    def passes(budget: int) -> dict[str, tuple[list[int], list[int]]]:
        """Tokens of each call, in scoring and learning."""
        settings = quick(micro_tokens=budget, credit=GaeSettings(value=NETWORK))
        learner = learner_of(settings)
        trunks = {
            "policy": trunk_of(learner.policy.model),
            "reference": trunk_of(learner.reference.copy.model),
            "value": learner.value_function.body,
        }
        found = {}
        for name, trunk in trunks.items():
            packs(trunk, 1)  # looks once at the model, by passes of its own
            with seen_at([trunk], places) as scoring:
                experience = credited(learner, rollouts)
            with seen_at([trunk], places) as learning:
                learner.accumulate(experience, list(range(len(rollouts))))
            found[name] = scoring, learning
        return found

    once, cut = passes(whole), passes(3 * longest)
    for name in ("policy", "reference", "value"):
        learns = name != "reference"
        assert once[name] == ([tokens], [tokens] * learns)  # and no padding
        for calls in cut[name][: 1 + learns]:
            assert max(calls) <= 3 * longest
            assert len(calls) >= tokens / (3 * longest)
    assert cut["reference"][1] == []


# From the arguments of ppo() to the questions

STEPS = 3
LONG = [
    Problem(
        f"long/{name}",
        f"{name}?",
        "\n".join([f"<<{i}+1={i + 1}>>" for i in range(STEPS)] + [f"#### {STEPS}"]),
        str(STEPS),
    )
    for name in "abcdef"
]


def asked(settings, problems, **options):
    """Prompt tokens of each phase's rollouts."""
    found = []

    def note(rollouts, problems):
        found.append([(r.problem_id, r.prompt_tokens) for r in rollouts])
        return sparse_token_rewards(rollouts, problems)

    run(settings=settings, problems=problems, reward=note, **options)
    return found


def test_backtracking_gives_less_away_from_phase_to_phase():
    curriculum = BacktrackingSettings(share=1.0, start=1.0, until=1.0)
    settings = quick(phases=4, rollouts=12, max_new_tokens=2, curriculum=curriculum)
    policy, by_id = toy_policy(), {problem.id: problem for problem in LONG}
    given = []
    for phase in asked(settings, LONG):
        lines = []
        for problem_id, tokens in phase:
            prompt = policy.encode_prompt(format_prompt(by_id[problem_id]))
            assert list(tokens[: len(prompt)]) == prompt
            lines.append(policy.decode(tokens[len(prompt) :]).count("\n"))
        given.append(lines)
    assert len(given) == settings.phases
    for phase, lines in enumerate(given):
        exact = STEPS * (1 - phase / settings.phases)
        assert {math.floor(exact), math.ceil(exact)} >= set(lines)
    # Wrong: progress that stays at 0 gives all three lines to the end
    means = [sum(lines) / len(lines) for lines in given]
    assert means == sorted(set(means), reverse=True)
    assert max(given[-1]) < min(given[0]) == STEPS


def test_shots_stand_before_every_question():
    shots, policy = TOY_PROBLEMS[:2], toy_policy()
    settings = quick(max_new_tokens=2)
    by_id = {problem.id: problem for problem in TOY_PROBLEMS}
    for phase in asked(settings, TOY_PROBLEMS, shots=shots):
        for problem_id, tokens in phase:
            with_shots = format_prompt(by_id[problem_id], shots)
            assert list(tokens) == policy.encode_prompt(with_shots)
            bare = format_prompt(by_id[problem_id])
            assert list(tokens) != policy.encode_prompt(bare)


def test_replay_is_told_of_the_surprise_before_whitening(monkeypatch):
    told, update = [], QuestionSampler.update

    def listen(self, problem_ids, scores):
        told.append(list(scores))
        return update(self, problem_ids, scores)

    monkeypatch.setattr(QuestionSampler, "update", listen)
    known = experiences(monkeypatch)
    # V is 0 in the first phase, and nothing is discounted: each token of an answer
    # surprises by all that the answer is paid, 0 or 1
    settings = quick(curriculum=ReplaySettings(), kl=KlSettings(coef=0.0), rollouts=24)
    run(settings=settings)
    first = known[0]
    paid = sparse_token_rewards(first.rollouts, TOY_PROBLEMS)
    assert {sum(numbers) for numbers in paid} == {0.0, 1.0}
    assert told[0] == pytest.approx([sum(numbers) for numbers in paid])
    for scores, experience in zip(told, known, strict=True):
        mask = experience.response_mask
        right = learning_scores(experience.advantages, mask).tolist()
        assert scores == pytest.approx(right)
        # Wrong: those of whitened advantages
        white = learning_scores(whiten(experience.advantages, mask), mask).tolist()
        assert scores != pytest.approx(white, abs=0.1)


# What is logged


def explained_twice(seed: int) -> list[tuple[float, float]]:
    """What is logged as explained, and what it would be with the padding; by phase."""
    recorder, found = Memory(), []
    with pytest.MonkeyPatch.context() as patch:
        known = experiences(patch)
        settings = quick(phases=6, rollouts=24, batch_size=8, seed=seed)
        run(recorder, settings=settings)
    for row, experience in zip(recorder.rows, known, strict=True):
        pairs = [
            (float(experience.values[i, t]), float(experience.returns[i, t]))
            for i, rollout in enumerate(experience.rollouts)
            for t in range(len(rollout.tokens))
        ]
        values, returns = torch.tensor(pairs, dtype=torch.float64).T
        rest = returns - values
        expected = 1 - float(rest.var(unbiased=False) / returns.var(unbiased=False))
        assert row["explained_variance"] == pytest.approx(expected, abs=1e-4)
        assert row["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        everywhere = explained_variance(experience.values, experience.returns)
        found.append((expected, everywhere))
    return found


@effect(above=-2.0)
def log10_of_what_padding_adds_to_what_is_explained(seed: int) -> float:
    return math.log10(max(abs(a - b) for a, b in explained_twice(seed)))


@pytest.mark.learning
def test_p21_explained_variance_does_not_see_padding():
    log10_of_what_padding_adds_to_what_is_explained.check()


SAMPLED = {
    "full": {},
    "lora-branch": {"lora": LORA, "credit": GaeSettings(value=BRANCH), "epochs": 4},
}


def ratio_errors(kind: str, seed: int) -> list[float]:
    recorder = Memory()
    run(recorder, settings=quick(phases=3, seed=seed, **SAMPLED[kind]))
    return [row["ratio_error"] for row in recorder.rows]


def ratio_errors_when_hotter(kind: str, seed: int) -> list[float]:
    """Wrong: sampled at another temperature than scored."""
    sample_prompts = algorithm.sample_prompts

    def hotter(*args, temperature, **options):
        return sample_prompts(*args, temperature=1.0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "sample_prompts", hotter)
        return ratio_errors(kind, seed)


def orders_apart(kind: str, seed: int) -> float:
    wrong, right = ratio_errors_when_hotter(kind, seed), ratio_errors(kind, seed)
    return math.log10(min(wrong) / max(right))


HOTTER = {
    kind: effect(above=2.0, name=f"orders_that_ratio_errors_lie_apart_{kind}")(
        partial(orders_apart, kind)
    )
    for kind in SAMPLED
}


@pytest.mark.learning
@pytest.mark.parametrize("kind", SAMPLED)
def test_p03_the_ratio_error_is_of_the_samplers_probabilities(kind):
    with pytest.warns(UserWarning, match="disagree"):
        HOTTER[kind].check()


# The value function learns

PAIR = [
    TOY_PROBLEMS[0],
    Problem("toy/long", "Who has more pens?", toy_solutions(3)[0], "3"),
]


def pay_the_first(rollouts, problems):
    """1 for any answer to the first question, 0 for any to the second."""
    return [
        last_token_reward(rollout, float(rollout.problem_id == problems[0].id))
        for rollout in rollouts
    ]


VALUES = {"head": (HEAD, None), "branch": (BRANCH, LORA), "network": (NETWORK, None)}


def explained(kind: str, seed: int, scale: float = 100.0) -> float:
    """The largest share of variance that V explains after a phase."""
    value, lora = VALUES[kind]
    credit = GaeSettings(lam=1.0, value=value, value_lr_scale=scale, value_clip=None)
    settings = quick(
        phases=4,
        n=4,
        max_new_tokens=6,
        epochs=10,
        batch_size=8,
        lr=1e-4,
        lora=lora,
        credit=credit,
        kl=KlSettings(coef=0.0),
        seed=seed,
    )
    recorder = Memory()
    run(recorder, settings=settings, problems=PAIR, reward=pay_the_first)
    found = [row["explained_variance"] for row in recorder.rows]
    assert found[0] == 0
    return max(found)


EXPLAINED = {
    kind: effect(above=0.3, name=f"values_of_a_{kind}_explain_the_returns")(
        partial(explained, kind)
    )
    for kind in VALUES
}


@pytest.mark.learning
@pytest.mark.parametrize("kind", EXPLAINED)
def test_p52_values_learn_which_of_two_questions_is_worth_more(kind):
    EXPLAINED[kind].check()


def test_p52_values_that_do_not_move_explain_nothing():
    assert abs(explained("head", 0, scale=1e-9)) < 0.01


# Every setting of the settings within

BACK = BacktrackingSettings(share=0.7, start=1.0, until=0.8)
KL = KlSettings(coef=0.3, target=0.05, horizon=50)
# Of each class: where it stands, an instance, and another value of each field
WITHIN = {
    KlSettings: (
        lambda kl: quick(phases=3, kl=kl),
        KL,
        {"coef": 0.5, "estimator": "k2", "target": 50.0, "horizon": 500},
    ),
    LoraSettings: (
        lambda lora: quick(lora=lora),
        LoraSettings(rank=2, alpha=4.0),
        {"rank": 3, "alpha": 8.0, "targets": ("v_proj",)},
    ),
    ValueSettings: (
        lambda value: quick(credit=GaeSettings(value=value)),
        BRANCH,
        {"kind": "network", "layers": 2, "detach": False},
    ),
    BacktrackingSettings: (
        lambda curriculum: quick(curriculum=curriculum),
        BACK,
        {"kind": UniformSettings(), "share": 0.1, "start": 0.2, "until": 0.3},
    ),
    ReplaySettings: (
        lambda curriculum: quick(phases=3, curriculum=curriculum),
        ReplaySettings(replay_probability=0.9),
        {
            "kind": UniformSettings(),
            "replay_probability": 0.0,
            "temperature": 10.0,
            "staleness": 1.0,
        },
    ),
    GaeSettings: (
        lambda credit: quick(phases=3, credit=credit),
        QUICK.credit.model_copy(update={"value_epochs": 2}),
        {
            "kind": BaselineSettings(kind="reinforce"),
            "gamma": 0.9,
            "lam": 0.3,
            "value": NETWORK,
            "value_coef": 9.0,
            "value_clip": 1e-6,
            "value_lr_scale": 9.0,
            "value_epochs": 1,
            "value_lam": 0.3,
            "bootstrap": True,
        },
    ),
    BaselineSettings: (
        lambda credit: quick(rollouts=24, n=4, credit=credit),
        BaselineSettings(kind="rloo"),
        {"kind": "grpo", "k": 2},
    ),
}
# These change memory alone, and each has its own test
SAVING = {
    (KlSettings, "reference"): (
        test_a_reference_is_a_second_model_only_where_it_is_asked_for
    ),
    (PpoSettings, "logit_rows"): (
        test_logit_rows_bounds_the_rows_of_logits_that_are_held_at_once
    ),
    (PpoSettings, "compile"): "test_compiling.py",
    (PpoSettings, "gradient_checkpointing"): (
        test_checkpointed_layers_are_computed_again_in_the_backward_pass
    ),
    (PpoSettings, "micro_tokens"): (
        test_micro_tokens_bounds_what_goes_through_a_model_at_once
    ),
}
# Their fields are changed in test_ppo.py, or there is nothing to change
ELSEWHERE = {PpoSettings, UniformSettings}


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, (_, _, changes) in WITHIN.items() for name in changes],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_p49_every_setting_within_changes_the_result(cls, name):
    place, base, changes = WITHIN[cls]
    changed = changes[name]
    if name != "kind" or isinstance(changed, str):  # else of another class
        changed = cls(**{**dict(base), name: changed})
    assert changed != base
    assert not same_bits(weights(run(settings=place(changed))), plain_run(place(base)))


def classes_within(annotation) -> set[type]:
    """All classes of settings that an annotation names, and those within them."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        fields = annotation.model_fields.values()
        inner = (classes_within(field.annotation) for field in fields)
        return {annotation}.union(*inner)
    return set().union(*map(classes_within, typing.get_args(annotation)))


def test_what_only_saves_memory_is_placement_and_nothing_else_is():
    placed = {
        (cls, name)
        for cls in classes_within(PpoSettings)
        for name, field in cls.model_fields.items()
        if field.json_schema_extra and field.json_schema_extra.get("placement")
    }
    assert placed == set(SAVING)


def test_p49_no_setting_within_is_left_out():
    assert classes_within(PpoSettings) == WITHIN.keys() | ELSEWHERE
    for cls, (_, _, changes) in WITHIN.items():
        saving = {name for owner, name in SAVING if owner is cls}
        assert changes.keys() | saving == set(cls.model_fields), cls
        assert not changes.keys() & saving


def test_a_small_limit_of_the_kl_is_told_with_what_passed_it():
    settings = PpoSettings(max_kl=1e-9)
    with pytest.raises(DivergedError, match=r"is 3\.4e-07 nats a token .*max_kl=1e-09"):
        check_phase({"kl_token": 3.4e-7}, 1, settings, 0, Recorder())

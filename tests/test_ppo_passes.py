"""A phase of PPO computes nothing twice, and the count would see it if it did."""

from __future__ import annotations

import pytest
from meter import STAGES, Stage, run_ppo
from toys import toy_recipe

from rlreason.algorithms import ppo as algorithm
from rlreason.algorithms.ppo import Learner
from rlreason.algorithms.ppo_settings import (
    KlSettings,
    LoraSettings,
    PpoSettings,
)
from rlreason.policy.value import score
from rlreason.runs.profiles import load_recipe
from rlreason.runs.steps import train_sft


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The toy, whose whole phase takes a tenth of a second."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLREASON_RUNS", str(folder / "runs"))
        yield toy_recipe(folder)


@pytest.fixture(scope="module")
def measure(recipe):
    """Counts a phase from the toy's SFT."""
    start = train_sft(recipe).policy

    def measure(settings: PpoSettings = recipe.ppo) -> dict[str, Stage]:
        return run_ppo(recipe, start.clone(), settings)

    return measure


def ratios(stages: dict[str, Stage]) -> dict[str, float]:
    return {name: s.computed / s.needed for name, s in stages.items()}


def test_the_smoke_profile_computes_nothing_twice():
    smoke = load_recipe("smoke")
    stages = run_ppo(smoke, train_sft(smoke).policy, smoke.ppo)
    assert tuple(stages) == STAGES
    # At least what is needed, and not much padding beside it
    assert all(1 <= ratio < 1.5 for ratio in ratios(stages).values())


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 2),  # adapters: policy and reference are one model
        ({"lora": None}, 2),  # a frozen copy
        ({"lora": None, "kl": KlSettings(reference="swap")}, 2),
        ({"lora": None, "kl": KlSettings(coef=0.0)}, 2),  # for the run-away guard
        ({"lora": None, "kl": KlSettings(coef=0.0), "max_kl": None}, 1),
        ({"lora": None, "epochs": 3}, 2),
        ({"lora": LoraSettings(rank=2, alpha=2.0), "n": 4}, 2),
    ],
    ids=[
        "lora",
        "copy",
        "swap",
        "no-penalty",
        "no-reference",
        "epochs",
        "four-samples",
    ],
)
def test_every_forward_pass_is_counted_and_none_is_made_twice(
    changes, passes, recipe, measure
):
    settings = recipe.ppo.model_copy(update=changes)
    stages = measure(settings)
    updates = settings.epochs * settings.rollouts // settings.batch_size
    assert stages["scoring"].calls == passes
    assert stages["learning"].calls == updates
    # One is for what all prompts begin with
    assert stages["sampling"].calls <= recipe.max_new_tokens + 1
    for ratio in ratios(stages).values():
        assert 1 <= ratio < 1.5
    whole = stages["scoring"].needed / passes
    assert stages["learning"].needed == settings.epochs * whole


def test_from_the_base_every_prompt_holds_the_examples(recipe, monkeypatch):
    asked = []

    def sample_prompts(policy, prompts, **options):
        asked.extend(policy.decode(prompt.tokens) for prompt in prompts)
        return sample(policy, prompts, **options)

    sample = algorithm.sample_prompts
    monkeypatch.setattr(algorithm, "sample_prompts", sample_prompts)
    for prompted, questions in ((False, 1), (True, 1 + recipe.shots)):
        asked.clear()
        stages = run_ppo(recipe, recipe.base(), recipe.ppo, prompted=prompted)
        assert {prompt.count("Q: ") for prompt in asked} == {questions}
        assert 1 <= ratios(stages)["scoring"] < 1.5


def score_again(learner: Learner, rollouts) -> None:
    prompts = [rollout.prompt_tokens for rollout in rollouts]
    score(learner.policy, prompts, [rollout.tokens for rollout in rollouts])


def test_a_second_pass_of_the_policy_is_seen_by_the_count(measure, monkeypatch):
    plain = measure()

    class Twice(Learner):
        """Wrong: log-probabilities by one pass and values by another."""

        def score(self, rollouts):
            score_again(self, rollouts)
            return super().score(rollouts)

    monkeypatch.setattr(algorithm, "Learner", Twice)
    found = measure()
    assert found["scoring"].calls == plain["scoring"].calls + 1
    assert ratios(found)["scoring"] == pytest.approx(1.5 * ratios(plain)["scoring"])
    for stage in ("sampling", "learning"):
        assert ratios(found)[stage] == ratios(plain)[stage]


def test_prompts_computed_for_every_sample_are_seen_by_the_count(measure, monkeypatch):
    plain, sample_prompts = measure(), algorithm.sample_prompts

    def one_by_one(policy, prompts, *, k, **options):
        """Wrong: each sample brings its own prompt."""
        return [
            rollout
            for prompt in prompts
            for _ in range(k)
            for rollout in sample_prompts(policy, [prompt], k=1, **options)
        ]

    monkeypatch.setattr(algorithm, "sample_prompts", one_by_one)
    found = measure()
    assert ratios(found)["sampling"] > ratios(plain)["sampling"] + 0.1


def test_old_log_probabilities_computed_again_are_seen_by_the_count(
    measure, monkeypatch
):
    class Again(Learner):
        """Wrong: those of the sampling policy are scored anew for every mini-batch."""

        def accumulate(self, experience, mb_rows):
            score_again(self, [experience.rollouts[row] for row in mb_rows])
            return super().accumulate(experience, mb_rows)

    monkeypatch.setattr(algorithm, "Learner", Again)
    assert ratios(measure())["learning"] > 1.9


def test_the_policy_is_left_without_a_hook(recipe):
    policy = recipe.base()
    run_ppo(recipe, policy, recipe.ppo)
    layers = policy.model.modules()
    assert not any(layer._forward_pre_hooks for layer in layers)

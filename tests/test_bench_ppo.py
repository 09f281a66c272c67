"""The benchmark of PPO: shares of a whole, and a count that sees what is done twice."""

from __future__ import annotations

import pytest
from toys import toy_recipe

from rlreason.algorithms import ppo as algorithm
from rlreason.algorithms.ppo import Learner
from rlreason.algorithms.ppo_settings import (
    KlSettings,
    LoraSettings,
    PpoSettings,
)
from rlreason.bench import ppo as module
from rlreason.bench.ppo import (
    STAGES,
    Stage,
    bench_ppo,
    format_ppo_benchmark,
)
from rlreason.policy.value import score


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The toy, whose whole phase takes a tenth of a second, and its SFT."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLREASON_RUNS", str(folder / "runs"))
        recipe = toy_recipe(folder)
        start = module.train_sft(recipe)
        patch.setattr(module, "load_recipe", lambda profile: recipe)
        patch.setattr(module, "train_sft", lambda recipe: start)
        yield recipe


def measure(settings: PpoSettings | None = None) -> dict[str, Stage]:
    return {stage.name: stage for stage in bench_ppo(phases=1, settings=settings)}


def ratios(stages: dict[str, Stage]) -> dict[str, float]:
    return {name: s.computed / s.needed for name, s in stages.items()}


def test_the_smoke_profile_computes_nothing_twice():
    stages = bench_ppo(profile="smoke", phases=1)
    assert tuple(stage.name for stage in stages) == STAGES
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    seconds = sum(stage.seconds for stage in stages)
    for stage in stages:
        assert stage.share == pytest.approx(stage.seconds / seconds)
        # At least what is needed, and not much padding beside it
        assert 1 <= stage.computed / stage.needed < 1.5
    head, *lines = format_ppo_benchmark(stages).splitlines()
    assert head.split()[:3] == ["stage", "seconds", "share"]
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert len({len(line) for line in (head, *lines)}) == 1


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
def test_every_forward_pass_is_counted_and_none_is_made_twice(changes, passes, recipe):
    settings = recipe.ppo.model_copy(update=changes)
    stages = measure(settings)
    updates = settings.epochs * settings.rollouts // settings.batch_size
    assert stages["scoring"].calls == passes
    assert stages["learning"].calls == updates
    assert stages["sampling"].calls <= recipe.max_new_tokens
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
    for start, questions in (("sft", 1), ("base", 1 + recipe.shots)):
        asked.clear()
        stages = {stage.name: stage for stage in bench_ppo(phases=1, start=start)}
        assert {prompt.count("Q: ") for prompt in asked} == {questions}
        assert 1 <= stages["scoring"].computed / stages["scoring"].needed < 1.5


def score_again(learner: Learner, rollouts) -> None:
    prompts = [rollout.prompt_tokens for rollout in rollouts]
    score(learner.policy, prompts, [rollout.tokens for rollout in rollouts])


def test_a_second_pass_of_the_policy_is_seen_by_the_count(recipe, monkeypatch):
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


def test_prompts_computed_for_every_sample_are_seen_by_the_count(recipe, monkeypatch):
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
    recipe, monkeypatch
):
    class Again(Learner):
        """Wrong: those of the sampling policy are scored anew for every mini-batch."""

        def accumulate(self, experience, mb_rows):
            score_again(self, [experience.rollouts[row] for row in mb_rows])
            return super().accumulate(experience, mb_rows)

    monkeypatch.setattr(algorithm, "Learner", Again)
    assert ratios(measure())["learning"] > 1.9


def test_the_policy_is_left_without_a_hook(recipe):
    measure()
    model = module.train_sft(recipe).policy.model
    assert not any(layer._forward_pre_hooks for layer in model.modules())

"""The measures: of the right run, samples and reward model, as by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from toys import TOY_PROBLEMS, UPDATE, run_toy, toy_policy, toy_recipe

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.evaluate import answer_groups
from rlreason.experiments.catalogue import ALL, BASE, CATALOGUE, Arm, Catalogue
from rlreason.experiments.measures import (
    MEASURES,
    NOTHING,
    Context,
    Measure,
    identity,
    measure,
    plans_needed,
    reward_and_accuracy,
    shares,
    spent,
    unadorned,
)
from rlreason.experiments.rows import Row, Spent
from rlreason.policy.sampler import sample
from rlreason.policy.vocabulary import token_id
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.evaluate import evaluate_recipe
from rlreason.runs.plans import folder_of, obtain
from rlreason.settings import settings_hash
from rlreason.tasks.prompts import format_prompt

NAMES = ["sft", "expert-iteration", "rcrl-orm", "ppo-sparse-orm", "ppo-weak-orm"]
NAMES += ["ppo-base", "expert-iteration-orm-base", "rcrl-minimal-1", "orm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the toy and its runs lie."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def context(root):
    """Measures the toy."""
    credit = {"kind": "gae", "value": {"kind": "head"}}
    recipe = toy_recipe(
        root,
        seeds=1,
        ppo={"phases": 1, "rollouts": 8, "n": 2, "batch_size": 8, "lora": None}
        | {"credit": credit, "max_new_tokens": 24, "lr": 1e-2, "max_kl": None},
        expert_iteration={"k": 4, "rounds": 1, "finetune": UPDATE},
    )
    return Context(recipe)


@pytest.fixture
def on_the_toy(context, root):
    return lambda function: run_toy(
        lambda *_: function(), context.recipe, root / "runs"
    )


@pytest.fixture(scope="module")
def measured(context, root) -> dict[tuple[str, str], Row]:
    """The rows of most of the catalogue, by arm and measure."""

    def rows():
        return [
            row
            for subject in context.subjects(NAMES)
            for row in measure(context, subject, subject.arm.measures)
        ]

    found = run_toy(lambda *_: rows(), context.recipe, root / "runs")
    return {(row.arm, row.measure): row for row in found}


def test_every_run_has_a_row_a_measure_with_a_value_a_problem(measured, context):
    arms = [subject.arm for subject in context.subjects(NAMES)]
    assert list(measured) == [(arm.name, name) for arm in arms for name in arm.measures]
    for (name, _), row in measured.items():
        subject = context.subject(name, context.recipe.policy, 0)
        assert row.identity == identity(context, subject, row.measure)
        assert (row.size, row.seed, row.split) == ("base", 0, "test")
        assert row.step == subject.arm.step
        for key, values in row.values.items():
            if key not in ("k", "samples", "rows", "auc"):
                assert len(values) == 6, (name, row.measure, key)
        assert Row.model_validate_json(row.model_dump_json()) == row
    assert 0 <= measured["orm", "auc"].values["auc"] <= 1


def test_samples_are_those_of_the_seed_scored_by_the_model_that_chooses(
    measured, context, on_the_toy
):
    def by_hand(name: str, judge: str | None = None):
        subject = context.subject(name, context.recipe.policy, 0)
        model = obtain(context.judge_plan(subject)).orm
        report = evaluate_recipe(
            context.recipe,
            subject.trained(),
            orm=model,
            prompted=subject.prompted,
            sampler=answer_groups,
        )
        return {
            "k": 4,
            "right": [sum(result.correct) for result in report.results],
            "vote": shares(report.values("maj@4")),
            "distinct": [len(result.sequences) for result in report.results],
        }, shares(report.values("rerank@4"))

    for name in ("sft", "base", "ppo-base"):
        values, rerank = on_the_toy(lambda name=name: by_hand(name))
        found = dict(measured[name, "samples"].values)
        chosen = found.pop("rerank")
        assert found == values
        if name == "sft":  # the others' examples are not shown to the model
            assert chosen == rerank


def test_the_judge_reads_the_plain_question_without_labels(context, on_the_toy):
    subject = context.subject("rcrl", context.recipe.policy, 0)
    policy = on_the_toy(subject.trained)
    problem = TOY_PROBLEMS[0]
    groups = answer_groups(
        policy, [problem], k=3, label=GOOD, temperature=1.0, max_new_tokens=24, seed=0
    )
    ((_, rollouts),) = groups
    forced = {token_id(policy, label) for label in (GOOD, BAD)}
    assert all(forced & set(rollout.tokens) for rollout in rollouts)
    for plain, rollout in zip(
        unadorned(rollouts, problem, policy), rollouts, strict=True
    ):
        assert not forced & set(plain.tokens)
        assert plain.prompt_tokens == tuple(
            policy.encode_prompt(format_prompt(problem))
        )
        assert len(plain.tokens) == len(plain.logprobs) < len(rollout.tokens)
    (shown,) = sample(
        policy, [problem], k=1, max_new_tokens=24, shots=TOY_PROBLEMS[1:2]
    )
    (plain,) = unadorned([shown], problem, policy)
    assert len(plain.prompt_tokens) < len(shown.prompt_tokens)
    # Wrong: a model of the base cannot read a label at all
    model = OutcomeRewardModel(toy_policy())
    score_responses(model, unadorned(rollouts, problem, policy))
    with pytest.raises(ValueError, match="token"):
        score_responses(model, rollouts)


def test_what_a_reward_model_says_is_of_the_model_that_rewarded(
    measured, context, on_the_toy
):
    def by_hand(name: str):
        subject = context.subject("ppo-weak-orm", context.recipe.policy, 0)
        recipe = subject.recipe
        orm = obtain(context.subject(name, context.recipe.policy, 0).plan_of("orm")).orm
        problems = recipe.task.load("test")
        found = {}
        for when, policy in (("before", subject.began()), ("after", subject.trained())):
            scores, right = reward_and_accuracy(recipe, policy, orm, problems)
            found |= {
                f"score_{when}": shares(scores),
                f"right_{when}": "".join(str(int(x)) for x in right),
            }
        return found

    values = measured["ppo-weak-orm", "earned"].values
    assert on_the_toy(lambda: by_hand("ppo-weak-orm")) == values
    assert on_the_toy(lambda: by_hand("ppo")) != values  # another reward model


def test_reranking_is_of_the_same_samples_of_sft(measured, context, on_the_toy):
    def by_hand():
        subject = context.subject("orm", context.recipe.policy, 0)
        sft = obtain(subject.plan_of("sft")).policy
        start = obtain(subject.plan.start).policy
        scorers = subject.trained(), OutcomeRewardModel(start, likelihood=True)
        reports = [evaluate_recipe(context.recipe, sft, orm=each) for each in scorers]
        return {
            "k": 4,
            "vote": shares(reports[0].values("maj@4")),
            "rerank": shares(reports[0].values("rerank@4")),
            "likelihood": shares(reports[1].values("rerank@4")),
        }

    assert on_the_toy(by_hand) == measured["orm", "reranking"].values


def test_scores_and_truth_are_means_over_the_answers_to_each_problem(
    context, on_the_toy
):
    recipe, policy, problems = context.recipe, toy_policy(), TOY_PROBLEMS[:3]
    subject = context.subject("orm", recipe.policy, 0)
    orm = on_the_toy(subject.trained)
    scores, right = reward_and_accuracy(recipe, policy, orm, problems, k=4, seed=5)
    answers = sample(
        policy,
        problems,
        k=4,
        temperature=recipe.ppo.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=5,
    )
    groups = [[r for r in answers if r.problem_id == p.id] for p in problems]
    assert scores == pytest.approx(
        [fmean(score_responses(orm, g)) for g in groups], abs=1e-5
    )
    assert right == pytest.approx([fmean(sparse_rewards(g, problems)) for g in groups])
    assert 0 < right.mean() < 1


def test_what_training_took_is_counted_once_with_what_it_builds_on(
    measured, context, on_the_toy
):
    row = measured["ppo-sparse-orm", "greedy"]  # SFT, and a reward model of SFT
    assert row.spent.rollouts == 8

    def parts():
        plan = context.subject("ppo-sparse-orm", context.recipe.policy, 0).plan
        model = folder_of(plan.reward_model)
        seconds = [
            folder_of(p).status["seconds"] for p in (plan.start, plan.reward_model)
        ]
        (phase,) = (r for r in folder_of(plan).metrics if r["kind"] == "phase")
        return sum(seconds), model.metrics[0]["rollouts"], phase["response_tokens"]

    seconds, rollouts, tokens = on_the_toy(parts)
    assert row.needed.seconds == pytest.approx(seconds, abs=0.2)  # SFT not twice
    assert row.needed.rollouts == rollouts == 48
    assert row.spent.tokens == tokens
    assert row.needed.tokens is None  # the reward model's run does not say
    assert measured["base", "greedy"].spent == NOTHING
    assert measured["sft", "greedy"].spent.rollouts == 0
    assert measured["expert-iteration", "greedy"].spent.rollouts == 24
    assert spent(None) == Spent(seconds=0, rollouts=0, tokens=0)


def test_a_curve_is_what_the_run_wrote_of_its_phases(measured, context, on_the_toy):
    plan = context.subject("ppo", context.recipe.policy, 0).plan
    written = on_the_toy(lambda: folder_of(plan).metrics)
    (phase,) = (row for row in written if row["kind"] == "phase")
    (kept,) = measured["ppo", "curve"].values["rows"]
    assert (kept.pop("kind"), phase.pop("kind")) == ("phase", "phase")
    assert kept == pytest.approx(phase, rel=1e-3)
    (round_,) = measured["expert-iteration", "curve"].values["rows"]
    assert {"rollouts", "validation_maj_1"} <= round_.keys()


# What is asked of whom, without training


class Asked:
    """Stands in for ``evaluate_recipe``."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, recipe, policy, **options):
        self.calls.append((recipe, policy, options))
        right = np.array([1.0, 0.0])
        return type("Report", (), {"values": lambda self, name: right})()


@pytest.mark.parametrize(
    ("arm", "prompted", "label"),
    [
        ("base", True, None),
        ("ppo-base", True, None),
        ("expert-iteration-base", False, None),  # learned without the examples
        ("ppo", False, None),
        ("rcrl", False, GOOD),
        ("rcrl-minimal-10", False, GOOD),
    ],
)
def test_policies_are_asked_as_they_have_learned_to_be(arm, prompted, label, context):
    asked = Asked()
    own = replace(context, evaluate=asked)
    subject = own.subject(arm, context.recipe.policy, 1)
    values = MEASURES["greedy"].function(own, subject, "policy")
    assert values == {"right": "10"}
    ((recipe, policy, options),) = asked.calls
    assert (recipe, policy) == (subject.recipe, "policy")
    assert options == {"greedy_only": True, "label": label, "prompted": prompted}
    if label:
        assert MEASURES["labels"].function(own, subject, "policy") == {"bad": "10"}
        assert asked.calls[-1][2]["label"] == BAD


def test_more_problems_are_sampled_for_the_record_than_in_a_chapter(context):
    for recorded, expected in ((None, 5), (3, 3)):
        sizes = {
            "evaluation.sampled_problems": 5,
            "evaluation.recorded_problems": recorded,
        }
        own = replace(context, recipe=context.recipe.changed(sizes))
        subject = own.subject("sft", context.recipe.policy, 0)
        assert own.sampled_recipe(subject).evaluation.sampled_problems == expected
        assert identity(own, subject, "samples") != identity(
            context, subject, "samples"
        )


def test_a_row_is_stale_by_what_decided_it_alone(context):
    def stale(changes) -> set[str]:
        same = {"evaluation.validation_problems": 2}  # not what training looks at
        both = [
            replace(context, recipe=context.recipe.changed(same | more))
            for more in ({}, changes)
        ]
        arm = "ppo-weak-orm", context.recipe.policy, 0
        return {
            name
            for name, measure in MEASURES.items()
            if len({measure.how(c, c.subject(*arm)) for c in both}) == 2
        }

    sampled = {"samples", "solutions", "reranking"}
    assert stale({"evaluation.sampled_problems": 4}) == sampled
    assert stale({"evaluation.problems": 3}) == {"greedy", "labels", "earned"}
    # Wrong: that all of the evaluation decides each
    assert stale({"evaluation.k": 5}) == sampled


def test_a_measure_of_ones_own_is_an_entry(context, monkeypatch):
    arm = Arm("mine", "counted", BASE, {"start": "base"}, start="", measures=("size",))
    own = replace(context, catalogue=Catalogue((arm,), ()))
    (subject,) = own.subjects()

    def needs(context, subject):
        return [subject.plan_of("sft")]

    def size(context, subject, policy):
        return {"vocabulary": len(policy.tokenizer), "seed": subject.seed}

    monkeypatch.setitem(MEASURES, "size", Measure(size, needs))
    assert plans_needed(own, subject, ["size"]) == needs(own, subject)
    (row,) = measure(own, subject, ["size"])
    assert row.values == {"vocabulary": len(toy_policy().tokenizer), "seed": 0}
    before = identity(own, subject, "size")
    monkeypatch.setitem(MEASURES, "size", Measure(size, needs, version=2))
    assert identity(own, subject, "size") != before
    assert set(ALL) < MEASURES.keys()


def test_the_base_is_named_by_what_it_holds_and_its_examples(context):
    subject = context.subject("base", context.recipe.policy, 0)
    more = replace(context, recipe=context.recipe.changed({"shots": 2}))
    assert more.subject("base", context.recipe.policy, 0).plan_hash != subject.plan_hash
    assert subject.plan is None
    trained = context.subject("sft", context.recipe.policy, 0)
    assert trained.plan_hash == settings_hash(trained.plan)
    assert {arm.name for arm in CATALOGUE.entries if arm.step == BASE} == {
        "base",
        "base-shifted",
    }

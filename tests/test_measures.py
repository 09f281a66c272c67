"""The measures: over pairs that belong together, of what is handed in."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from toys import TOY_PROBLEMS, UPDATE, run_toy, toy_policy, toy_recipe

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.intervals import hierarchical_interval, seed_interval
from rlreason.experiments.catalogue import (
    CATALOGUE,
    PPO,
    Catalogue,
    Comparison,
    Table,
    Variant,
)
from rlreason.experiments.measures import (
    ACCURACY,
    AUC,
    MEASURES,
    SCORE,
    Context,
    measure,
    measure_training,
    paired,
    reward_and_accuracy,
)
from rlreason.experiments.records import Record, read_records, write_records
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.evaluate import evaluate_recipe
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.settings import settings_hash

COMPARISONS = CATALOGUE.comparisons

# Through everything, with the toy


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the toy and its runs lie."""
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def context(root):
    """Measures the toy, whose runs are made in this process."""
    credit = {"kind": "gae", "value": {"kind": "head"}}
    recipe = toy_recipe(
        root,
        ppo={"phases": 1, "rollouts": 8, "n": 2, "batch_size": 8, "lora": None}
        | {"credit": credit, "max_new_tokens": 24, "lr": 1e-2, "max_kl": None},
        expert_iteration={"k": 4, "rounds": 1, "finetune": UPDATE},
    )
    known = {}

    def obtain_all(plans):
        names = [folder_of(plan).path for plan in plans]
        for name, plan in zip(names, plans, strict=True):
            if name not in known:  # loading all of them again takes seconds
                known[name] = obtain(plan)
        return [known[name] for name in names]

    return Context(recipe, obtain_all)


def on_the_toy(context, root, function):
    return run_toy(lambda *_: function(), context.recipe, root / "runs")


@pytest.fixture(scope="module")
def measured(context, root):
    """The rows of the whole catalogue, and the phases of its PPO runs."""
    entries = COMPARISONS.values()
    return on_the_toy(
        context,
        root,
        lambda: (
            [row for entry in entries for row in measure(context, entry)],
            [row for entry in entries for row in measure_training(context, entry)],
        ),
    )


def test_every_comparison_is_measured_over_all_seeds(measured, context):
    rows, _ = measured
    assert list(dict.fromkeys(row.comparison for row in rows)) == list(COMPARISONS)
    shown = {
        name: [r.measured for r in rows if r.comparison == name]
        for name in ("grpo", "ppo-dense", "ppo-weak-orm", "rcrl-10", "orm")
    }
    assert shown == {
        "grpo": ["maj@1 against sft"],
        "ppo-dense": ["maj@1 against ppo"],
        "ppo-weak-orm": [
            "maj@1 against ppo",
            f"{SCORE} against sft",
            f"{ACCURACY} against sft",
            AUC,
        ],
        "rcrl-10": [
            f"maj@1 with {GOOD} against {BAD}",
            f"maj@1 with {GOOD} against rcrl",
        ],
        "orm": [
            "rerank@4 against maj@4",
            "rerank@4 against rerank@4 by the likelihood",
            AUC,
        ],
    }
    for row in rows:
        assert (row.seeds, row.problems) == (2, 6 if row.against else 0)
        assert 0 <= row.after <= 1
        assert row.seconds > 0
        after = COMPARISONS[row.comparison].after
        plan = plan_of(after.step, after.recipe(context.recipe), 0)
        assert row.settings == settings_hash(plan)
    assert len({row.settings for row in rows}) == len(COMPARISONS)


def test_the_phases_of_every_seed_are_as_the_runs_wrote_them(measured, context, root):
    _, phases = measured
    of_ppo = [n for n, entry in COMPARISONS.items() if entry.after.step == "ppo"]
    assert [(row.comparison, row.seed) for row in phases] == [
        (name, seed) for name in of_ppo for seed in (0, 1)
    ]
    second = phases[of_ppo.index("ppo") * 2 + 1]
    plan = plan_of("ppo", context.recipe, second.seed)
    (row,) = on_the_toy(
        context,
        root,
        lambda: [row for row in folder_of(plan).metrics if row["kind"] == "phase"],
    )
    assert second.settings == settings_hash(plan)
    for column in ("phase", "reward", "accuracy", "kl"):
        assert getattr(second, column) == row[column]


def test_an_experiment_is_one_entry(context, root, tmp_path):
    entry = Comparison(
        "ppo-long",
        "more phases",
        Variant("ppo-long", "ppo", {"ppo.phases": 2}),
        before=PPO,
    )
    mine = Catalogue((*CATALOGUE.tables, Table("mine", "my own", (entry,))))
    assert mine.lines()[-1].split() == ["ppo-long", "more", "phases"]
    path = tmp_path / "comparisons.csv"

    def record():
        (found,) = mine.find(["ppo-long"])
        write_records(Record, measure(context, found), path, catalogue=mine)
        return measure_training(context, found)

    phases = on_the_toy(context, root, record)
    (row,) = read_records(Record, path)
    assert (row.comparison, row.measured) == ("ppo-long", "maj@1 against ppo")
    assert [(row.seed, row.phase) for row in phases] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_what_a_reward_model_says_is_of_the_model_and_the_samples_of_each_seed(
    measured, context, root
):
    rows, _ = measured
    recipe = context.recipe
    weak = COMPARISONS["ppo-weak-orm"].after.recipe(recipe)
    problems = recipe.task.load("test")

    def by_hand(shift=0):
        """Each measure's differences; of the next seed's reward model if shifted."""
        tables = {"vote": [], "likelihood": [], SCORE: [], ACCURACY: []}
        for seed in (0, 1):
            sft = obtain(plan_of("sft", recipe, seed)).policy
            model = obtain(plan_of("orm", recipe, (seed + shift) % 2)).orm
            untrained = OutcomeRewardModel(sft, likelihood=True)
            report, other = (
                evaluate_recipe(recipe, sft, orm=orm, seed=seed)
                for orm in (model, untrained)
            )
            rerank = report.values("rerank@4")
            tables["vote"].append(rerank - report.values("maj@4"))
            tables["likelihood"].append(rerank - other.values("rerank@4"))
            model = obtain(plan_of("orm", weak, (seed + shift) % 2)).orm
            trained = obtain(plan_of("ppo", weak, seed)).policy
            before, after = (
                reward_and_accuracy(recipe, policy, model, problems, seed=seed)
                for policy in (sft, trained)
            )
            tables[SCORE].append(after[0] - before[0])
            tables[ACCURACY].append(after[1] - before[1])
        return {name: limits(np.stack(table)) for name, table in tables.items()}

    right, wrong = on_the_toy(context, root, lambda: (by_hand(), by_hand(1)))
    vote, likelihood, _ = (row for row in rows if row.comparison == "orm")
    _, by_score, by_key, _ = (row for row in rows if row.comparison == "ppo-weak-orm")
    for name, row in zip(right, (vote, likelihood, by_score, by_key), strict=True):
        assert numbers(row) == pytest.approx(right[name])
    assert numbers(by_score) != pytest.approx(wrong[SCORE])


def test_reranking_is_recorded_on_more_problems_than_a_chapter_takes(context, root):
    sizes = []

    def evaluate(recipe, *args, **options):
        sizes.append(recipe.evaluation.sampled_problems)
        return evaluate_recipe(recipe, *args, **options)

    for recorded, expected in ((None, 5), (3, 3)):
        sizes.clear()
        size = {
            "evaluation.sampled_problems": 5,
            "evaluation.recorded_problems": recorded,
        }
        own = replace(context, recipe=context.recipe.changed(size), evaluate=evaluate)
        rows = on_the_toy(
            own, root, lambda own=own: MEASURES["reranking"](own, COMPARISONS["orm"])
        )
        assert set(sizes) == {expected}
        assert {row.problems for row in rows} == {expected}


def test_scores_and_truth_are_means_over_the_answers_to_each_problem(context, root):
    recipe, policy, problems = context.recipe, toy_policy(), TOY_PROBLEMS[:3]
    orm = on_the_toy(context, root, lambda: obtain(plan_of("orm", recipe)).orm)
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


# With tables whose numbers are known

SEEDS, PROBLEMS = 3, 40
RNG = np.random.default_rng(0)
# Seeds differ much, and problems too; training then solves three problems more
BEFORE = (RNG.random((SEEDS, PROBLEMS)) < [[0.2], [0.5], [0.8]]).astype(float)
AFTER = BEFORE.copy()
for row in AFTER:
    row[np.flatnonzero(row == 0)[:3]] = 1.0


def numbers(row) -> tuple[float, float, float]:
    return row.difference, row.low, row.high


def limits(differences) -> tuple[float, float, float]:
    interval = hierarchical_interval(differences)
    return interval.mean, interval.low, interval.high


def test_a_row_is_of_pairs():
    row = paired(COMPARISONS["ppo"], "maj@1", "sft", BEFORE, AFTER)
    assert numbers(row) == limits(AFTER - BEFORE)
    assert (row.before, row.after) == (BEFORE.mean(), AFTER.mean())
    assert row.low > 0
    # Wrong: another seed's start, or problems in another order. The mean is the same
    for wrong in (BEFORE[::-1], BEFORE[:, ::-1]):
        other = paired(COMPARISONS["ppo"], "maj@1", "sft", wrong, AFTER)
        assert other.difference == pytest.approx(row.difference)
        assert other.low < 0 < row.low
    one = paired(COMPARISONS["ppo"], "maj@1", "sft", BEFORE[:1], AFTER[:1])
    assert (one.low, one.high) == (-np.inf, np.inf)  # one seed bounds nothing
    assert str(row) == (
        f"ppo: maj@1 against sft {row.before:.1%} -> {row.after:.1%}, +7.5 "
        f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}], 3 seeds"
    )


@pytest.fixture
def scripted(tmp_path):
    """A context of three seeds whose policies are their plans, and what was asked."""
    asked = []
    recipe = toy_recipe(tmp_path, seeds=SEEDS)

    def obtain_all(plans):
        return [
            SimpleNamespace(
                policy=plan, held_out=[{"auc": 0.1}, {"auc": 0.7 + 0.1 * seed}]
            )
            for seed, plan in enumerate(plans)
        ]

    def evaluate(given, plan, *, greedy_only, label, prompted):
        assert given == recipe
        asked.append((plan, label, prompted))
        changed = plan.step != "sft" and plan != plan_of(
            plan.step, recipe, seed_of(plan)
        )
        table = AFTER if changed or label == GOOD else BEFORE
        return SimpleNamespace(values=lambda name: table[seed_of(plan)])

    return Context(recipe, obtain_all, evaluate), asked


def seed_of(plan) -> int:
    return plan.algorithm.seed


@pytest.mark.parametrize(
    ("name", "before", "label"),
    [
        ("rloo", "sft", None),
        ("ppo-dense", "ppo", None),
        ("ppo-best-half", "ppo", None),
        ("expert-iteration-orm", "expert-iteration", None),
    ],
)
def test_greedy_compares_the_same_seed_of_the_start_or_of_what_is_varied(
    name, before, label, scripted
):
    context, asked = scripted
    (row,) = MEASURES["greedy"](context, COMPARISONS[name])
    assert (row.metric, row.against) == ("maj@1", before)
    assert numbers(row) == limits(AFTER - BEFORE)
    after = COMPARISONS[name].after
    expected = [
        *(plan_of(before, context.recipe, s) for s in range(SEEDS)),
        *(plan_of(after.step, after.recipe(context.recipe), s) for s in range(SEEDS)),
    ]
    assert asked == [(plan, label, False) for plan in expected]


@pytest.mark.parametrize(("step", "kept"), [("ppo", True), ("expert-iteration", False)])
def test_from_the_base_the_start_and_what_learned_with_the_prompt_are_prompted(
    step, kept, scripted
):
    context, asked = scripted

    def evaluate(given, policy, *, prompted, **options):
        asked.append((policy, prompted))
        table = AFTER if hasattr(policy, "algorithm") else BEFORE
        return SimpleNamespace(values=lambda name: table[0])

    entry = Comparison(
        "mine", "from the base", Variant("mine", step, {"start": "base"})
    )
    (row,) = MEASURES["greedy"](replace(context, evaluate=evaluate), entry)
    assert row.against == "base"
    assert [prompted for _, prompted in asked] == [True] * SEEDS + [kept] * SEEDS
    assert [policy.start for policy, _ in asked[SEEDS:]] == [None] * SEEDS


def test_labels_are_compared_within_a_policy_and_variants_with_good_alone(scripted):
    context, asked = scripted
    (gap,) = MEASURES["labels"](context, COMPARISONS["rcrl"])
    assert (gap.metric, gap.against) == (f"maj@1 with {GOOD}", BAD)
    assert numbers(gap) == limits(AFTER - BEFORE)
    plans = [plan_of("rcrl", context.recipe, seed) for seed in range(SEEDS)]
    assert asked == [(plan, label, False) for label in (BAD, GOOD) for plan in plans]
    asked.clear()
    (against,) = MEASURES["greedy"](context, COMPARISONS["rcrl-10"])
    assert (against.metric, against.against) == (f"maj@1 with {GOOD}", "rcrl")
    assert {label for _, label, _ in asked} == {GOOD}


def test_an_auc_is_of_the_last_epoch_and_compared_with_nothing(scripted):
    context, _ = scripted
    (row,) = MEASURES["auc"](context, COMPARISONS["orm"])
    expected = seed_interval([0.7, 0.8, 0.9])
    assert (row.before, row.difference, row.against) == (None, None, "")
    found, known = row.interval, expected
    assert (found.mean, found.low, found.high) == pytest.approx(
        (known.mean, known.low, known.high)
    )
    assert str(row) == f"orm: {AUC} {expected}"

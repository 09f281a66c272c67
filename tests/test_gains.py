"""The table of gains: a row an algorithm, over pairs that belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from toys import TOY_PROBLEMS, UPDATE, run_toy, toy_policy, toy_recipe

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.intervals import hierarchical_interval, seed_interval
from rlreason.experiments import gains
from rlreason.experiments.gains import (
    ALGORITHMS,
    JUDGED,
    LABELLED,
    OF_PPO,
    format_gain,
    gains_table,
    measure_gains,
    read_table,
    write_gains,
)
from rlreason.policy.sampler import sample
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.steps import TRAIN

OF_JUDGE = (
    "score by its judge, against SFT",
    "right, of the same answers, against SFT",
    "AUC on held-out questions",
)

# Through everything, with the toy


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of all algorithms, what was reported, and the root of the runs."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = toy_recipe(
        folder,
        ppo={"phases": 1, "rollouts": 8, "n": 2, "batch_size": 8, "lora": None}
        | {"credit": {"kind": "gae", "value": {"kind": "head"}}, "max_new_tokens": 24},
        expert_iteration={"k": 4, "rounds": 1, "finetune": UPDATE},
    )
    lines: list[str] = []

    def here(recipe, algorithm, seeds):
        """Train in this process: others take seconds to start."""
        return [TRAIN[algorithm](recipe, seed) for seed in seeds]

    def measure(recipe, _):
        return measure_gains(recipe, report=lines.append)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gains, "train_seeds", here)
        rows = run_toy(measure, recipe, folder / "runs")
    return rows, lines, folder / "runs"


def test_every_algorithm_has_its_row(measured):
    rows, lines, root = measured
    assert [(row.algorithm, row.metric) for row in rows] == [
        ("expert-iteration", "maj@1"),
        ("expert-iteration-orm", "maj@1 against expert-iteration"),
        ("ppo", "maj@1"),
        ("reinforce", "maj@1"),
        ("rloo", "maj@1"),
        ("grpo", "maj@1"),
        *(
            (name, metric)
            for name in OF_PPO
            if name[:3] == "ppo"
            for metric in ("maj@1 against ppo", *(OF_JUDGE if name in JUDGED else ()))
        ),
        ("rcrl", "maj@1 of [GOOD] against [BAD]"),
        *(
            (name, f"maj@1 of [GOOD] against {other}")
            for name in ("rcrl-orm", "rcrl-10", "rcrl-100")
            for other in ("[BAD]", "rcrl")
        ),
        ("orm", "rerank@4 against maj@4"),
        ("orm", "rerank@4 against the likelihood's"),
        ("orm", "AUC on held-out questions"),
    ]
    assert {row.algorithm for row in rows} == set(ALGORITHMS)
    for row, line in zip(rows, lines, strict=True):
        before = gains.CHANCE if row.before is None else row.before
        assert row.gain == pytest.approx(row.after - before)
        assert row.low <= row.gain <= row.high
        assert 0 <= before <= 1
        assert 0 <= row.after <= 1
        assert (row.seeds, row.problems) == (2, 0 if row.before is None else 6)
        assert row.minutes > 0
        assert line == format_gain(row)
    # Each was trained with both seeds, and the row names the run of the first
    kinds = [
        path.name.split("-")[0] for path in root.iterdir() if "answers" not in path.name
    ]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {
        "sft": 2,
        "expert": 2 * 2,
        "ppo": 2 * (1 + len(OF_PPO)),
        "rcrl": 2 * 4,
        "orm": 2 * 2,  # the one that knows little, and one for all others
    }
    hashes = {path.name.rsplit("-", 1)[-1] for path in root.iterdir()}
    assert {row.settings for row in rows} <= hashes
    assert len({row.settings for row in rows}) == len(ALGORITHMS)


def test_rows_are_written_replaced_and_read(measured, tmp_path):
    rows, _, _ = measured
    path = tmp_path / "results" / "tiny" / "gains.csv"
    assert read_table(path) == []
    write_gains(rows[:2], path)
    better = replace(rows[1], after=0.75, seeds=9)
    write_gains([better, *rows[2:]], path)
    read = read_table(path)
    assert [row["algorithm"] for row in read] == [row.algorithm for row in rows]
    assert (read[1]["after"], read[1]["seeds"]) == ("0.7500", "9")
    assert read[0]["gain"] == f"{rows[0].gain:.4f}"
    assert read[-1]["before"] == ""
    assert [file.name for file in path.parent.iterdir()] == ["gains.csv"]  # no draft
    again = path.read_bytes()
    write_gains([better, *rows[2:]], path)
    assert path.read_bytes() == again
    assert b"\r" not in again
    # Measured anew with another K: the rows of the old one would be out of date
    other = replace(rows[-3], metric="rerank@9 against maj@9")
    write_gains([other, rows[-1]], path)
    found = {row["metric"] for row in read_table(path) if row["algorithm"] == "orm"}
    assert found == {other.metric, rows[-1].metric}


def test_the_phases_of_every_seed_are_as_the_runs_wrote_them(scripted, monkeypatch):
    recipe, _ = scripted
    train = gains.train_seeds

    def with_phases(given, algorithm, seeds):
        assert given == gains.variant_of(recipe, "ppo-sparse-orm")
        runs = train(given, algorithm, seeds)
        for seed, run in enumerate(runs):
            kl = {"kl": 0.25} if seed else {}
            run.phases = [
                {"phase": number, "reward": seed + 0.5, "accuracy": 1 / 3} | kl
                for number in (1, 2)
            ]
        return runs

    monkeypatch.setattr(gains, "train_seeds", with_phases)
    rows = gains.measure_phases(recipe, "ppo-sparse-orm")
    assert [(row["seed"], row["phase"]) for row in rows] == [
        (seed, phase) for seed in range(SEEDS) for phase in (1, 2)
    ]
    assert [row["reward"] for row in rows[::2]] == ["0.5000", "1.5000", "2.5000"]
    assert [row["kl"] for row in rows[::2]] == ["", "0.2500", "0.2500"]
    assert {row["accuracy"] for row in rows} == {"0.3333"}
    assert rows[0]["settings"] == "abc0"
    for name in ("expert-iteration", "rcrl", "orm", "rcrl-10"):
        assert gains.measure_phases(recipe, name) == []


def test_phases_are_kept_of_other_algorithms_and_replaced_of_the_same(tmp_path):
    path = tmp_path / "results" / "phases.csv"
    old = [{"algorithm": "ppo", "phase": n} for n in (1, 2, 3)]
    gains.write_phases([{"algorithm": "rloo", "phase": 1}], path)
    gains.write_phases(old, path)
    gains.write_phases(old[:2], path)
    gains.write_phases([], path)
    read = [(row["algorithm"], row["phase"]) for row in read_table(path)]
    assert read == [("ppo", "1"), ("ppo", "2"), ("rloo", "1")]


def test_the_table_of_a_profile_lies_with_the_results_of_the_book():
    assert gains.gains_path("tiny").parts[-4:] == (
        "book",
        "results",
        "tiny",
        "gains.csv",
    )
    assert gains.gains_path("mine/big.yaml").parts[-2:] == ("big", "gains.csv")


def test_an_unknown_algorithm_is_an_error_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"no algorithm 'sft'; there are expert-iter"):
        measure_gains(toy_recipe(tmp_path), ["ppo", "sft"])
    with pytest.raises(ValueError, match="no algorithm 'ppo-densest'"):
        gains.variant_of(toy_recipe(tmp_path), "ppo-densest")
    assert not (tmp_path / "runs").exists()


# Which reports are compared, with reports whose numbers are known

SEEDS, PROBLEMS = 3, 40
RNG = np.random.default_rng(0)
# Seeds differ much, and problems too; training then solves three problems more
BEFORE = (RNG.random((SEEDS, PROBLEMS)) < [[0.2], [0.5], [0.8]]).astype(float)
AFTER = BEFORE.copy()
for row in AFTER:
    row[np.flatnonzero(row == 0)[:3]] = 1.0


def numbers(row) -> tuple[float, float, float]:
    return row.gain, row.low, row.high


def limits(differences) -> tuple[float, float, float]:
    interval = hierarchical_interval(differences)
    return interval.mean, interval.low, interval.high


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A recipe of three seeds; policies are names, reports are rows of the tables."""
    asked = []

    def trained(policy: tuple, seed: int) -> SimpleNamespace:
        return SimpleNamespace(
            policy=policy,
            orm=("orm", seed),
            seconds=60.0 * (seed + 1),
            run=SimpleNamespace(path=Path(f"{policy[0]}-abc{seed}")),
            held_out=[{"auc": 0.1}, {"auc": 0.7 + 0.1 * seed}],
        )

    def evaluate(recipe, policy, *, greedy_only=False, seed=0, label=None, orm=None):
        asked.append((policy, greedy_only, seed, label, orm))
        kind, number = policy
        first, second = BEFORE[number], AFTER[number]
        values = {"maj@1": first if kind == "sft" or label == BAD else second}
        if orm is not None:
            by = {"orm": second, "likelihood": BEFORE[number][::-1]}
            values = {"maj@4": first, "rerank@4": by[orm[0]]}
        return SimpleNamespace(k=4, values=values.__getitem__)

    monkeypatch.setattr(
        gains,
        "train_seeds",
        lambda recipe, name, seeds: [trained((name, seed), seed) for seed in seeds],
    )
    monkeypatch.setattr(
        gains, "train_sft", lambda recipe, seed: trained(("sft", seed), seed)
    )
    monkeypatch.setattr(gains, "evaluate_recipe", evaluate)
    monkeypatch.setattr(
        gains, "likelihood_judge", lambda recipe, seed: ("likelihood", seed)
    )
    return toy_recipe(tmp_path, seeds=SEEDS), asked


@pytest.mark.parametrize("name", ["expert-iteration", "ppo", "rloo"])
def test_a_policy_is_compared_with_the_sft_of_its_own_seed(name, scripted):
    recipe, asked = scripted
    (row,) = measure_gains(recipe, [name], report=lambda _: None)
    assert numbers(row) == limits(AFTER - BEFORE)
    assert (row.before, row.after) == (BEFORE.mean(), AFTER.mean())
    assert row.low > 0
    assert row.minutes == 2.0  # the mean of 1, 2 and 3
    assert all(greedy and label is None for _, greedy, _, label, _ in asked)
    # Wrong: another seed's start, or problems in another order. The mean is the same
    swapped = limits(AFTER - BEFORE[::-1])
    unpaired = limits(AFTER - BEFORE[:, ::-1])
    for wrong in (swapped, unpaired):
        assert wrong[0] == pytest.approx(row.gain)
        assert wrong[1] < 0 < row.low


def test_a_baseline_is_the_recipe_with_another_credit_alone(scripted, monkeypatch):
    recipe, _ = scripted
    seen = {}
    train = gains.train_seeds

    def note(recipe, algorithm, seeds):
        seen[name] = recipe, algorithm
        return train(recipe, algorithm, seeds)

    monkeypatch.setattr(gains, "train_seeds", note)
    for name in ("ppo", *gains.BASELINES):
        measure_gains(recipe, [name], report=lambda _: None)
        changed, algorithm = seen[name]
        assert algorithm == "ppo"
        assert changed.ppo.credit.kind == ("gae" if name == "ppo" else name)
        credit = {"credit": recipe.ppo.credit}
        ppo = changed.ppo.model_copy(update=credit)
        assert changed.model_copy(update={"ppo": ppo}) == recipe


@pytest.mark.parametrize(
    ("name", "algorithm", "label"),
    [
        ("ppo-dense", "ppo", None),
        ("ppo-best-half", "ppo", None),
        ("expert-iteration-orm", "expert-iteration", None),
        ("rcrl-orm", "rcrl", GOOD),
        ("rcrl-100", "rcrl", GOOD),
    ],
)
def test_a_variant_is_compared_with_what_it_varies(
    name, algorithm, label, scripted, monkeypatch
):
    recipe, asked = scripted
    train, trained = gains.train_seeds, []

    def note(given, algorithm, seeds):
        trained.append(algorithm)
        # What the toy knows by the name of SFT does worse
        return train(given, "sft" if given == recipe else algorithm, seeds)

    monkeypatch.setattr(gains, "train_seeds", note)
    row = measure_gains(recipe, [name], report=lambda _: None)[-1]
    assert set(trained) == {algorithm}
    assert numbers(row) == limits(AFTER - BEFORE)
    assert row.metric == " ".join(
        ["maj@1", *(["of", label] if label else []), "against", algorithm]
    )
    runs = ("sft", algorithm)
    assert [(policy, given) for policy, _, _, given, _ in asked[-2 * SEEDS :]] == [
        ((run, seed), label) for run in runs for seed in range(SEEDS)
    ]


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_paid_and_what_is_right_are_of_the_same_answers(
    name, scripted, monkeypatch
):
    recipe, _ = scripted
    made = []

    def judge(changed, seed):
        assert changed == gains.variant_of(recipe, name)
        return SimpleNamespace(orm=("judge", seed), held_out=[{"auc": 0.5 + seed / 10}])

    def found(given, policy, judge, problems, *, seed):
        assert given == recipe
        assert judge == ("judge", seed)  # that of its own seed
        assert problems == recipe.task.load("test", recipe.evaluation.problems)
        made.append((policy, seed))
        tables = (BEFORE / 2, AFTER) if policy[0] == "sft" else (AFTER / 2, BEFORE)
        return tuple(table[seed] for table in tables)

    monkeypatch.setattr(gains, "train_reward_model", judge)
    monkeypatch.setattr(gains, "paid_and_right", found)
    rows = measure_gains(recipe, [name], report=lambda _: None)
    assert [row.metric for row in rows] == ["maj@1 against ppo", *OF_JUDGE]
    _, paid, true, auc = rows
    assert auc.after == pytest.approx(0.6)
    assert made == [
        ((policy, seed), seed) for policy in ("sft", "ppo") for seed in range(SEEDS)
    ]
    # It rises, and what it should stand for falls
    assert numbers(paid) == limits((AFTER - BEFORE) / 2)
    assert numbers(true) == limits(BEFORE - AFTER)
    assert (paid.before, paid.after) == (BEFORE.mean() / 2, AFTER.mean() / 2)
    assert paid.low > 0 > true.high


def test_scores_and_truth_are_means_over_the_answers_to_each_problem(
    tmp_path, monkeypatch
):
    recipe = toy_recipe(tmp_path)
    policy, problems = toy_policy(), TOY_PROBLEMS[:3]
    judged = []

    def lengths(judge, rollouts):
        assert judge == "a judge"
        judged.extend(rollouts)
        return [len(r.tokens) for r in rollouts]

    monkeypatch.setattr(gains, "score", lengths)
    scores, right = gains.paid_and_right(
        recipe, policy, "a judge", problems, k=4, seed=5
    )
    expected = sample(
        policy,
        problems,
        k=4,
        temperature=recipe.ppo.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=5,
    )
    assert judged == expected
    groups = [[r for r in expected if r.problem_id == p.id] for p in problems]
    assert scores == pytest.approx([fmean(len(r.tokens) for r in g) for g in groups])
    assert right == pytest.approx([fmean(sparse_rewards(g, problems)) for g in groups])
    assert 0 < right.mean() < 1


@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_another_kind_show_their_gap_first(name, scripted, monkeypatch):
    recipe, _ = scripted
    train, varied = gains.train_seeds, []

    def note(given, algorithm, seeds):
        varied.append(given != recipe)
        return train(given, algorithm, seeds)

    monkeypatch.setattr(gains, "train_seeds", note)
    gap, against = measure_gains(recipe, [name], report=lambda _: None)
    assert gap.metric == "maj@1 of [GOOD] against [BAD]"
    assert numbers(gap) == limits(AFTER - BEFORE)
    assert (gap.algorithm, against.algorithm) == (name, name)
    assert varied == [True, False, True]  # the gap, and then both


def test_good_is_compared_with_bad_of_the_same_policy(scripted):
    recipe, asked = scripted
    (row,) = measure_gains(recipe, ["rcrl"], report=lambda _: None)
    assert numbers(row) == limits(AFTER - BEFORE)
    assert [(policy, label) for policy, _, _, label, _ in asked] == [
        (("rcrl", seed), label) for label in (BAD, GOOD) for seed in range(SEEDS)
    ]


def test_reranking_is_compared_with_the_vote_of_the_same_samples(scripted):
    recipe, asked = scripted
    rerank, likelihood, auc = measure_gains(recipe, ["orm"], report=lambda _: None)
    assert numbers(rerank) == limits(AFTER - BEFORE)
    assert rerank.metric == "rerank@4 against maj@4"
    # What training has added to the judge that it started from
    assert numbers(likelihood) == limits(AFTER - BEFORE[:, ::-1])
    assert likelihood.metric == "rerank@4 against the likelihood's"
    # One report a seed and judge, of SFT's samples, scored by the judge of that seed
    assert asked == [
        (("sft", seed), False, seed, None, (judge, seed))
        for judge in ("orm", "likelihood")
        for seed in range(SEEDS)
    ]
    expected = seed_interval([0.7, 0.8, 0.9])
    assert auc.after == expected.mean == pytest.approx(0.8)
    assert auc.gain == pytest.approx(0.3)
    assert auc.low == pytest.approx(expected.low - 0.5)
    assert auc.high == pytest.approx(expected.high - 0.5)
    shown = f"AUC on held-out questions 0.800 [{expected.low:.3f}, {expected.high:.3f}]"
    assert format_gain(auc) == f"orm: {shown}"


def test_reranking_is_recorded_on_more_problems_than_a_chapter_takes(
    scripted, monkeypatch
):
    recipe, _ = scripted
    sizes, evaluate = [], gains.evaluate_recipe

    def note(recipe, *args, **options):
        sizes.append(recipe.evaluation.sampled_problems)
        return evaluate(recipe, *args, **options)

    monkeypatch.setattr(gains, "evaluate_recipe", note)
    for recorded, expected in ((None, 6), (9, 9)):
        sizes.clear()
        size = {"sampled_problems": 6, "recorded_problems": recorded}
        chosen = recipe.evaluation.model_copy(update=size)
        one = recipe.model_copy(update={"evaluation": chosen, "seeds": 1})
        measure_gains(one, ["orm"], report=lambda _: None)
        assert sizes == [expected, expected]


def test_one_seed_bounds_nothing(scripted, tmp_path):
    recipe, _ = scripted
    one = recipe.model_copy(update={"seeds": 1})
    rows = measure_gains(one, ["ppo", "orm"], report=lambda _: None)
    assert all((row.low, row.high) == (-np.inf, np.inf) for row in rows)
    write_gains(rows, tmp_path / "gains.csv")
    assert {row["high"] for row in read_table(tmp_path / "gains.csv")} == {"inf"}


def test_a_line_says_what_was_gained(scripted):
    recipe, _ = scripted
    (row,) = measure_gains(recipe, ["ppo"], report=lambda _: None)
    interval = f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
    assert format_gain(row) == (
        f"ppo: maj@1 {row.before:.1%} -> {row.after:.1%}, +7.5 points {interval}, "
        "3 seeds, 2.0 minutes a seed"
    )


def test_a_chapter_shows_what_is_recorded_beside_its_own_run(
    scripted, tmp_path, monkeypatch
):
    recipe, _ = scripted
    path = tmp_path / "gains.csv"
    monkeypatch.setattr(gains, "gains_path", lambda profile: path)
    same, other = (SimpleNamespace(path=Path(f"x-{h}")) for h in ("abc0", "abc9"))
    missing = gains_table("tiny", ["ppo"], same)
    assert missing.startswith("Nothing is recorded for profile tiny yet")

    rows = measure_gains(recipe, ["ppo", "rloo", "orm"], report=lambda _: None)
    worse = replace(rows[1], gain=-0.1, low=-0.2, high=-0.05)
    open_ = replace(rows[2], low=-0.01)
    write_gains([rows[0], worse, open_, *rows[3:]], path)
    shown = gains_table("tiny", ["ppo", "rloo"], same)
    # What must not be torn apart has spaces that do not break
    assert "-10.0\xa0[-20.0,\xa0-5.0] | a\xa0loss |" in shown
    shown = shown.replace("\xa0", " ")
    _, _, first, second = shown.split("\n\n")[0].splitlines()
    gained = f"+7.5 [{100 * rows[0].low:+.1f}, {100 * rows[0].high:+.1f}]"
    accuracies = f"{BEFORE.mean():.1%} | {AFTER.mean():.1%}"
    assert first == f"| `ppo` | maj@1 | {accuracies} | {gained} | a gain |"
    assert second.startswith("| `rloo` | maj@1 |")
    assert shown.endswith(
        "\n\n3 seeds, 40 test problems; gains of percentages in points. "
        f"Recorded at profile tiny, {rows[0].date}."
    )
    assert "orm" not in shown

    _, _, vote, likelihood, auc = gains_table("tiny", ["orm"], other).splitlines()[:5]
    assert vote.startswith("| `orm` | rerank")
    assert vote.endswith("| inconclusive |")
    assert likelihood.startswith("|  | rerank")  # named once
    # An AUC is no share, and what it has to beat is a guess
    assert "| 0.50 | 0.80 | +0.30\xa0[" in auc
    assert "with other settings than the run above" in gains_table(
        "tiny", ["orm"], other
    )

"""What rows say: of pairs that belong together, with provenance on the page."""

from __future__ import annotations

import numpy as np
import pytest
from test_rows import ROW
from toys import toy_profile, toy_recipe

from rlreason.evaluation.intervals import Interval, hierarchical_interval, seed_interval
from rlreason.experiments import rows as store
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.measures import Context, identity
from rlreason.experiments.records import (
    ACCURACY,
    AUC,
    BAD,
    BEFORE,
    METRICS,
    SCORE,
    Cell,
    Records,
    contrasts,
    in_points,
    load_records,
    metric_of,
    recorded,
    told,
    unbroken,
    validation_curves,
    verdict,
)
from rlreason.experiments.rows import RecordError, Row, Spent, rows_path, write_rows
from rlreason.experiments.tables import measured_tables, recorded_table, table_page
from rlreason.runs.plans import folder_of, plan_of
from rlreason.runs.profiles import load_recipe
from rlreason.settings import settings_hash

SEEDS, PROBLEMS = 3, 40
RNG = np.random.default_rng(0)
# Seeds differ much, and problems too; training then solves three problems more
BEFORE_ = (RNG.random((SEEDS, PROBLEMS)) < [[0.2], [0.5], [0.8]]).astype(float)
AFTER = BEFORE_.copy()
for table in AFTER:
    table[np.flatnonzero(table == 0)[:3]] = 1.0


def rows_of(arm: str, measure: str, values: list[dict], **fields) -> list[Row]:
    """A row a seed."""
    named = {"arm": arm, "measure": measure, **fields}
    return [
        ROW.model_copy(update={**named, "seed": seed, "values": each})
        for seed, each in enumerate(values)
    ]


def greedy(arm: str, right: np.ndarray, **fields) -> list[Row]:
    texts = ["".join(str(int(x)) for x in row) for row in right]
    return rows_of(arm, "greedy", [{"right": text} for text in texts], **fields)


def test_the_first_seed_is_trained_and_what_is_not_recorded_of_the_others():
    rows = [*greedy("sft", AFTER), *greedy("ppo", AFTER)[:2]]
    records = Records(rows, "nano")
    sft, ppo = ("sft", "greedy"), ("ppo", "greedy")
    assert records.to_train(range(3), sft) == [0]
    assert records.to_train(range(3), sft, ppo) == [0, 2]
    assert records.to_train(range(2, 5), sft) == [2, 3, 4]
    assert records.to_train(range(2), ("sft", "curve")) == [0, 1]
    assert Records(rows, "nano-xs").to_train(range(2), sft) == [0, 1]


def limits(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


SAMPLES = {
    "k": 4,
    "right": [0, 1, 4],
    "vote": [0, 0.5, 1],
    "rerank": [0, 1, 1],
    "distinct": [0, 1, 3],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows into the profile tiny, of which nothing is recorded before."""
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(store, "results_folder", lambda name: tmp_path / "results")

    def write(*rows: list[Row]) -> Records:
        write_rows([row for each in rows for row in each], rows_path("tiny"))
        return load_records("tiny")

    return write


def test_metrics_follow_from_what_a_row_holds():
    records = Records(rows_of("sft", "samples", [SAMPLES]), "nano")
    found = {
        name: records.values(Cell("sft", name))[0].tolist()
        for name in ("maj@K", "rerank@K", "pass@K", "accuracy", "distinct", "pass@2")
    }
    assert found == {
        "maj@K": [0, 0.5, 1],
        "rerank@K": [0, 1, 1],
        "pass@K": [0, 1, 1],
        "accuracy": [0, 0.25, 1],
        "distinct": [0, 1, 3],
        "pass@2": [0, 0.5, 1],  # 3 of the 6 pairs hold the right one
    }
    assert records.named("maj@K") == "maj@4"
    assert Records([], "nano").named("maj@K") == "maj@K"
    for wrong in ("maj@1 with", "pass@", "pass@x", "rerank@3"):
        with pytest.raises(RecordError, match="no metric"):
            metric_of(wrong)


def test_a_difference_is_of_pairs_of_one_seed_and_problem():
    rows = [*greedy("ppo", AFTER), *greedy("sft", BEFORE_)]
    records = Records(rows, "nano")
    found = records.difference(Cell("ppo"), Cell("sft"))
    assert limits(found) == limits(hierarchical_interval(AFTER - BEFORE_))
    assert found.low > 0
    # Wrong: another seed's start, or problems in another order. The mean is the same
    for wrong in (BEFORE_[::-1], BEFORE_[:, ::-1]):
        other = Records([*greedy("ppo", AFTER), *greedy("sft", wrong)], "nano")
        unpaired = other.difference(Cell("ppo"), Cell("sft"))
        assert unpaired.mean == pytest.approx(found.mean)
        assert unpaired.low < 0
    # Seeds that one side lacks are in no pair; one seed bounds nothing
    part = Records([*rows[:3], rows[4]], "nano")
    one = part.difference(Cell("ppo"), Cell("sft"))
    assert limits(one)[1:] == (-np.inf, np.inf)
    assert one.mean == pytest.approx((AFTER - BEFORE_)[1].mean())
    assert part.difference(Cell("ppo"), Cell("grpo")) is None
    # Sizes are apart
    assert records.value(Cell("ppo", size="nano-xs")) is None


def test_what_was_asked_otherwise_is_not_compared():
    rows = [*greedy("ppo", AFTER), *greedy("sft", BEFORE_[:, :30])]
    with pytest.raises(
        RecordError, match="ppo is recorded on 40 problems and sft on 30"
    ):
        Records(rows, "nano").difference(Cell("ppo"), Cell("sft"))


@pytest.mark.parametrize(("problems", "half"), [(8, 0.375), (300, 0.01)])
def test_equal_values_leave_room_for_what_so_few_problems_cannot_show(problems, half):
    table = np.ones((3, problems))
    records = Records(greedy("sft", table), "nano")
    found = records.value(Cell("sft"))
    assert limits(found) == (1.0, 1 - half, 1.0)  # no share is above 1
    below = records.difference(Cell("sft"), Cell("sft"))
    assert limits(below) == (0.0, -half, half)
    wrong = hierarchical_interval(table)  # as if nothing could ever differ
    assert wrong.low == wrong.high


def test_the_interval_of_a_share_ends_at_0_and_1_and_that_of_a_count_does_not():
    areas = [{"auc": x} for x in (0.99, 0.999, 0.8)]
    counts = [SAMPLES | {"distinct": [x] * 3} for x in (1, 3, 9)]
    rows = [*rows_of("orm", "auc", areas), *rows_of("sft", "samples", counts)]
    records = Records(rows, "nano")
    mean, low, high = limits(records.value(Cell("orm", AUC)))
    assert (low, high) == (seed_interval([0.99, 0.999, 0.8]).low, 1.0)
    assert low < mean < seed_interval([0.99, 0.999, 0.8]).mean + 1e-9
    assert records.value(Cell("sft", "distinct")).high > 1
    assert limits(Records(rows[:1], "nano").value(Cell("orm", AUC)))[1] == -np.inf


def test_rows_of_an_earlier_recipe_are_not_averaged_with_those_of_the_present_one(
    tmp_path, monkeypatch, recwarn
):
    monkeypatch.setattr(store, "results_folder", lambda name: tmp_path / "results")

    def record(profile, arm: str, *seeds: int) -> None:
        context = Context(load_recipe(profile))
        for seed in seeds:
            subject = context.subject(arm, context.recipe.policy, seed)
            *_, plan, how = identity(context, subject, "greedy")
            hashes = {"plan": plan, "how": how}
            of = greedy(arm, AFTER[:1], size="base", **hashes)[0]
            write_rows([of.model_copy(update={"seed": seed})], rows_path(profile))

    def seeds(profile, arm: str) -> list[int]:
        return [*load_records(profile).of(arm, "greedy")]

    profile = toy_profile(tmp_path)
    record(profile, "sft", 0, 1, 2)
    record(profile, "rloo", 0)
    assert seeds(profile, "sft") == [0, 1, 2]
    profile = toy_profile(tmp_path, max_new_tokens=20)
    # Of one recipe still, if of an earlier one
    assert seeds(profile, "sft") == [0, 1, 2]
    assert not recwarn
    record(profile, "sft", 0)
    with pytest.warns(
        UserWarning,
        match=r"left out: rloo base greedy of seed 0; sft base greedy of seed 1, 2\. "
        "Anew: `rlreason record rloo sft --profile .*toy.yaml`",
    ):
        assert seeds(profile, "sft") == [0]
    with pytest.warns(UserWarning, match="rloo base greedy"):
        assert seeds(profile, "rloo") == []
    record(profile, "sft", 1, 2)
    record(profile, "rloo", 0)
    assert seeds(profile, "sft") == [0, 1, 2]


@pytest.mark.parametrize("values", [{}, {"right": None}, {"right": "01x"}])
def test_a_row_without_what_its_measure_has_is_one_error(values):
    records = Records(rows_of("sft", "greedy", [values]), "nano")
    with pytest.raises(RecordError, match="the row sft nano 0 greedy is damaged"):
        records.value(Cell("sft"))


@pytest.mark.parametrize("name", CATALOGUE.arms)
def test_every_measure_of_an_arm_is_compared_with_what_belongs_to_it(name):
    arm = CATALOGUE.arms[name]
    for metric, other, against in contrasts(arm):
        assert METRICS[metric][0] in arm.measures
        if other:
            assert metric_of(other.metric)[0] in CATALOGUE.arms[other.arm].measures
            assert other.arm in (arm.name, arm.compared)
            assert against


def test_arms_are_shown_beside_what_they_are_compared_with(write):
    scores = {"score_before": [0.25, 0.5], "score_after": [0.5, 1]}
    right = {"right_before": "11", "right_after": "01"}
    write(
        greedy("sft", BEFORE_),
        greedy("ppo", AFTER),
        greedy("ppo-weak-orm", BEFORE_),
        rows_of("ppo-weak-orm", "earned", [scores | right] * 3),
        rows_of("ppo-weak-orm", "auc", [{"auc": 0.7}, {"auc": 0.8}, {"auc": 0.9}]),
        greedy("rcrl", AFTER),
        rows_of("rcrl", "labels", [{"bad": "1" * PROBLEMS}] * 3),
        rows_of(
            "orm",
            "reranking",
            [{"k": 4, "vote": [0, 1], "rerank": [1, 1], "likelihood": [1, 0]}] * 3,
        ),
    )
    rows = recorded("tiny", "credit", "ppo-weak-orm", "rcrl", "reranking")
    assert [(r.comparison, r.measured) for r in rows] == [
        ("ppo", "maj@1 against sft"),
        ("ppo-weak-orm", "maj@1 against ppo"),
        ("ppo-weak-orm", f"{SCORE} against sft"),
        ("ppo-weak-orm", f"{ACCURACY} against sft"),
        ("ppo-weak-orm", AUC),
        ("rcrl", "maj@1 against [BAD]"),
        ("rcrl", "maj@1 against sft"),
        ("orm", "rerank@4 of SFT against maj@4 of SFT"),
        ("orm", "rerank@4 of SFT against rerank@4 by the likelihood"),
    ]
    by_name = {(r.comparison, r.measured): r for r in rows}
    ppo = by_name["ppo", "maj@1 against sft"]
    assert (ppo.before, ppo.after) == (BEFORE_.mean(), AFTER.mean())
    assert limits(ppo.interval) == limits(hierarchical_interval(AFTER - BEFORE_))
    lost = by_name["ppo-weak-orm", "maj@1 against ppo"]
    assert lost.interval.mean == -ppo.interval.mean
    score, accuracy = (
        by_name["ppo-weak-orm", f"{name} against sft"] for name in (SCORE, ACCURACY)
    )
    assert (score.interval.mean, accuracy.interval.mean) == (0.375, -0.5)
    area = by_name["ppo-weak-orm", AUC]
    low = seed_interval([0.7, 0.8, 0.9]).low
    assert limits(area.interval)[1:] == (low, 1.0)
    assert (area.before, area.problems) == (None, 0)
    assert [row.interval.mean for row in rows[-2:]] == [0.5, 0.5]
    assert BAD in METRICS
    assert SCORE + BEFORE in METRICS


def test_a_table_says_what_when_and_where(write):
    assert recorded_table("tiny", "credit") == (
        "Not recorded yet: `credit` (`rlreason record credit`)."
    )
    write(
        greedy("sft", BEFORE_),
        greedy("ppo", AFTER),
        rows_of("orm", "auc", [{"auc": 0.8}] * 3),
    )
    table, note = recorded_table("tiny", ["credit", "orm"]).split("\n\n")
    assert "+7.5\xa0[" in table  # what must not be torn apart
    first, second = table.replace("\xa0", " ").splitlines()[2:]
    assert first.startswith("| `ppo` | maj@1 against sft | ")
    assert first.endswith("] | a gain |")
    assert second == f"| `orm` | {AUC} | 3 |  | 0.80 | [0.80, 0.80] |  |"  # no verdict
    assert note == (
        "Recorded 2026-11-23 at commit 536e288 on a CPU, profile tiny, 3 seeds, 40 "
        "test problems. Differences of percentages are in points. Before and after are "
        "of the seeds that both have. Not recorded yet: `reinforce`, `rloo`, "
        "`grpo` (`rlreason record reinforce rloo grpo`)."
    )


def test_a_sentence_tells_what_is_recorded_and_then_what_is_not(write):
    names = {"ppo": "PPO", "rcrl": "RCRL"}
    assert told(recorded("tiny"), names) == "not recorded yet (PPO, RCRL)"
    write(greedy("sft", BEFORE_), greedy("ppo", AFTER))
    found = recorded("tiny")
    (ppo,) = found
    rise = f"PPO {in_points(ppo.interval)} (a rise)"
    assert told(found, names) == f"{rise}; not recorded yet (RCRL)"
    assert told(found, {"ppo": "PPO"}, against="sft") == rise
    assert told(found, {"ppo": "PPO"}, against="ppo") == "not recorded yet (PPO)"


def test_a_table_says_where_a_chapters_run_is_of_other_settings(write, tmp_path):
    plans = [plan_of("ppo", toy_recipe(tmp_path), seed) for seed in (0, 1)]
    write(greedy("sft", BEFORE_), greedy("ppo", AFTER, plan=settings_hash(plans[0])))
    same, other = (recorded_table("tiny", ["ppo"], folder_of(plan)) for plan in plans)
    assert "other settings" not in same
    assert other.endswith("`ppo` was recorded with other settings than the run above.")


def test_a_verdict_needs_the_whole_interval():
    def of(low, high):
        return verdict(Interval((low + high) / 2, low, high, 3, ""))

    assert of(0.1, 0.2) == "a gain"
    assert of(-0.2, -0.1) == "a loss"
    assert of(-0.1, 0.3) == of(0.0, 0.2) == of(-0.2, 0.0) == "inconclusive"


def test_a_table_says_how_many_seeds_each_has_and_one_seed_has_no_interval(write):
    write(greedy("sft", BEFORE_), greedy("ppo", AFTER), greedy("grpo", AFTER[:1]))
    page = recorded_table("tiny", "credit")
    assert "1 to 3 seeds" in page
    assert "[-inf" not in page
    assert unbroken("(one seed)") in page


def test_a_page_sets_the_measured_table_beside_the_reported_one(write):
    command = "rlreason record table-1"
    assert f"Not recorded yet: `table-1` (`{command}`)." in table_page(
        "tiny", "table-1"
    )
    total = Spent(seconds=1.0, rollouts=904, tokens=None)
    records = write(
        greedy("sft", BEFORE_, spent=Spent(seconds=1.0, rollouts=0, tokens=0)),
        greedy("expert-iteration", AFTER, needed=total),
        greedy("expert-iteration", BEFORE_, size="nano-xs", spent=total),
        rows_of("expert-iteration", "samples", [SAMPLES] * 3),
    )
    page = table_page("tiny", "table-1")
    assert "Not recorded yet: `sft` (nano-xs), `expert-iteration-orm` (nano-xs)" in page
    assert f"`ppo-dense-orm` (`{command}`)." in page  # every column has something
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines[0].split(" | ")[2:4] == ["seeds", "maj@1"]
    assert lines[0].split(" | ")[4:7] == ["maj@4", "rerank@4", "pass@4 |"]
    _, _, sft, small, large = (line.split(" | ") for line in lines[:5])
    assert sft[0] == "| SFT (`sft`)"
    assert [small[1:3], large[1:3]] == [["nano-xs", "3"], ["nano", "3"]]
    # Value, samples that are missing, no pair with a start, rollouts in all, tokens
    whole = hierarchical_interval(AFTER)
    assert whole.low < 0 < 1 < whole.high
    assert large[3] == unbroken(
        f"{100 * whole.mean:.1f} [0.0, 100.0]"  # a share has bounds, a t interval none
    )
    assert small[4] == "not yet" != large[4]
    head, _, change = lines[5:8]  # of the one arm that has a pair
    assert head.split(" | ")[2] == "maj@1 against its start"
    assert change.split(" | ")[1] == "nano"
    assert change.split(" | ")[2].startswith("+7.5\xa0[")
    small, large = (line.split(" | ") for line in lines[11:13])
    assert (small[2], large[2]) == ("904", "4,096 (5,000)")
    assert (small[3], large[3]) == ("not kept |", "300,000 |")
    assert "The paper's Table 1 (unverified transcription), in shares:" in page
    assert "| expert iteration | 7B | *0.48* |" in page
    assert "Table 6 are not known" in table_page("tiny", "table-6")
    one = CATALOGUE.table("credit")  # the main base alone
    assert "nano-xs" not in "".join(measured_tables(records, one))


@pytest.mark.parametrize("name", [table.name for table in CATALOGUE.tables])
def test_every_table_of_the_catalogue_has_a_page(name, write):
    assert f"rlreason record {name}`" in table_page("tiny", name)


def test_a_table_leaves_out_a_column_without_records_and_names_it(write):
    write(greedy("sft", BEFORE_), greedy("expert-iteration", AFTER))
    page = table_page("tiny", "table-1")
    assert page.startswith(
        "| run | base | seeds | maj@1 | maj@1 against its start | rollouts |"
    )
    assert "maj@K, rerank@K, pass@K (`rlreason record table-1" in page


def test_curves_are_means_at_the_looks_that_all_seeds_had(write):
    def looks(*seen):
        rows = [
            {"kind": "phase", "rollouts": n, "validation_maj_1": y} for n, y in seen
        ]
        return {"rows": [*rows, {"kind": "phase", "rollouts": 9000}]}

    seeds = [looks((1000, 0.2), (2000, 0.4)), looks((1000, 0.4), (3000, 0.5))]
    records = write(rows_of("ppo", "curve", seeds), rows_of("rcrl", "curve", [looks()]))
    curves = validation_curves(records, {"PPO": "ppo", "RCRL": "rcrl", "EI": "sft"})
    assert curves == {"PPO": {1.0: pytest.approx(0.3)}}

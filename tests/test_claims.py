"""Verdicts: computed from whole intervals, never typed."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from smoke_book import REPOSITORY
from test_records import SAMPLES, greedy, rows_of

from rlreason import cli
from rlreason.evaluation.intervals import Interval, hierarchical_interval, seed_interval
from rlreason.evaluation.metrics import pass_at_k
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.claims import CLAIMS, Judged, judge_claims, standing
from rlreason.experiments.measures import MEASURES
from rlreason.experiments.records import UNKNOWN, Cell, Records
from rlreason.experiments.rules import (
    ABOVE_0,
    BELOW_0,
    NEAR,
    NO_HIGHER,
    NO_LOWER,
    Effect,
    arms,
    as_right,
    beside,
    best_of,
    by_size,
    covered,
    differ,
    every,
    in_small,
    lost,
    passed,
    rollouts_to,
    sooner,
)
from rlreason.publishing.notebooks import find_notebooks


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (0.01, 0.03, ABOVE_0, "supported"),
        (0.01, 0.03, BELOW_0, "contradicted"),
        (-0.03, -0.01, ABOVE_0, "contradicted"),
        (-0.01, 0.03, ABOVE_0, "inconclusive"),  # the mean alone would support it
        (0.0, 0.03, ABOVE_0, "inconclusive"),
        (-inf, inf, ABOVE_0, "inconclusive"),  # one seed
        (0.01, 0.03, (-0.05, 0.05), "supported"),
        (0.06, 0.09, (-0.05, 0.05), "contradicted"),
        (0.01, 0.09, (-0.05, 0.05), "inconclusive"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(low, high, expected, verdict):
    mean = 0.0 if low == -inf else (low + high) / 2
    effect = Effect("x", Interval(mean, low, high, 3, ""), expected)
    assert effect.verdict == verdict


@pytest.mark.parametrize(
    ("expected", "unit", "wanted"),
    [
        (NO_HIGHER, "points", "below 2"),
        (NO_LOWER, "points", "above -2"),
        ((0.0, 0.1), "points", "0 to 10"),
        ((0.9, inf), "share", "above 90%"),
        ((-1.0, 1.0), "number", "-1 to 1"),
    ],
)
def test_an_effect_says_where_the_claim_expects_it(expected, unit, wanted):
    effect = Effect("x", None, expected, unit)
    assert (effect.wanted, effect.measured) == (wanted, "not recorded")


GRADED = np.tile([0, 1] * 20, (3, 1))  # (seeds, problems)
BETTER, WORSE = GRADED.copy(), GRADED.copy()
BETTER[:, :8], WORSE[:, :8] = 1, 0
UNSURE = GRADED.copy()
UNSURE[0, :8], UNSURE[1, :4] = 1, 0


def test_a_claim_stands_where_all_its_effects_do_and_falls_with_one():
    claim = replace(CLAIMS[0], rule=every(arms("ppo", "sft"), arms("rloo", "sft")))

    def verdict(**tables):
        rows = [row for name, table in tables.items() for row in greedy(name, table)]
        (judged,) = judge_claims(
            Records([*rows, *greedy("sft", GRADED)], "nano"), [claim]
        )
        return judged.verdict

    assert verdict(ppo=BETTER, rloo=BETTER) == "supported"
    # Wrong: supported by what happens to be recorded
    assert verdict(ppo=BETTER) == "inconclusive"
    assert verdict(ppo=WORSE) == "contradicted"
    assert verdict(ppo=BETTER, rloo=UNSURE) == "inconclusive"
    assert verdict(ppo=UNSURE, rloo=WORSE) == "contradicted"
    assert verdict(ppo=BETTER, rloo=WORSE) == "contradicted"
    (judged,) = judge_claims(Records([], "nano"), [claim])
    assert judged.verdict == "inconclusive"
    assert judged.said == UNKNOWN  # which is not what a wide interval says
    assert "not recorded" in str(judged)


def test_an_effect_is_of_pairs_and_says_of_what():
    rows = [*greedy("ppo", BETTER), *greedy("expert-iteration", WORSE)]
    (effect,) = arms("ppo", "expert-iteration")(Records(rows, "nano"))
    assert effect.interval == hierarchical_interval(BETTER - WORSE)
    assert effect.name == "ppo maj@1 less expert-iteration"
    # Wrong: as if both were independent, which is wider
    apart = np.hypot(
        *(np.ptp([i.low, i.high]) for i in map(hierarchical_interval, (BETTER, WORSE)))
    )
    assert effect.interval.high - effect.interval.low < apart
    rerank = Cell("orm", "rerank@K of SFT")
    values = {"k": 4, "vote": [0, 0], "rerank": [1, 0], "likelihood": [0, 0]}
    records = Records(rows_of("orm", "reranking", [values] * 3), "nano")
    (effect,) = differ(rerank, Cell("orm", "maj@K of SFT"), BELOW_0)(records)
    assert effect.name == "orm rerank@4 of SFT less orm maj@4 of SFT"
    assert (effect.interval.mean, effect.expected) == (0.5, BELOW_0)


def test_no_better_leaves_room_for_what_no_interval_can_exclude():
    def of(graded) -> Effect:
        rows = [*greedy("ppo", graded), *greedy("ppo-replay", graded)]
        rule = arms("ppo-replay", "ppo", expected=NO_HIGHER)
        return next(rule(Records(rows, "nano")))

    assert of(GRADED).verdict == "inconclusive"  # too few problems to say so
    effect = of(np.tile(GRADED, 8))
    assert effect.verdict == "supported"
    wrong = replace(effect, expected=BELOW_0)
    assert wrong.verdict == "inconclusive"  # an effect of 0 never lies below 0


def curve(*points: tuple[int, float | None]) -> dict:
    rows = [{"kind": "phase", "rollouts": n, "validation_maj_1": x} for n, x in points]
    return {"rows": [*rows, {"kind": "phase", "rollouts": 999}]}


def test_speed_is_told_by_a_level_that_both_reach():
    rows = rows_of(
        "ppo", "curve", [curve((10, 0.2), (20, 0.57), (30, 0.6), (40, 0.5)), curve()]
    )
    assert [best_of(row) for row in rows] == [0.6, 0.0]
    assert rollouts_to(rows[0], 0.5) == 20
    assert rollouts_to(rows[0], 0.7) is None
    late = rows_of("ppo-dense", "curve", [curve((100, 0.4)), curve((200, 0.4))])
    early = rows_of("ppo", "curve", [curve((10, 0.4)), curve((10, 0.4))])
    (effect,) = sooner("ppo-dense", "ppo", BELOW_0)(Records([*late, *early], "nano"))
    found = effect.interval
    assert (found.mean, found.low) == (
        pytest.approx(1.15, abs=0.01),
        pytest.approx(seed_interval([1.0, 1.30103]).low, abs=1e-4),
    )
    # The grain of the looks decides there, and that is said
    assert effect.name.endswith("(ppo-dense at its first look in 2 of 2 seeds)")
    (effect,) = sooner("ppo", "ppo-dense", BELOW_0)(Records(early, "nano"))
    assert (effect.interval, effect.verdict) == (None, "inconclusive")


def test_what_is_never_right_reaches_no_level():
    rows = rows_of("ppo", "curve", [curve((10, 0.0))] * 2)
    rows += rows_of("ppo-dense", "curve", [curve((50, 0.4))] * 2)
    (effect,) = sooner("ppo-dense", "ppo", BELOW_0)(Records(rows, "nano"))
    assert effect.interval is None  # and not log10 of 50 / 10


def test_one_seed_has_no_interval_in_any_unit():
    one = Interval(0.5, -inf, inf, 1, "t")
    said = [str(Effect("x", one, ABOVE_0, unit)) for unit in ("points", "share")]
    said.append(str(Effect("x", one, ABOVE_0, "number")))
    assert said == [
        "x: +50.0 (one seed) (expected above 0)",
        "x: 50.0% (one seed) (expected above 0%)",
        "x: +0.50 (one seed) (expected above 0)",
    ]


def test_what_learns_nothing_is_not_fast():
    learns = [curve((10, 0.3), (20, 0.4), (30, 0.6))] * 2
    idle = [curve((10, 0.3), (20, 0.3), (30, 0.31))] * 2
    rows = [*rows_of("ppo", "curve", learns), *rows_of("ppo-dense", "curve", idle)]
    (effect,) = sooner("ppo-dense", "ppo", BELOW_0)(Records(rows, "nano"))
    assert effect.interval.mean == 0
    assert effect.name.endswith("(ppo-dense at its first look in 2 of 2 seeds)")
    # Near its own best it is at once, and would count as three times as fast
    wrong = [rollouts_to(row, NEAR * best_of(row)) for row in rows[1:3]]
    assert wrong == [30, 10]


def test_sizes_are_compared_in_pairs_too():
    rows = [
        *greedy("ppo", GRADED),
        *greedy("ppo-base", GRADED),
        *greedy("ppo", GRADED, size="nano-xs"),
        *greedy("ppo-base", WORSE, size="nano-xs"),
    ]
    rule = by_size(lost("ppo", "ppo"), "lost, {small} less {large}")
    (effect,) = rule(Records(rows, "nano"))
    assert effect.name == "lost, nano-xs less nano"
    assert effect.interval == hierarchical_interval(GRADED - WORSE)
    (effect,) = rule(Records(rows[:6], "nano"))
    assert (effect.interval, effect.verdict) == (None, "inconclusive")
    # The same two of the smaller base, told and not judged
    (effect,) = in_small("ppo-base", "ppo")(Records(rows, "nano"))
    assert effect.name == "ppo-base of nano-xs maj@1 less ppo of nano-xs"
    assert effect.interval == hierarchical_interval(WORSE - GRADED)
    assert effect.verdict is None


def test_many_samples_tell_what_few_leave_open():
    def rows(arm: str, counts: list[int]):
        each = {f"q{i}": {"a": n} for i, n in enumerate(counts)}
        values = {"samples": 64, "counts": each}
        return rows_of(arm, "solutions", [values] * 3)

    few = rows_of("sft", "samples", [SAMPLES] * 3)
    records = [*few, *rows("sft", [64, 32]), *rows("ppo", [64, 0])]
    (effect,) = passed("ppo", "sft")(Records(records, "nano"))
    k = Records(records, "nano").samples()
    assert effect.name.startswith(f"ppo less sft pass@{k}, from ")
    whole = -pass_at_k(64, 32, k) / 2
    assert effect.interval.mean == pytest.approx(whole)
    assert effect.verdict is None
    (effect,) = passed("ppo", "sft")(Records(few, "nano"))
    assert effect.interval is None


def test_of_how_many_seeds_a_number_is_stands_beside_it():
    of_seeds = seed_interval([0.1, 0.2, 0.3])
    assert Effect("x", of_seeds, ABOVE_0).measured.endswith("], 3 seeds")
    of_problems = Interval(0.2, 0.1, 0.3, 50, "Wilson")
    assert Effect("x", of_problems, ABOVE_0).measured.endswith("]")


def test_what_rl_adds_is_judged_by_how_likely_it_is_and_not_by_rare_solutions():
    def rows(arm: str, counts: dict, samples: int):
        values = {"samples": samples, "counts": {f"q{i}": counts for i in range(200)}}
        return rows_of(arm, "solutions", [values] * 3)

    rule = covered("ppo", "sft", (0.9, inf))
    sft = rows("sft", {"a": 150, "b": 50}, 200)
    often = [*sft, *rows("ppo", {"a": 58, "b": 40, "new": 1, "newer": 1}, 100)]
    effect, left, each_once = rule(Records(often, "nano"))
    assert effect.interval.mean == pytest.approx(0.98)  # Wrong: half of the solutions
    assert effect.verdict == "supported"
    assert left.interval.mean == pytest.approx(0.02)  # SFT has all of its own
    assert each_once.interval.mean < 0.98
    effect, *_ = rule(Records([*sft, *rows("ppo", {"new": 80, "a": 20}, 100)], "nano"))
    assert effect.verdict == "contradicted"
    effect, *others = rule(Records(sft, "nano"))
    assert (effect.interval, effect.verdict) == (None, "inconclusive")
    assert [other.verdict for other in others] == [None, None]


def test_who_is_right_more_often_has_no_more_variety_for_that():
    def rows(size: str, counts: dict):
        values = {"samples": 64, "counts": {f"q{i}": counts for i in range(20)}}
        return rows_of("sft", "solutions", [values] * 3, size=size)

    rule = as_right("sft", right=8)
    records = [*rows("nano-xs", {"a": 6, "b": 6}), *rows("nano", {"a": 24, "b": 24})]
    (effect,) = rule(Records(records, "nano"))
    assert effect.interval.mean == pytest.approx(0, abs=0.02)
    assert (effect.verdict, effect.wanted) == (None, "not judged")
    (effect,) = rule(Records(rows("nano", {"a": 24}), "nano"))
    assert effect.interval is None


def test_what_is_told_beside_a_claim_decides_nothing():
    rule = every(arms("ppo", "sft"), beside(arms("rloo", "sft")))
    claim = replace(CLAIMS[0], rule=rule)
    rows = [*greedy("ppo", BETTER), *greedy("sft", GRADED), *greedy("rloo", WORSE)]
    (judged,) = judge_claims(Records(rows, "nano"), [claim])
    assert judged.verdict == "supported"
    assert "(not judged)" in str(judged)
    assert [line["expected"] for line in judged.lines()] == ["above 0", "not judged"]


def test_a_correction_for_many_leaves_what_is_beyond_it():
    means = {"sure": 9.0, "hardly": 1.1, "barely": 1.05}  # p 0.00002, 0.038, 0.043
    effects = [
        Effect(name, Interval(mean, mean - 1, mean + 1, 5, "t", 4.0), ABOVE_0)
        for name, mean in means.items()
    ]
    assert all(effect.verdict == "supported" for effect in effects)
    sure, hardly, barely = (Judged(CLAIMS[0], (effect,)) for effect in effects)
    assert standing([sure, hardly, barely]) == [sure]
    assert standing([hardly, barely]) == []
    assert standing([sure, hardly]) == [sure, hardly]  # by Bonferroni's rule not
    assert standing([Judged(CLAIMS[0], tuple(effects))]) == []  # supported takes all
    unlike = replace(effects[0], expected=BELOW_0)
    against = Judged(CLAIMS[0], (unlike, *effects[1:]))
    assert standing([against]) == [against]  # contradicted takes one
    told = [replace(effect, expected=None) for effect in effects[1:]]
    both = Judged(CLAIMS[0], (effects[0], *told))
    assert standing([both, hardly]) == [both, hardly]  # told beside: not counted


def test_what_is_told_beside_makes_no_claim_known():
    rule = every(arms("ppo", "sft"), beside(arms("rloo", "sft")))
    claim = replace(CLAIMS[0], rule=rule)
    rows = [*greedy("sft", GRADED), *greedy("rloo", WORSE)]
    (judged,) = judge_claims(Records(rows, "nano"), [claim])
    assert judged.said == UNKNOWN  # and not "inconclusive"


def test_every_claim_names_what_there_is_and_where_it_is_shown():
    notebooks = [
        (notebook.name.partition("_")[0].lstrip("0"), notebook.path.read_text())
        for notebook in find_notebooks(REPOSITORY / "notebooks")
    ]
    text = "".join(source for _, source in notebooks)
    for claim in CLAIMS:
        kind, number = claim.shown.split()
        if kind == "Table":
            assert f'\\"table-{number}\\"' in text, claim.shown
        elif kind == "Figure":
            assert f"{claim.shown}. " in text, claim.shown
        else:
            assert number in dict(notebooks), claim.shown
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    asked = set()

    class Asked(Records):
        def of(self, arm, measure, size=""):
            asked.add((arm, measure))
            return {}

    for judged in judge_claims(Asked(greedy("sft", GRADED, size="nano-xs"), "nano")):
        assert judged.verdict == "inconclusive"
    for arm, measure in asked:
        assert measure in MEASURES
        assert measure in CATALOGUE.arms[arm].measures, (arm, measure)


def test_every_claim_is_judged_once_all_is_recorded(capsys):
    curves = [curve((10, 0.1), (20, 0.5))] * 3
    values = {
        "greedy": {"right": "01" * 20},
        "samples": SAMPLES,
        "reranking": {"k": 4, "vote": [0, 1], "rerank": [1, 1], "likelihood": [1, 0]},
        "earned": {"score_before": [0, 1], "score_after": [1, 1]}
        | {"right_before": "01", "right_after": "11"},
        "solutions": {"samples": 4, "counts": {p: {"a": 2, "b": 1} for p in "pq"}},
    }
    rows = [
        row
        for name, arm in CATALOGUE.arms.items()
        for measure in arm.measures
        for size in ("nano", "nano-xs")
        for row in rows_of(
            name,
            measure,
            curves if measure == "curve" else [values.get(measure, {})] * 3,
            size=size,
        )
    ]
    judged = judge_claims(Records(rows, "nano"))
    assert all(each.effects for each in judged)
    for each in judged:
        assert each.claim.provenance in str(each)
    cli.main(["claims", "--profile", "paper"])
    told = capsys.readouterr().out
    assert len(re.findall(r"not recorded \(.*\)\n  not recorded yet", told)) == len(
        CLAIMS
    )


def test_a_claim_is_told_in_the_first_line_of_its_effects():
    records = Records(greedy("sft", GRADED), "nano")
    (first, *others) = next(
        [*one.lines()]
        for one in judge_claims(records)
        if one.claim.id == "both-improve"
    )
    assert first["claim"].startswith("RL improves maj@1 and pass@96")
    assert first["shown in"] == "Figure 17.1"
    assert len(others) == 11
    assert {*others[0]} == {"effect", "measured", "expected"}

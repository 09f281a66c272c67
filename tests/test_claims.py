"""Verdicts: computed from whole intervals, never typed."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from test_records import ROW

from rlreason import cli
from rlreason.evaluation.intervals import Interval
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.claims import (
    ABOVE_0,
    BELOW_0,
    CLAIMS,
    Effect,
    above,
    change,
    every,
    judge_claims,
)
from rlreason.experiments.records import recorded


def row(comparison, low, high, **fields):
    mean = (low + high) / 2
    values = {"after": 0.5 + mean, "difference": mean, "low": low, "high": high}
    return replace(ROW, comparison=comparison, **values | fields)


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
    effect = Effect("x", Interval(mean, low, high, 0.95, 3, ""), expected)
    assert effect.verdict == verdict


def test_a_claim_stands_where_all_its_effects_do_and_falls_with_one():
    claim = replace(CLAIMS[0], rule=change("ppo", "rloo"))
    good, open_, bad = (0.01, 0.03), (-0.01, 0.03), (-0.03, -0.01)

    def verdict(*intervals):
        names = ("ppo", "rloo")[: len(intervals)]
        rows = [row(name, *ends) for name, ends in zip(names, intervals, strict=True)]
        (judged,) = judge_claims(rows, [claim])
        return judged.verdict

    assert verdict(good, good) == "supported"
    assert verdict(good, open_) == "inconclusive"
    assert verdict(open_, bad) == verdict(good, bad) == "contradicted"
    assert verdict() == "inconclusive"
    (judged,) = judge_claims([], [claim])
    assert "not recorded" in str(judged)


def test_a_rule_takes_the_rows_that_it_names():
    rows = [
        row("orm", 0.01, 0.03, metric="rerank@96", against="maj@96"),
        row("orm", -0.03, -0.01, metric="rerank@96", against="the likelihood"),
        row("ppo", 0.01, 0.03),
    ]
    (effect,) = change("orm", metric="rerank@", against="maj@")(rows)
    assert effect.name == "orm, rerank@96 against maj@96"
    both = every(change("ppo"), change("orm", metric="rerank@", expected=BELOW_0))
    assert [effect.expected for effect in both(rows)] == [ABOVE_0, BELOW_0, BELOW_0]


def test_one_gain_above_another_is_no_surer_than_both():
    a, b = row("expert-iteration", 0.10, 0.14), row("ppo", 0.03, 0.09)
    (effect,) = above("expert-iteration", "ppo")([a, b])
    half = np.hypot(0.02, 0.03)
    found = effect.interval
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.06, 0.06 - half, 0.06 + half)
    )
    assert effect.verdict == "supported"
    assert list(above("expert-iteration", "ppo")([a])) == []
    other_start = replace(b, against="base")
    assert list(above("expert-iteration", "ppo")([a, other_start])) == []
    # On average over draws it holds the truth at least as often as it says
    draws, spread = np.random.default_rng(0), 0.02
    start = draws.normal(0, spread, 4000)
    one, other = (draws.normal(0, spread, 4000) - start for _ in range(2))
    width = 1.96 * np.sqrt(2) * spread
    assert np.mean(np.abs(one - other) < np.hypot(width, width)) > 0.98


def test_every_claim_rests_on_records_and_names_where_they_are_shown(capsys):
    shown = {table.name for table in CATALOGUE.tables}
    shown |= {figure.name for figure in CATALOGUE.figures}
    assert {claim.figure for claim in CLAIMS} <= shown
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    judged = judge_claims(recorded("tiny"))
    assert all(each.effects for each in judged)
    cli.main(["claims"])
    told = capsys.readouterr().out
    for each in judged:
        assert str(each) in told
        assert each.claim.provenance in told
    cli.main(["claims", "--profile", "paper"])
    assert capsys.readouterr().out.count("not recorded\n  inconclusive") == len(CLAIMS)

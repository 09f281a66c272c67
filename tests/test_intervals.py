"""Intervals: they cover as often as they say, and their ends are sound."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlreason.evaluation.intervals import (
    Interval,
    accuracy_interval,
    bootstrap_interval,
    hierarchical_interval,
    paired_interval,
    seed_interval,
    t_cdf,
    t_quantile,
    wilson_interval,
)


def coverage(draw, truth, trials):
    return np.mean([not draw(i).excludes(truth) for i in range(trials)])


def test_bootstrap_covers_the_mean_of_scores_as_often_as_it_says():
    generator = np.random.default_rng(0)
    data = generator.random((400, 100)) < 0.3

    held = coverage(lambda i: bootstrap_interval(data[i], resamples=400), 0.3, 400)
    assert 0.91 <= held <= 0.98  # the standard error of 400 trials is 0.011


def test_bootstrap_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).random(500)
    interval = bootstrap_interval(values, resamples=4000)
    expected = 2 * 1.96 * values.std() / math.sqrt(500)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)
    assert interval.mean == values.mean()
    assert interval.n == 500


def test_seed_decides_the_bootstrap_and_no_global_stream_is_touched():
    def states():
        kind, keys, *rest = np.random.get_state()
        return random.getstate(), kind, keys.tolist(), rest

    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    before, before_torch = states(), torch.get_rng_state()
    first = bootstrap_interval(values, seed=3, resamples=50)
    np.random.seed(5)
    assert bootstrap_interval(values, seed=3, resamples=50) == first
    assert bootstrap_interval(values, seed=4, resamples=50) != first
    np.random.set_state((before[1], np.array(before[2], np.uint32), *before[3]))
    paired_interval(values, values[::-1])
    accuracy_interval(values)
    assert states() == before
    assert torch.equal(torch.get_rng_state(), before_torch)


def test_twenty_failures_do_not_prove_that_the_policy_always_fails():
    failures = [0.0] * 20
    assert bootstrap_interval(failures).high == 0.0  # what the plain bootstrap says
    honest = accuracy_interval(failures)
    assert honest.method == "Wilson"
    assert honest.low == 0.0
    assert honest.high == pytest.approx(0.161, abs=0.001)
    assert accuracy_interval([1.0] * 20).low == pytest.approx(0.839, abs=0.001)


def test_one_problem_gives_a_wide_interval_and_no_error():
    interval = accuracy_interval([0.3])
    assert interval.low < 0.1
    assert interval.high > 0.7


@given(st.integers(1, 60), st.data())
def test_wilson_ends_are_the_proportions_that_a_z_test_just_accepts(n, data):
    successes = data.draw(st.integers(0, n))
    interval = wilson_interval(successes, n)
    p = successes / n
    assert 0 <= interval.low <= p <= interval.high <= 1
    for end in (interval.low, interval.high):
        if 0 < end < 1:
            z = (p - end) / math.sqrt(end * (1 - end) / n)
            assert abs(z) == pytest.approx(1.959964, rel=1e-4)


def test_pairing_narrows_the_interval_of_a_difference():
    generator = np.random.default_rng(0)
    hardness = generator.random(300)
    before = (hardness < 0.4).astype(float)
    after = (hardness < 0.48).astype(float)
    paired = paired_interval(before, after)
    assert paired.mean == pytest.approx(after.mean() - before.mean())
    assert paired.excludes(0.0)
    apart = [bootstrap_interval(v) for v in (before, after)]
    assert apart[0].high > apart[1].low  # the two intervals overlap all the same
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_interval(before, after[:-1])


@pytest.mark.parametrize(
    ("p", "dof", "value"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.975, 4, 2.7764451),
        (0.95, 9, 1.8331129),
        (0.995, 30, 2.7499957),
        (0.975, 1000, 1.9623390),
        (0.975, 99999, 1.9599880),
        (0.9999, 1, 3183.0988),
        (0.5, 3, 0.0),
        (0.975, 1e9, 1.9599640),
    ],
)
def test_t_quantiles_are_those_of_the_tables(p, dof, value):
    assert t_quantile(p, dof) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert t_cdf(value, dof) == pytest.approx(p, abs=1e-7)


def test_p_is_a_twentieth_at_the_ends_and_one_at_the_mean():
    interval = seed_interval([0.1, 0.2, 0.4])
    for end in (interval.low, interval.high):
        assert interval.p_value(end) == pytest.approx(0.05)
    assert interval.p_value(interval.mean) == pytest.approx(1)
    # By a normal distribution, which three seeds do not have, it would be less
    assert interval.p_value(0) == pytest.approx(0.1181, abs=1e-3)
    assert seed_interval([0.1]).p_value(0) == 1
    assert wilson_interval(5, 10).p_value(0) == 1


def test_t_interval_over_three_seeds_covers_and_the_normal_one_does_not():
    data = np.random.default_rng(0).normal(0.4, 0.02, (600, 3))
    t_coverage = coverage(lambda i: seed_interval(data[i]), 0.4, 600)
    half = 1.96 * data.std(axis=1, ddof=1) / math.sqrt(3)
    z_coverage = np.mean(abs(data.mean(axis=1) - 0.4) <= half)
    assert 0.92 <= t_coverage <= 0.98
    assert z_coverage < 0.88


def test_one_seed_says_nothing_about_others():
    for interval in (seed_interval([0.4]), hierarchical_interval([[0.4, 0.5]])):
        assert (interval.low, interval.high) == (-math.inf, math.inf)
        assert not interval.excludes(100.0)


@pytest.mark.parametrize("seed_spread", [0.0, 0.04])
def test_seeds_and_problems_are_both_covered(seed_spread):
    """Each kind alone falls short where the other one varies."""
    generator = np.random.default_rng(0)
    seeds, problems, trials = 3, 100, 400
    problem_spread = 0.4

    def table():
        by_seed = generator.normal(0, seed_spread, (seeds, 1))
        by_problem = generator.normal(0, problem_spread, (1, problems))
        return by_seed + by_problem + generator.normal(0, 0.2, (seeds, problems))

    tables = [table() for _ in range(trials)]
    both = coverage(lambda i: hierarchical_interval(tables[i]), 0.0, trials)
    seeds_alone = coverage(lambda i: seed_interval(tables[i].mean(axis=1)), 0, trials)
    assert 0.92 <= both <= 1.0
    assert seeds_alone < 0.92


def test_a_bootstrap_over_problems_alone_misses_the_spread_of_seeds():
    generator = np.random.default_rng(0)
    trials = 300
    tables = generator.normal(0, 0.1, (trials, 3, 1)) + generator.normal(
        0, 0.3, (trials, 3, 100)
    )
    both = coverage(lambda i: hierarchical_interval(tables[i]), 0.0, trials)
    problems_alone = coverage(
        lambda i: bootstrap_interval(tables[i].mean(axis=0), resamples=200), 0.0, trials
    )
    assert both >= 0.92
    assert problems_alone < 0.7


def test_a_table_without_any_spread_has_an_interval_of_no_width():
    interval = hierarchical_interval(np.full((3, 10), 0.25))
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)


def test_excludes_and_text():
    interval = Interval(0.05, 0.01, 0.09, 3, "t over seeds")
    assert interval.excludes(0.0)
    assert not interval.excludes(0.01)
    assert str(interval) == "0.050 [0.010, 0.090]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([[0.0, 1.0]]), "one value a unit"),
        (lambda: bootstrap_interval([0.0, math.nan]), "NaN"),
        (lambda: accuracy_interval([0.0, 1.5]), "between 0 and 1"),
        (lambda: wilson_interval(3, 2), "no proportion"),
        (lambda: hierarchical_interval([0.1, 0.2]), "table"),
        (lambda: hierarchical_interval([[0.1, math.nan]]), "NaN"),
        (lambda: t_quantile(0.3, 2), "no t quantile"),
    ],
)
def test_input_without_an_interval_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()

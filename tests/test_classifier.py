"""Evaluating a classifier: the ranking with ties, and whether probabilities hold."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlreason.evaluation.classifier import (
    auc,
    auc_interval,
    auc_within,
    calibration_curve,
    calibration_error,
    classification_metrics,
)

QUARTERS = [i / 4 for i in range(5)]

# Samples with both classes, and scores that often tie
graded = st.lists(
    st.tuples(st.sampled_from(QUARTERS), st.booleans()), min_size=2, max_size=25
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


def split(pairs) -> tuple[list[float], list[bool]]:
    return [score for score, _ in pairs], [label for _, label in pairs]


def obvious_auc(pairs) -> float:
    """Every right sample against every wrong one."""
    right = [score for score, label in pairs if label]
    wrong = [score for score, label in pairs if not label]
    won = [(r > w) + (r == w) / 2 for r, w in product(right, wrong)]
    return sum(won) / len(won)


# The ranking


@settings(max_examples=200, deadline=None)
@given(graded)
def test_p37_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    assert auc(*split(pairs)) == pytest.approx(obvious_auc(pairs), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(graded, st.randoms(use_true_random=False))
def test_p44_ties_count_one_half_in_whatever_order_they_stand(pairs, rng):
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert auc(*split(shuffled)) == pytest.approx(auc(*split(pairs)), abs=1e-12)
    flipped = [(score, not label) for score, label in pairs]
    assert auc(*split(flipped)) == pytest.approx(1 - auc(*split(pairs)), abs=1e-12)


def test_p44_ranks_that_split_ties_by_position_would_reward_the_order():
    def by_position(scores, labels):  # the wrong version
        order = sorted(range(len(scores)), key=lambda i: scores[i])
        ranks = {i: rank for rank, i in enumerate(order, 1)}
        right = [ranks[i] for i, label in enumerate(labels) if label]
        n = len(right)
        return (sum(right) - n * (n + 1) / 2) / (n * (len(scores) - n))

    same = [0.5] * 6
    right_last, right_first = [False] * 3 + [True] * 3, [True] * 3 + [False] * 3
    assert by_position(same, right_last) == 1.0 != by_position(same, right_first)
    assert auc(same, right_last) == auc(same, right_first) == 0.5


def test_only_the_order_of_the_scores_matters_for_auc():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(200)]
    labels = [rng.random() < score for score in scores]
    assert 0.7 < auc(scores, labels) < 0.95
    assert auc([s**3 - 5 for s in scores], labels) == auc(scores, labels)


# Its interval


def test_the_interval_covers_what_other_questions_would_have_given():
    rng = np.random.default_rng(0)

    def drawn(questions: int):
        """Questions differ in how well they are told apart; 6 samples of each."""
        gaps = np.repeat(rng.normal(1, 1, questions), 6)
        labels = np.tile([True, False], questions * 3)
        scores = rng.normal(size=len(gaps)) + labels * gaps
        return scores, labels, np.repeat(np.arange(questions), 6)

    truth = auc(*drawn(20_000)[:2])
    covered = [
        not auc_interval(*drawn(60), resamples=300).excludes(truth) for _ in range(100)
    ]
    assert 0.85 < np.mean(covered) <= 1.0

    # The wrong version: samples are drawn one by one, as if of as many questions
    def single(scores, labels, _):
        return auc_interval(scores, labels, range(len(scores)), resamples=300)

    # ... which is blind to a question whose samples are all alike
    scores, labels, questions = drawn(10)
    copies = 10
    scores, labels = np.repeat(scores, copies), np.repeat(labels, copies)
    whole = auc_interval(scores, labels, np.repeat(questions, copies))
    narrow = single(scores, labels, None)
    assert narrow.high - narrow.low < 0.7 * (whole.high - whole.low)


def test_the_interval_is_that_of_the_definition():
    # Two questions: the draws are (2, 0), (1, 1) and (0, 2) of them
    scores, labels = [0.9, 0.1, 0.4, 0.6], [True, False, True, False]
    interval = auc_interval(scores, labels, ["a", "a", "b", "b"])
    assert interval.mean == auc(scores, labels) == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert interval.n == 2
    again = auc_interval(scores, labels, ["a", "a", "b", "b"])
    assert again == interval  # the seed decides


def test_p45_the_interval_leaves_the_global_generators_alone():
    np.random.seed(3)
    random.seed(3)
    before = np.random.get_state()[1].tolist(), random.getstate()
    auc_interval([0.2, 0.3, 0.4], [True, False, True], "abc")
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


# Calibration


def test_p37_calibration_sees_what_auc_cannot():
    rng = random.Random(1)
    honest = [rng.random() for _ in range(4000)]
    labels = [rng.random() < p for p in honest]
    boasting = [0.5 + p / 2 for p in honest]  # the same order, other probabilities
    assert auc(boasting, labels) == auc(honest, labels)
    assert calibration_error(honest, labels) < 0.03
    assert calibration_error(boasting, labels) > 0.2
    inside = [b.right.low <= b.score <= b.right.high
              for b in calibration_curve(honest, labels)]  # fmt: skip
    assert sum(inside) >= 8


def test_the_curve_by_hand():
    scores = [0.0, 0.05, 0.1, 0.95, 1.0]
    labels = [False, True, False, True, True]
    low, second, high = calibration_curve(scores, labels)
    assert (low.low, low.high, second.low, high.high) == (0.0, 0.1, 0.1, 1.0)
    assert (low.right.n, second.right.n, high.right.n) == (2, 1, 2)
    assert (low.right.mean, second.right.mean, high.right.mean) == (0.5, 0.0, 1.0)
    assert low.score == pytest.approx(0.025)
    expected = (2 * 0.475 + 1 * 0.1 + 2 * 0.025) / 5
    assert calibration_error(scores, labels) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(graded, st.integers(1, 12))
def test_every_sample_is_in_one_range_that_holds_it(pairs, bins):
    scores, labels = split(pairs)
    curve = calibration_curve(scores, labels, bins=bins)
    assert sum(b.right.n for b in curve) == len(pairs)
    assert all(b.low - 1e-12 <= b.score <= b.high + 1e-12 for b in curve)
    assert sum(b.right.n * b.right.mean for b in curve) == pytest.approx(sum(labels))
    assert 0 <= calibration_error(scores, labels, bins=bins) <= 1


def test_one_class_alone_can_be_calibrated_but_not_ranked():
    assert calibration_error([0.25, 0.25], [False, False]) == 0.25
    with pytest.raises(ValueError, match="all 2 samples are wrong"):
        auc([0.1, 0.2], [False, False])


def test_what_an_orm_is_judged_by():
    scores, labels = [0.9, 0.1, 0.4, 0.6], [True, False, True, False]
    found = classification_metrics(scores, labels, "aabb")
    assert found == {
        "auc": 0.75,
        "auc_low": 0.0,
        "auc_high": 1.0,
        "calibration_error": calibration_error(scores, labels),
    }


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, float("nan")], [True, False], "NaN or infinity"),
        ([0.1], [True, False], "one label a score"),
        ([], [], "at least one"),
        ([0.1, 0.2], [2, 0], "true or false"),
    ],
)
def test_p44_bad_input_is_a_clear_error(scores, labels, message):
    for function in (auc, calibration_curve):
        with pytest.raises(ValueError, match=message):
            function(scores, labels)


def test_impossible_settings_are_clear_errors():
    scores, labels = [0.1, 1.5], [False, True]
    with pytest.raises(ValueError, match="outside"):
        calibration_curve(scores, labels)
    with pytest.raises(ValueError, match="bins=0"):
        calibration_curve([0.5], [True], bins=0)
    with pytest.raises(ValueError, match="1 questions for 2 scores"):
        auc_interval(scores, labels, "a")


@given(graded, st.lists(st.integers(0, 3), min_size=30, max_size=30))
def test_within_questions_only_pairs_of_one_question_are_compared(pairs, drawn):
    scores, labels = [s for s, _ in pairs], [y for _, y in pairs]
    questions = [f"q/{drawn[i % 30]}" for i in range(len(pairs))]
    expected = {}
    for question in dict.fromkeys(questions):
        rows = [p for p, q in zip(pairs, questions, strict=True) if q == question]
        if len({label for _, label in rows}) == 2:
            expected[question] = obvious_auc(rows)
    if not expected:
        with pytest.raises(ValueError, match="nothing to tell apart within one"):
            auc_within(scores, labels, questions)
    else:
        assert auc_within(scores, labels, questions) == pytest.approx(expected)


def test_who_knows_only_how_hard_a_question_is_has_one_half_within_it():
    # An easy question, 3 of 4 right, and a hard one, 1 of 4; a score a question
    labels = [True, True, True, False, True, False, False, False]
    scores, questions = [0.75] * 4 + [0.25] * 4, "aaaabbbb"
    assert auc(scores, labels) == 0.75
    assert auc_within(scores, labels, questions) == {"a": 0.5, "b": 0.5}

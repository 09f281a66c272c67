"""Metrics of k of n samples against enumeration of every subset of k."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb, inf, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlreason.evaluation.diversity import distinct_at_k
from rlreason.evaluation.metrics import (
    known_from_question,
    maj_at_k,
    maj_curve,
    pass_at_k,
    rerank_at_k,
)
from rlreason.tasks.answers import operation_key

correctness = st.lists(st.booleans(), min_size=1, max_size=10)
votes = st.lists(st.sampled_from([None, "1", "2", "3", "4"]), min_size=1, max_size=10)
some_scores = st.sampled_from([0.0, 0.5, 1.0, -inf, inf, nan])


def mean_over_subsets(n, k, value):
    subsets = list(combinations(range(n), k))
    return float(sum(Fraction(value(s)) for s in subsets) / len(subsets))


def vote(answers, gold):
    """The obvious majority vote of one set of answers, with ties shared."""
    counts = Counter(a for a in answers if a is not None)
    most = max(counts.values(), default=0)
    leaders = [a for a, c in counts.items() if c == most]
    return Fraction(gold in leaders, max(len(leaders), 1))


def best_scored(scores, correct):
    """The obvious reranking of one set of samples, with ties shared, NaN last."""
    numbers = [s for s in scores if not isnan(s)]
    best = [
        c
        for s, c in zip(scores, correct, strict=True)
        if (s == max(numbers) if numbers else True)
    ]
    return Fraction(sum(best), len(best))


@given(correctness)
def test_pass_at_k_is_the_mean_over_all_subsets(correct):
    n = len(correct)
    for k in range(1, n + 1):
        truth = mean_over_subsets(n, k, lambda s: any(correct[i] for i in s))
        assert pass_at_k(n, sum(correct), k) == pytest.approx(truth, abs=1e-12)


@given(votes)
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_shared(answers):
    n = len(answers)
    for k in range(1, n + 1):
        truth = mean_over_subsets(n, k, lambda s: vote([answers[i] for i in s], "1"))
        assert maj_at_k(answers, "1", k) == pytest.approx(truth, abs=1e-12)


@given(st.lists(st.tuples(some_scores, st.booleans()), min_size=1, max_size=9))
def test_rerank_at_k_is_the_mean_over_all_subsets_with_ties_shared(samples):
    scores, correct = zip(*samples, strict=True)
    n = len(scores)
    for k in range(1, n + 1):
        truth = mean_over_subsets(
            n, k, lambda s: best_scored([scores[i] for i in s], [correct[i] for i in s])
        )
        assert rerank_at_k(scores, correct, k) == pytest.approx(truth, abs=1e-12)


def test_rerank_weights_are_those_of_the_ranks_where_scores_differ():
    n, k = 7, 3
    for rank in range(1, n + 1):
        correct = [i == rank for i in range(1, n + 1)]
        weight = comb(n - rank, k - 1) / comb(n, k)
        got = rerank_at_k([-float(i) for i in range(n)], correct, k)
        assert got == pytest.approx(weight, abs=1e-15)


@given(votes, st.randoms(use_true_random=False))
def test_order_of_the_samples_does_not_matter(answers, shuffler):
    k = (len(answers) + 1) // 2
    scores = [float(len(a or "")) for a in answers]
    correct = [a == "1" for a in answers]
    order = list(range(len(answers)))
    shuffler.shuffle(order)
    mixed = [answers[i] for i in order]
    assert maj_at_k(mixed, "1", k) == pytest.approx(maj_at_k(answers, "1", k))
    assert rerank_at_k(
        [scores[i] for i in order], [correct[i] for i in order], k
    ) == pytest.approx(rerank_at_k(scores, correct, k))


@given(votes)
def test_at_k_equal_n_all_are_the_plain_metric_and_at_one_the_accuracy(answers):
    n, correct = len(answers), [a == "1" for a in answers]
    scores = [float(i) for i in range(n)]
    assert pass_at_k(n, sum(correct), n) == any(correct)
    assert maj_at_k(answers, "1", n) == pytest.approx(float(vote(answers, "1")))
    assert rerank_at_k(scores, correct, n) == correct[-1]
    mean = sum(correct) / n
    for value in (
        pass_at_k(n, sum(correct), 1),
        maj_at_k(answers, "1", 1),
        rerank_at_k(scores, correct, 1),
    ):
        assert value == pytest.approx(mean, abs=1e-12)


def test_maj_is_exact_at_96_samples_and_many_distinct_answers():
    """Against the same count done with integers, from the votes of gold outward."""
    counts = [20, 20, 13, 9, 5, 3, 2, 2, *[1] * 16]  # 90 votes, gold the first
    answers = [str(i) for i, c in enumerate(counts) for _ in range(c)] + [None] * 6
    curve = maj_curve(answers, "0")
    for k in (1, 2, 8, 37, 95, 96):
        exact = exact_majority(counts[0], counts[1:], 6, k)
        assert curve[k - 1] == pytest.approx(float(exact), abs=1e-12)


@given(st.integers(1, 120), st.data())
def test_certain_wins_are_one_and_never_above_by_rounding(n, data):
    nones = data.draw(st.integers(0, n - 1))
    answers = ["7"] * (n - nones) + [None] * nones
    curve = maj_curve(answers, "7")
    assert curve.max() <= 1.0
    assert curve[nones:] == pytest.approx(1.0, abs=1e-12)
    k = data.draw(st.integers(1, n))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    assert 1 - 1e-12 <= rerank_at_k(scores, [True] * n, k) <= 1.0


def exact_majority(gold, rivals, without, k):
    """maj@k as a fraction, by a table over (votes so far, ties so far) of integers."""
    total = Fraction(0)
    for m in range(1, gold + 1):
        table = {(0, 0): 1}
        for c in rivals:
            grown = Counter()
            for (used, ties), ways in table.items():
                for v in range(min(c, m) + 1):
                    grown[used + v, ties + (v == m)] += ways * comb(c, v)
            table = {key: ways for key, ways in grown.items() if key[0] <= k - m}
        for (used, ties), ways in table.items():
            rest = comb(without, k - m - used)
            total += Fraction(comb(gold, m) * ways * rest, ties + 1)
    return total / comb(96, k)


@pytest.mark.parametrize(
    ("answers", "k", "value"),
    [
        (["7"] * 96, 8, 1.0),
        ([str(i) for i in range(96)], 96, 1 / 96),
        ([None] * 96, 8, 0.0),
        (["8"] * 48 + ["7"] * 48, 96, 0.5),
        (["7"] + [None] * 95, 96, 1.0),
        (["7"] * 500 + ["8"] * 500, 499, 0.5),
    ],
    ids=["all-right", "all-differ", "no-votes", "tie", "one-vote", "most-samples"],
)
def test_maj_at_the_ends_of_its_range(answers, k, value):
    assert maj_at_k(answers, "7", k) == pytest.approx(value, abs=1e-12)


def test_p43_votes_are_numbers_and_not_strings():
    answers = ["42", "42.0", "$42", "43", "43"]
    assert maj_at_k(answers, "42.00", 5) == 1.0
    assert Counter(answers).most_common(1)[0][0] == "43"  # what strings would elect


def test_p43_none_never_outvotes_a_number():
    answers = ["7", None, None, None]
    assert maj_at_k(answers, "7", 4) == 1.0
    assert Counter(answers).most_common(1)[0][0] is None


def test_order_of_ties_does_not_decide():
    both = [["7", "8"], ["8", "7"]]
    assert [maj_at_k(a, "7", 2) for a in both] == [0.5, 0.5]
    assert [Counter(a).most_common(1)[0][0] == "7" for a in both] == [True, False]


def test_p42_wrong_forms_of_pass_at_k_are_biased():
    n, c, k = 96, 1, 96
    generator = np.random.default_rng(0)
    picks = generator.integers(0, n, (4000, k))
    bootstrap = float((picks < c).any(axis=1).mean())
    naive = 1 - (1 - c / n) ** k
    assert pass_at_k(n, c, k) == 1.0
    assert naive == pytest.approx(0.634, abs=0.001)
    assert bootstrap == pytest.approx(naive, abs=0.05)


def test_what_the_question_decides_is_the_spread_of_its_chances():
    # Chances from Beta(a, b) decide 1 / (a + b + 1) of the variance of an answer
    generator = np.random.default_rng(0)
    drawn = generator.beta(1, 2, (2000, 60))
    counts = generator.binomial(4, drawn)
    found = np.mean([known_from_question(4, row) for row in counts])
    assert found == pytest.approx(1 / 4, abs=0.01)
    # The spread of the shares has that of four samples in it as well
    shares = counts / 4
    naive = np.mean(shares.var(1) / (shares.mean(1) * (1 - shares.mean(1))))
    assert naive > 0.4


def test_what_the_question_decides_at_its_ends():
    assert known_from_question(8, [8, 0, 8, 0]) == pytest.approx(1)
    assert known_from_question(96, [48] * 100) == pytest.approx(0, abs=0.02)
    assert isnan(known_from_question(4, [4, 4]))
    assert isnan(known_from_question(4, [0, 0]))
    with pytest.raises(ValueError, match="is no count"):
        known_from_question(4, [6, 1])
    for n, counts in ((1, [1, 0]), (4, [2])):
        with pytest.raises(ValueError, match="two of two are needed"):
            known_from_question(n, counts)


def test_the_first_k_have_the_same_mean_as_pass_at_k_and_far_more_variance():
    generator = np.random.default_rng(0)
    correct = generator.random((2000, 96)) < 0.05
    first = correct[:, :8].any(axis=1).astype(float)
    exact = np.array([pass_at_k(96, int(row.sum()), 8) for row in correct])
    assert exact.mean() == pytest.approx(1 - 0.95**8, abs=0.01)
    assert first.mean() == pytest.approx(1 - 0.95**8, abs=0.05)
    assert exact.var() < first.var() / 5


def test_p44_the_first_nan_does_not_win():
    scores, correct = [nan, 0.1, 0.9], [False, False, True]
    assert rerank_at_k(scores, correct, 3) == 1.0
    assert isnan(max(scores))  # NaN compares false with all, so max keeps it


def test_p44_a_fixed_order_does_not_decide_between_equal_scores():
    assert rerank_at_k([1.0, 1.0], [True, False], 2) == 0.5
    assert rerank_at_k([1.0, 1.0], [False, True], 2) == 0.5


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_of_one_to_n_is_an_error(k):
    for call in (
        lambda: pass_at_k(4, 2, k),
        lambda: maj_at_k(["1"] * 4, "1", k),
        lambda: rerank_at_k([0.0] * 4, [True] * 4, k),
    ):
        with pytest.raises(ValueError, match="k must be between 1 and n"):
            call()


def test_impossible_input_is_an_error():
    with pytest.raises(ValueError, match="not possible"):
        pass_at_k(4, 5, 2)
    with pytest.raises(ValueError, match="not a number"):
        maj_at_k(["1"], "many", 1)
    with pytest.raises(ValueError, match="2 scores for 1 samples"):
        rerank_at_k([0.1, 0.2], [True], 1)
    with pytest.raises(ValueError, match="at most 1000"):
        maj_at_k(["1"] * 1001, "1", 1)


def test_p45_no_metric_touches_the_global_random_streams():
    def states():
        kind, keys, *rest = np.random.get_state()
        return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state()

    before = states()
    pass_at_k(10, 3, 5)
    maj_at_k(["1", "2", None, "1"], "1", 2)
    rerank_at_k([0.1, 0.1, 0.3], [True, False, True], 2)
    distinct_at_k([2, 1], 5, 3)
    after = states()
    assert before[:-1] == after[:-1]
    assert torch.equal(before[-1], after[-1])


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=8))
def test_distinct_at_k_is_the_mean_number_over_all_subsets(kinds):
    n = len(kinds)
    counts = list(Counter(kind for kind in kinds if kind).values())
    for k in range(1, n + 1):
        truth = mean_over_subsets(n, k, lambda s: len({kinds[i] for i in s} - {None}))
        assert distinct_at_k(counts, n, k) == pytest.approx(truth, abs=1e-12)


def test_solutions_with_the_same_operations_are_one():
    texts = [
        "He has 2 + 3 = <<2+3=5>>5.\n#### 5",
        "Together <<2 + 3 = 5>>5 apples.\n#### 5",
        "Together <<3+2=5>>5 apples.\n#### 5",
    ]
    assert sorted(Counter(map(operation_key, texts)).values()) == [1, 2]
    with pytest.raises(ValueError, match="not possible"):
        distinct_at_k([3], 2, 1)

"""Coverage, novelty and crossings: against enumeration, and against a planted truth."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import TOY_PROBLEMS, toy_policy, toy_recipe, toy_solutions

from rlreason.algorithms.rcrl import GOOD
from rlreason.evaluation.diversity import (
    Solutions,
    count_solutions,
    distinct_at_k,
    repeated_at_k,
    shared_at_k,
)
from rlreason.experiments.coverage import (
    beyond_own,
    coverage,
    crossing,
    distinct_curve,
    distinct_differences,
    draw_solutions,
    novelty,
    own_coverage,
    pass_curve,
    pass_differences,
    powers_to,
    read_solutions,
    solutions,
    variety,
)
from rlreason.experiments.measures import Context
from rlreason.policy.rollout import Rollout
from rlreason.tasks.answers import operation_key

# Against all subsets


def mean(values):
    values = [Fraction(value) for value in values]
    return float(sum(values) / len(values))


def some_samples(most):
    return st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=2, max_size=most)


def found_in(samples, places):
    return {samples[i] for i in places} - {None}


def counts_of(samples):
    return dict(Counter(sample for sample in samples if sample))


@given(some_samples(6), st.integers(1, 4), st.data())
def test_what_is_seen_often_is_the_mean_over_all_subsets(samples, times, data):
    k = data.draw(st.integers(1, len(samples)))
    truth = mean(
        sum(n >= times for n in counts_of([samples[i] for i in some]).values())
        for some in combinations(range(len(samples)), k)
    )
    counts = [*counts_of(samples).values()]
    found = distinct_at_k(counts, len(samples), k, times=times)
    assert found == pytest.approx(truth, abs=1e-12)


@given(some_samples(5), some_samples(5), st.data())
def test_what_two_policies_share_is_the_mean_over_all_pairs_of_subsets(a, b, data):
    m, k = data.draw(st.integers(1, len(a))), data.draw(st.integers(1, len(b)))
    truth = mean(
        len(found_in(a, some) & found_in(b, others))
        for some in combinations(range(len(a)), m)
        for others in combinations(range(len(b)), k)
    )
    sizes = {"n_of": len(a), "m": m, "n_by": len(b), "k": k}
    found = shared_at_k(counts_of(a), counts_of(b), **sizes)
    assert found == pytest.approx(truth, abs=1e-12)


@given(some_samples(7), st.data())
def test_what_a_policy_repeats_is_the_mean_over_all_disjoint_subsets(samples, data):
    n = len(samples)
    m = data.draw(st.integers(1, n - 1))
    k = data.draw(st.integers(1, n - m))
    truth = mean(
        len(found_in(samples, some) & found_in(samples, others))
        for some in combinations(range(n), m)
        for others in combinations(sorted(set(range(n)) - set(some)), k)
    )
    counts = counts_of(samples)
    assert repeated_at_k(counts, n=n, m=m, k=k) == pytest.approx(truth, abs=1e-12)
    # The wrong version finds a sample in itself
    twice = shared_at_k(counts, counts, n_of=n, m=m, n_by=n, k=k)
    assert twice >= truth - 1e-12


def test_what_is_rare_is_not_repeated_though_the_same_counts_share_it():
    assert repeated_at_k({"a": 1}, n=2, m=1, k=1) == 0
    assert shared_at_k({"a": 1}, {"a": 1}, n_of=2, m=1, n_by=2, k=1) > 0


# What is counted

QUESTION = TOY_PROBLEMS[0]  # its answer is 2


def answers(*texts):
    return [
        Rollout(QUESTION.id, i, (), (), (), text, True) for i, text in enumerate(texts)
    ]


def test_wrong_solutions_are_not_counted_and_words_do_not_matter():
    right, again, other = toy_solutions(2)
    wrong, *_ = toy_solutions(3)
    found = count_solutions(QUESTION, answers(right, wrong, again, other, wrong))
    assert sorted(found.values()) == [1, 2]
    # The wrong version: a policy that is never right would cover one that is as wrong
    assert Counter(map(operation_key, [wrong, wrong])).total() == 2
    assert not count_solutions(QUESTION, answers(wrong, wrong))


def test_a_policy_without_a_correct_solution_has_no_share_of_them():
    never, once = Solutions(2, {"q": {}}), Solutions(2, {"q": {"a": 1}})
    with pytest.raises(ValueError, match="no correct solution"):
        coverage([never], [once], [1], m=1)
    assert coverage([once], [never], [1], m=1)[1].mean == 0


def test_what_cannot_be_paired_is_refused():
    one, other = Solutions(2, {"q": {"a": 1}}), Solutions(2, {"r": {"a": 1}})
    for seeds in ([other], [one, one]):
        with pytest.raises(ValueError, match="cannot be paired"):
            pass_differences([one], seeds, [1])


# Policies of which the truth is known: solution i has the chance i of a list


def drawn(chances, samples, seed, problems=40):
    """Samples of a policy that solves each of some problems with the same chances."""
    generator = np.random.default_rng(seed)
    wrong = 1 - sum(chances)
    table = generator.multinomial(samples, [*chances, wrong], size=problems)[:, :-1]
    counts = {
        str(i): {str(name): int(c) for name, c in enumerate(row) if c}
        for i, row in enumerate(table)
    }
    return Solutions(samples, counts)


LONG_TAIL = [0.2, 0.1, *[0.002] * 100]  # a hundred rare solutions


def test_share_and_curves_are_those_of_the_policy_and_intervals_hold_them():
    p = np.array(LONG_TAIL)
    of, by = [drawn(p, 200, 1)], [drawn(p[:50], 400, 2)]
    for m, k in ((1, 40), (96, 200)):
        seen, known = 1 - (1 - p) ** m, 1 - (1 - p) ** k
        known[50:] = 0
        share = float((seen * known).sum() / seen.sum())
        measured = coverage(of, by, [k], m=m)[k]
        assert measured.mean == pytest.approx(share, abs=0.03)
        assert not measured.excludes(share)
        distinct = distinct_curve(of, [m])[m]
        assert distinct.mean == pytest.approx(seen.sum(), rel=0.05)
        assert not distinct.excludes(seen.sum())


def test_the_interval_of_a_share_holds_the_truth_about_as_often_as_it_says():
    """Problems differ in how many solutions they have and in what is covered."""
    generator, held, runs = np.random.default_rng(0), 0, 150
    for _ in range(runs):
        many = generator.random(40) < 0.3
        covered = generator.random(40) < np.where(many, 0.9, 0.4)
        of = {str(i): {str(j): 1 for j in range(1 + 3 * m)} for i, m in enumerate(many)}
        by = {p: of[p] if c else {} for p, c in zip(of, covered, strict=True)}
        share = coverage([Solutions(4, of)], [Solutions(4, by)], [4], m=4)[4]
        held += not share.excludes((0.3 * 4 * 0.9 + 0.7 * 0.4) / (0.3 * 4 + 0.7))
    assert 0.90 <= held / runs <= 0.98


def test_pass_at_k_from_few_samples_is_that_of_the_policy():
    truth = 1 - 0.9**32
    curve = pass_curve([drawn([0.1], 32, 0, problems=2000)], [1, 32])
    assert curve[32].mean == pytest.approx(truth, abs=0.01)
    # The wrong version puts the share that is right into the formula of the truth
    found = drawn([0.1], 32, 0, problems=2000).counts.values()
    plugged_in = np.mean([1 - (1 - sum(c.values()) / 32) ** 32 for c in found])
    assert plugged_in < truth - 0.05
    assert curve[1].low <= 0.1 <= curve[1].high


# Novelty


def test_being_right_more_often_is_nothing_new():
    """Twice as often right, by the same solutions in the same shares."""
    before = drawn([x / 2 for x in LONG_TAIL], 192, 1)
    after = drawn(LONG_TAIL, 96, 2)
    # The wrong version: more right answers hold more rare solutions
    assert novelty([after], [before], m=96, k=96, as_right=False).low > 0
    assert not novelty([after], [before], m=96, k=96).excludes(0)
    assert not variety([after], [before], right=8).excludes(0)
    gap = distinct_differences([before], [after], [96])[96]
    assert gap.low > 0
    assert not beyond_own([after], [before], m=1, k=96).excludes(0)


def test_as_many_right_answers_are_never_more_samples_than_there_are():
    one = Solutions(10, {"q": {"a": 1}, "r": {"b": 1}})
    assert 3 * 0.1 / 0.1 > 3  # which would ask for a fourth sample of three
    assert novelty([one], [one], m=3, k=7).mean == pytest.approx(0.09 - 0.3)


def test_weight_on_fewer_solutions_is_less_variety_among_as_many_right_answers():
    before, after = drawn([0.1] * 4, 96, 1), drawn([0.7, 0.1], 96, 2)
    assert variety([after], [before], right=4).high < 0
    never = Solutions(96, {key: {} for key in before.counts})
    assert variety([never], [before], right=4) is None


def test_a_policy_drawn_twice_has_no_more_news_than_chance_makes():
    first, second = drawn(LONG_TAIL, 192, 1), drawn(LONG_TAIL, 96, 2)
    assert not novelty([second], [first], m=96, k=96).excludes(0)
    own = own_coverage([first], [96], m=96)[96]
    other = coverage([second], [first], [96], m=96)[96]
    assert own.mean == pytest.approx(other.mean, abs=0.03)
    assert other.high < 0.4  # and nobody would say that a policy lacks 60% of itself


def test_one_frequent_new_solution_a_question_is_found():
    before = drawn([*LONG_TAIL[:10], 0.0], 192, 1)
    after = drawn([*LONG_TAIL[:10], 0.3], 96, 2)
    found = novelty([after], [before], m=96, k=96, as_right=False)
    assert found.excludes(0)
    assert not found.excludes(1)
    # Of as many right answers fewer are by the old rare ones, which is taken off
    assert novelty([after], [before], m=96, k=96).low > 0


def test_a_policy_that_knows_less_has_fewer_news_than_chance():
    before, after = drawn(LONG_TAIL, 192, 1), drawn([0.5, 0.3], 96, 2)
    found = novelty([after], [before], m=96, k=96)
    assert found.high < 0
    # And the other way round what was forgotten shows
    mirror = coverage([before], [after], [96], m=96)[96]
    assert mirror.high < coverage([after], [before], [96], m=96)[96].low


# Crossing

HALF = Solutions(64, {str(i): {"a": 64} if i % 2 else {} for i in range(40)})


def test_curves_cross_where_they_do():
    """Always right on half of the problems, against one time in ten on all of them."""
    before = drawn([0.1], 64, 0)
    found = crossing([before], [HALF], powers_to(64))
    truth = np.log(0.5) / np.log(0.9)  # 6.6 samples
    assert found.at == pytest.approx(truth, rel=0.25)
    assert found.low < truth < found.high
    differences = pass_differences([before], [HALF], [1, 64])
    assert differences[1].low > 0 > differences[64].high


def test_curves_that_do_not_cross_have_no_crossing():
    always = drawn([1.0], 64, 0)
    found = crossing([HALF], [always], powers_to(64))
    assert (found.at, found.low, found.high) == (inf, inf, inf)
    assert "none up to 64" in str(found)
    assert crossing([always], [HALF], powers_to(64)).at == 1  # ahead from the first on
    assert crossing([always], [always], powers_to(64)).at == inf


# Sampling


def test_the_same_random_numbers_would_cover_a_policy_by_itself():
    policy, problems = toy_policy(), TOY_PROBLEMS
    settings = {"samples": 2, "temperature": 1.0, "max_new_tokens": 24}
    one, other = (
        draw_solutions(policy, problems, stream=name, progress=False, **settings)
        for name in ("sft 0", "ppo 0")
    )
    again = draw_solutions(policy, problems, stream="sft 0", progress=False, **settings)
    assert again == one != other  # the wrong version: one stream for both
    assert coverage([again], [one], [2], m=2)[2].mean == 1
    assert coverage([other], [one], [2], m=2)[2].mean < 1


def test_measured_solutions_go_through_json_and_are_asked_for_with_the_label(tmp_path):
    recipe, asked = toy_recipe(tmp_path), []

    def sampler(policy, problems, *, k, seed, label, **settings):
        asked.append((label, seed, settings["temperature"]))
        for i, problem in enumerate(problems):
            texts = toy_solutions(int(problem.answer))[:k]
            yield (
                i,
                [
                    Rollout(problem.id, j, (), (), (), text, True)
                    for j, text in enumerate(texts)
                ],
            )

    context = Context(recipe)
    for arm in ("sft", "rcrl"):
        rows = {}
        for seed in range(recipe.seeds):
            subject = context.subject(arm, recipe.policy, seed)
            values = solutions(context, subject, None, sampler=sampler)
            rows[seed] = SimpleNamespace(values=json.loads(json.dumps(values)))
        each = read_solutions(rows)
        assert len(each) == recipe.seeds
        assert [sorted(c.values()) for c in each[0].counts.values()] == [[1, 2]] * 6
        assert distinct_curve(each, [3])[3].n == recipe.seeds
    assert [label for label, *_ in asked] == [None, None, GOOD, GOOD]
    assert len({seed for _, seed, _ in asked}) == 4  # each has a stream of its own
    assert {t for *_, t in asked} == {recipe.evaluation.temperature}


def test_distinct_solutions_of_a_seed_are_those_of_the_report():
    counts = {"a": 2, "b": 1}
    found = distinct_curve([Solutions(4, {"q": counts, "r": {}})], [2])[2]
    assert found.mean == distinct_at_k([2, 1], 4, 2) / 2

"""The dense reward: what a step earns, where, and why farming it does not pay."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_policy

from rlreason.mdp import step_spans
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.rewards import dense_reward, sparse_token_rewards
from rlreason.rewards.dense import RESPONSE_BEGINS, share_stated
from rlreason.tasks.answers import parse_solution
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response

# Four results, 12 among them twice
STEPS = ("He has <<3*4=12>>12.", "<<12/2=6>>6", "<<6*2=12>>12", "so <<12+8=20>>20")
PROBLEM = Problem("p", "How many?", "\n".join([*STEPS, "#### 20"]), "20")
PLAIN = Problem("plain", "Half of 10?", "#### 5", "5")
BOUND = 0.5

lines = st.lists(
    st.sampled_from(
        [*STEPS, "<<24/2=12.0>>", "<<1+1=2>>", "no number", "<<3*=6", "<<x=6>>", "\n"]
    ),
    max_size=12,
)
endings = st.sampled_from(["#### 20", "#### 21", ""])


@lru_cache(maxsize=1)
def policy() -> Policy:
    return tiny_policy()


def rollout(
    text: str, *, problem: Problem = PROBLEM, prefix: str = "", finished: bool = True
) -> Rollout:
    """``text`` as an answer that goes on from ``prefix``."""
    prompt = format_prompt(problem)
    given = policy().encode_response(prompt, prefix)[:-1]
    tokens = policy().encode_response(prompt, text)
    tokens = tokens if finished else tokens[:-1]
    return Rollout(
        problem_id=problem.id,
        sample=0,
        prompt_tokens=(*policy().encode_prompt(prompt), *given),
        tokens=tuple(tokens),
        logprobs=(0.0,) * len(tokens),
        text=text,
        finished=finished,
    )


def pay(rollout: Rollout, *, bound: float = BOUND) -> tuple[float, ...]:
    (row,) = dense_reward(policy(), bound=bound)([rollout], [PLAIN, PROBLEM])
    return row


def paid_at(rollout: Rollout) -> dict[str, float]:
    """What was paid, by the text up to and including the paid token."""
    row = pay(rollout)
    decode = policy().decode
    return {decode(rollout.tokens[: t + 1]): p for t, p in enumerate(row) if p}


def obvious_total(texts: list[str], right: bool, given: list[str] = ()) -> float:
    """From the definition: walk through the steps and use the results up."""
    unused = [12.0, 6.0, 12.0, 20.0]
    earned = float(right)
    for i, text in enumerate([*given, *texts]):
        for result in parse_solution(text).results:
            value = float(result) if result.replace(".", "").isdigit() else None
            if value in unused:
                unused.remove(value)
                earned += BOUND / 4 if i >= len(given) else 0.0
    return earned


def test_each_match_is_paid_at_the_end_of_its_step_and_the_answer_at_the_end():
    text = format_response(PROBLEM.solution)
    at = {}
    for i in range(4):
        at[" " + "\n".join(STEPS[: i + 1]) + "\n"] = BOUND / 4
    at[text] = 1.0  # EOS decodes to nothing
    assert paid_at(rollout(text)) == pytest.approx(at)


@given(lines, endings, st.booleans())
def test_the_total_is_that_of_walking_through_the_steps(texts, ending, finished):
    text = "\n".join([*texts, ending])
    sample = rollout(text or "a", finished=finished)
    row = pay(sample)
    assert len(row) == len(sample.tokens)
    assert sum(row) == pytest.approx(obvious_total(texts, ending == "#### 20"))
    (answer,) = sparse_token_rewards([sample], [PROBLEM])
    extra = [r - a for r, a in zip(row, answer, strict=True)]
    ends = {
        end - 1 for _, end in step_spans([policy().decode([t]) for t in sample.tokens])
    }
    assert all(e == 0 or (e > 0 and t in ends) for t, e in enumerate(extra))


@given(lines, lines, st.floats(0.01, 0.99))
def test_a_wrong_answer_earns_less_than_any_right_one_whatever_the_steps(a, b, bound):
    wrong = sum(pay(rollout("\n".join([*a, "#### 21"])), bound=bound))
    right = sum(pay(rollout("\n".join([*b, "#### 20"])), bound=bound))
    assert wrong <= bound + 1e-12
    assert wrong < 1 <= right


def test_repeating_a_step_earns_nothing():
    honest = sum(pay(rollout("\n".join([*STEPS, "#### 20"]))))
    farmed = "\n".join([STEPS[1]] * 50 + ["#### 21"])
    assert sum(pay(rollout(farmed))) == pytest.approx(BOUND / 4)
    # Paying every step whose result is in the reference, used or not, is farmed
    reference = set(parse_solution(PROBLEM.solution).results)
    results = parse_solution(farmed).results
    naive = sum(BOUND / 4 for result in results if result in reference)
    assert naive > honest > 1


def test_a_result_that_the_reference_has_twice_is_paid_twice_and_not_three_times():
    totals = [sum(pay(rollout("\n".join([STEPS[0]] * n)))) for n in (1, 2, 3)]
    assert totals == pytest.approx([BOUND / 4, BOUND / 2, BOUND / 2])


@pytest.mark.parametrize(
    "result", ["12", "12.0", "12.", " 12 ", "$12", "24/2", "1,2", "twelve", "-12"]
)
def test_results_are_compared_as_numbers(result):
    equal = result not in ("1,2", "twelve", "-12")
    assert share_stated(f"<<3*4={result}>>", PROBLEM) == (0.25 if equal else 0.0)


def test_two_results_on_one_line_are_both_paid_at_its_end():
    text = f"{STEPS[0]} {STEPS[1]}\nand more"
    assert paid_at(rollout(text)) == pytest.approx({text[:-8]: BOUND / 2})


def test_nothing_is_paid_for_results_behind_the_answer_mark():
    text = "#### 21\n" + "\n".join(STEPS)
    assert sum(pay(rollout(text))) == 0.0


def test_a_reference_without_steps_leaves_the_sparse_reward():
    batch = [
        rollout(text, problem=PLAIN) for text in ("<<10/2=5>>5\n#### 5", "<<10/2=5>>5")
    ]
    paid = dense_reward(policy())(batch, [PLAIN])
    assert paid == sparse_token_rewards(batch, [PLAIN])


@given(st.integers(0, 4), lines, endings)
def test_what_the_prompt_already_states_is_not_paid(given_steps, texts, ending):
    start = list(STEPS[:given_steps])
    prefix = "".join(f"{line}\n" for line in start)
    sample = rollout("\n".join([*texts, ending]) or "a", prefix=prefix)
    expected = obvious_total(texts, ending == "#### 20", start)
    assert sum(pay(sample)) == pytest.approx(expected)


def test_a_prefix_alone_leaves_less_to_earn_and_steps_of_shots_use_nothing_up():
    whole = rollout("\n".join(STEPS))
    rest = rollout("\n".join(STEPS), prefix=f"{STEPS[1]}\n{STEPS[3]}\n")
    assert sum(pay(whole)) == pytest.approx(BOUND)
    assert sum(pay(rest)) == pytest.approx(BOUND / 2)
    shot = Problem("shot", "A: or\nA: not?", PROBLEM.solution, "20")
    prompt = format_prompt(PROBLEM, [shot, shot])
    assert prompt.endswith(RESPONSE_BEGINS)
    with_shots = Rollout(
        **{
            **{name: getattr(whole, name) for name in Rollout.__slots__},
            "prompt_tokens": tuple(policy().encode_prompt(prompt)),
        }
    )
    assert pay(with_shots) == pay(whole)


def test_rows_do_not_depend_on_their_neighbours():
    batch = [rollout(t) for t in ("\n".join(STEPS), "#### 20", STEPS[2], "é<<3*4=12>>")]
    paid = dense_reward(policy())(batch, [PROBLEM, PLAIN])
    assert paid == [pay(sample) for sample in batch]
    assert dense_reward(policy())([], [PROBLEM]) == []


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.5, float("nan")])
def test_a_bound_that_outweighs_the_answer_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        dense_reward(policy(), bound=bound)

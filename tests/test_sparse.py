"""The sparse reward: what earns it, and on which token it stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlreason.mdp import token_rewards
from rlreason.policy.rollout import Rollout
from rlreason.rewards import sparse_rewards, sparse_token_rewards
from rlreason.tasks.problem import Problem

PROBLEMS = [Problem("a", "1+1?", "#### 2", "2"), Problem("b", "2+1?", "#### 3", "3")]


def rollout(problem: str, text: str, length: int, *, finished: bool = True) -> Rollout:
    return Rollout(
        problem_id=problem,
        sample=0,
        prompt_tokens=(1, 5),
        tokens=tuple(range(10, 10 + length)),
        logprobs=(0.0,) * length,
        text=text,
        finished=finished,
    )


@pytest.mark.parametrize("finished", [True, False])
def test_p19_reward_stands_on_the_last_token(finished):
    width = 5
    batch = [
        rollout("a", "#### 2", n, finished=finished) for n in (1, width - 1, width)
    ]
    paid = sparse_token_rewards(batch, PROBLEMS)
    for row, r in zip(paid, batch, strict=True):
        assert len(row) == len(r.tokens)
        assert [t for t, reward in enumerate(row) if reward] == [len(r.tokens) - 1]
    padded = [[*row, *[0.0] * (width - len(row))] for row in paid]
    assert padded == token_rewards([1, width - 1, width], [1.0] * 3).tolist()
    # The last column is the last token of the longest row alone
    wrong = [[0.0] * (width - 1) + [1.0] for _ in batch]
    lost = [sum(row[: len(r.tokens)]) for row, r in zip(wrong, batch, strict=True)]
    assert lost == [0.0, 0.0, 1.0]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from(["#### 2", "#### 3", "2"]),
            st.integers(1, 9),
        )
    ),
    st.permutations(PROBLEMS),
)
def test_tokens_add_up_to_the_rollouts_reward_in_any_order_of_problems(drawn, problems):
    batch = [rollout(*row) for row in drawn]
    expected = [
        float((p, t) in {("a", "#### 2"), ("b", "#### 3")}) for p, t, _ in drawn
    ]
    assert sparse_rewards(batch, problems) == expected
    assert [sum(row) for row in sparse_token_rewards(batch, problems)] == expected


def test_an_unknown_problem_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"1 problem\(s\).*'c'"):
        sparse_token_rewards([rollout("c", "#### 2", 1)], PROBLEMS)


def test_a_response_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="without tokens"):
        sparse_token_rewards([rollout("a", "#### 2", 0)], PROBLEMS)

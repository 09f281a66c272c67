r"""The dense heuristic reward: intermediate results of the reference, plus the answer.

Havrilla et al. (2024), section 3, reward a generated step that matches a step of the
reference solution. A step *matches* where it states an intermediate result (the
right-hand side of a ``<<48/2=24>>``) that the reference states too and that no earlier
step has used up. With n results in the reference, each match earns ``bound / n`` at the
end of its step; the final answer earns 1 on the last token, as in the sparse reward.

- *Bounded.* The reference is a multiset and each of its results counts once, so
  repeating a step earns nothing and all steps together earn at most ``bound < 1``: a
  wrong answer after a perfect derivation earns less than any right answer.
- *Results alone count*, compared as numbers; how they were computed and in which order
  does not. This matches the authors' earlier code; magnitudes are not known from the
  paper, so ``bound`` is this project's.
- *Prefixes.* Where a prompt holds the start of a response (backtracking), what it
  states counts as used: nobody earns what was given.
- *No derivation, no bonus.* A reference without annotations leaves the sparse part.

Unlike potential-based shaping (``rewards.shaping``) this bonus is never taken back, so
it changes what is optimal: it prefers the reference's way to others that are as right.
Left out: a price for steps that match nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from rlreason.mdp import step_spans
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import RewardFunction, problems_of
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.tasks.answers import canonical_number, parse_solution
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import RESPONSE_BEGINS


def dense_reward(policy: Policy, *, bound: float = 0.5) -> RewardFunction:
    """The dense heuristic as a reward function.

    Args:
        policy: Whose tokenizer made the rollouts' tokens.
        bound: What all matched steps together earn at most, in (0, 1).

    Raises:
        ValueError: ``bound`` would let steps outweigh the final answer.
    """
    if not 0 < bound < 1:
        raise ValueError(
            f"bound={bound}: the steps together must earn more than 0 and less than "
            f"the final answer's 1; give a number between them, e.g. 0.5"
        )

    def reward(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        asked = problems_of(rollouts, problems)
        pieces = token_pieces(policy, rollouts)
        given = given_texts(policy, rollouts)
        rewards = []
        for i, answer in enumerate(sparse_token_rewards(rollouts, asked)):
            tokens = rollouts[i].tokens
            ends = [end for _, end in step_spans([pieces[t] for t in tokens])]
            shares = stated_shares(policy, given[i], tokens, ends, asked[i])
            row = list(answer)
            for end, (before, after) in zip(ends, pairwise(shares), strict=True):
                row[end - 1] += bound * (after - before)
            rewards.append(tuple(row))
        return rewards

    return reward


def share_stated(text: str, problem: Problem) -> float:
    """The share of the reference's intermediate results that ``text`` states, 0 to 1.

    Multisets: a result that the reference states twice has to be stated twice, and
    stating it a third time adds nothing. 0 where the reference states none.

    >>> problem = Problem("p", "?", "<<1+1=2>> <<2*3=6>> <<6-4=2>>\\n#### 2", "2")
    >>> share_stated("so <<8/4=2.0>> and <<1+1=2>> and <<4-2=2>>", problem)
    0.6666666666666666
    """
    reference = _results(problem.solution)
    if not reference:
        return 0.0
    return (reference & _results(text)).total() / reference.total()


def states_results(problem: Problem) -> bool:
    """Whether the reference states an intermediate result, which a step can match."""
    return bool(_results(problem.solution))


def stated_shares(
    policy: Policy,
    given: str,
    tokens: Sequence[int],
    ends: Sequence[int],
    problem: Problem,
) -> list[float]:
    """``share_stated`` before the first token and after each of ``ends`` tokens.

    Each text is decoded whole, so that no character or annotation is cut by a boundary
    between tokens. ``given`` is the start of the response that the prompt holds.
    """
    texts = policy.decode_batch([tokens[:end] for end in ends])
    return [share_stated(given + text, problem) for text in ("", *texts)]


def token_pieces(policy: Policy, rollouts: Sequence[Rollout]) -> dict[int, str]:
    """The text of every token that occurs in the responses, each decoded once."""
    ids = sorted({token for rollout in rollouts for token in rollout.tokens})
    return dict(zip(ids, policy.decode_batch([[i] for i in ids]), strict=True))


def given_texts(policy: Policy, rollouts: Sequence[Rollout]) -> list[str]:
    """The start of a response that each rollout's prompt holds; often there is none.

    It is what follows the last ``RESPONSE_BEGINS``, with which
    ``tasks.prompts.format_prompt`` ends. A prompt of another format holds none.
    """
    prompts = list(dict.fromkeys(rollout.prompt_tokens for rollout in rollouts))
    texts = dict(zip(prompts, policy.decode_batch(prompts), strict=True))
    given = {p: text.rpartition(RESPONSE_BEGINS) for p, text in texts.items()}
    return [
        after if mark else ""
        for _, mark, after in (given[rollout.prompt_tokens] for rollout in rollouts)
    ]


@lru_cache(maxsize=4096)  # a reference is read for every step of every sample
def _results(text: str) -> Counter[str]:
    """Intermediate results by their canonical names; what is no number is left out.

    The counter is shared between callers: not to be changed.
    """
    names = (canonical_number(result) for result in parse_solution(text).results)
    return Counter(name for name in names if name is not None)

"""How many ways to the answer a policy knows: distinct correct operation sequences.

Two solutions are one where they compute the same sequence of arithmetic operations,
however they are worded; that is the paper's measure, and the rule by which expert
iteration drops repeats. The count grows with the number of samples, so a comparison
needs equal K, or ``distinct_at_k``, which brings a larger K down to a smaller one.

What one policy knows of what another one knows is counted from ``Solutions``, which
keep how often each of two policies gave each correct solution:

===================  ==================================================================
``distinct_at_k``    solutions in k samples
``shared_at_k``      solutions in m samples of one policy that k of another have as well
``repeated_at_k``    the same within one policy: m samples, and k others of its own
===================  ==================================================================

A rare solution is in one sample and missing from the next of the *same* policy. So what
is new to another policy is compared with what is new to the policy itself: the third
line is what the second one gives where the two policies are one.

The first three are exact expectations over all subsets of the samples, and unbiased.
Left out: how different two sequences are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

from rlreason.evaluation.metrics import pass_at_k
from rlreason.policy.rollout import Rollout
from rlreason.rewards.sparse import sparse_reward
from rlreason.tasks.answers import operation_key
from rlreason.tasks.problem import Problem

Counts = Mapping[str, int]
"""How many of the samples of one problem have each correct solution."""


@dataclass(frozen=True)
class Solutions:
    """The correct solutions among the samples of one policy.

    Attributes:
        samples: Drawn a problem, wrong ones included.
        counts: ``Problem.id`` to name of a solution (``solution_name``) to how many of
            the samples have it. A problem without a correct sample has an empty one.
    """

    samples: int
    counts: Mapping[str, Counts]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``Solutions(**values)`` reads it."""
        counts = {problem: dict(counts) for problem, counts in self.counts.items()}
        return {"samples": self.samples, "counts": counts}


def count_solutions(problem: Problem, rollouts: Iterable[Rollout]) -> Counter[str]:
    """How many samples of one problem have each correct solution, by its name.

    Of thousands of samples most repeat a text, which is graded once.
    """
    texts = Counter(rollout.text for rollout in rollouts)
    first = {rollout.text: rollout for rollout in rollouts}
    found: Counter[str] = Counter()
    for text, times in texts.items():
        if sparse_reward(first[text], problem) == 1.0:
            found[solution_name(operation_key(text))] += times
    return found


def solution_name(operations: Sequence[str]) -> str:
    """A short name of a sequence of operations: 12 hexadecimal digits of its SHA-256.

    >>> solution_name(("2+3=5", "5*2=10"))
    'e46cb38592d1'
    """
    return hashlib.sha256(json.dumps(list(operations)).encode()).hexdigest()[:12]


def distinct_at_k(counts: Sequence[int], n: int, k: int, *, times: int = 1) -> float:
    """Expected number of distinct sequences in a random k of n samples (rarefaction).

    A sequence that c of the samples have is seen with the chance ``pass_at_k(n, c, k)``
    (Hurlbert, 1971). ``counts`` are the c of correct samples; they may sum to less than
    n, the rest being wrong.

    Args:
        times: How often a sequence has to be seen among the k to be counted.

    >>> distinct_at_k([2, 1], n=4, k=4)
    2.0
    >>> distinct_at_k([2, 1], n=4, k=4, times=2)
    1.0
    """
    if sum(counts) > n:
        raise ValueError(f"{sum(counts)} correct samples of {n} are not possible")
    if times > 1:
        return sum(_seen(n, c, k, times) for c in counts)
    return float(sum(pass_at_k(n, c, k) for c in counts))


@cache
def _seen(n: int, c: int, k: int, times: int) -> float:
    """Chance that k of n samples hold as many of c (hypergeometric)."""
    fewer = (comb(c, i) * comb(n - c, k - i) for i in range(min(times, k + 1)))
    return 1.0 - sum(fewer) / comb(n, k)


def shared_at_k(
    of: Counts, by: Counts, *, n_of: int, m: int, n_by: int, k: int
) -> float:
    """Expected number of distinct solutions in m samples that k of another have too.

    Args:
        of: Of the policy whose m solutions are looked for.
        by: Of the policy that has k samples to find them; drawn independently.
        n_of: Samples behind ``of``, at least m.
        n_by: Samples behind ``by``, at least k.

    Divided by ``distinct_at_k`` of the m it is the share that is found. With m = 1 each
    solution weighs as much as it is frequent.

    >>> shared_at_k({"a": 2, "b": 1}, {"a": 1}, n_of=4, m=4, n_by=2, k=1)
    0.5
    """
    return float(
        sum(
            pass_at_k(n_of, c, m) * pass_at_k(n_by, by.get(name, 0), k)
            for name, c in of.items()
        )
    )


def repeated_at_k(counts: Counts, *, n: int, m: int, k: int) -> float:
    """``shared_at_k`` of a policy with itself: in m samples and in k others of the n.

    A solution is in both of two disjoint subsets with the chance that it is in the one,
    plus in the other, less in the two together. Taking ``shared_at_k`` with the same
    counts twice would find every sample in itself, and be too high.

    >>> repeated_at_k({"a": 2}, n=2, m=1, k=1)
    1.0
    >>> repeated_at_k({"a": 1}, n=2, m=1, k=1)
    0.0
    """
    return float(
        sum(
            pass_at_k(n, c, m) + pass_at_k(n, c, k) - pass_at_k(n, c, m + k)
            for c in counts.values()
        )
    )

"""Which questions a learner is asked, from where, and which answers it learns from.

The exploration curricula of the paper's appendix (Havrilla et al., 2024), for
algorithms that sample in phases:

- *Uniform*, the default: every question once before any twice.
- *Backtracking*: some rows start from a state (x, P_i), with P_i a prefix of the
  reference solution that ends with a step. Early in training little is left to do;
  the prefix shrinks to nothing as training goes on.
- *Prioritized level replay* (Jiang, Grefenstette and Rocktaeschel, 2021): questions are
  levels, and those come back from which the policy could still learn.
- *Best K of N*: learn from the K best of a question's N samples (``best_k_of_n``).

``QuestionSampler`` holds the first three behind one face: ``next`` gives prompts,
``update`` takes back how much was learned from them. All that it draws is a function of
its seed and of its state, which is plain JSON.

Left out: level replay's other scores (policy entropy, margin, signed advantage), and
its annealed probability of replaying.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from functools import lru_cache
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from rlreason.mdp import step_spans
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Prompt
from rlreason.settings import Settings, ours, paper
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response, format_prompt, format_response

# --- Settings ----------------------------------------------------------------------


class UniformSettings(Settings):
    """Shuffled epochs."""

    kind: Literal["uniform"] = paper("uniform", "Every question once before any twice.")


class BacktrackingSettings(Settings):
    """Shuffled epochs, with the start of the reference given away at first."""

    kind: Literal["backtracking"] = paper(
        "backtracking", "Start from prefixes of the reference."
    )
    share: float = ours(0.5, "Share of rows that start from a prefix.", ge=0, le=1)
    start: float = ours(
        1.0, "Fraction of steps given when training begins.", gt=0, le=1
    )
    until: float = ours(0.5, "Progress of training at which none is given.", gt=0, le=1)


class ReplaySettings(Settings):
    """Prioritized level replay. Temperature and staleness are that paper's."""

    kind: Literal["replay"] = paper(
        "replay", "Replay the questions with much left to learn."
    )
    replay_probability: float = ours(
        0.5, "Chance of a known one while some are new.", ge=0, lt=1
    )
    temperature: float = ours(
        0.1, "beta: how far below the first rank priority reaches.", gt=0
    )
    staleness: float = ours(0.1, "rho: weight of how long ago a visit was.", ge=0, le=1)


# A field of another kind is an unknown key, and so an error
CurriculumSettings = Annotated[
    UniformSettings | BacktrackingSettings | ReplaySettings,
    Field(discriminator="kind", description="Which questions are asked next."),
]


# --- The sampler of questions ------------------------------------------------------


class QuestionSampler:
    """Hands out prompts for the next phase of sampling.

    Args:
        policy: Whose tokenizer makes the prompts.
        problems: The training questions, with ids of their own.
        settings: One of the three kinds.
        seed: Of all draws.
        shots: Solved examples to stand before each question.
    """

    def __init__(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        settings: UniformSettings | BacktrackingSettings | ReplaySettings,
        *,
        seed: int,
        shots: Sequence[Problem] = (),
    ) -> None:
        self.policy, self.problems, self.settings = policy, list(problems), settings
        self.seed, self.shots = seed, tuple(shots)
        self.index = {problem.id: i for i, problem in enumerate(self.problems)}
        if not self.problems or len(self.index) != len(self.problems):
            raise ValueError(
                f"{len(self.problems)} problems with {len(self.index)} different ids: "
                f"give at least one problem, and each of them once"
            )
        self.drawn = 0  # prompts handed out so far
        self.scores: dict[str, float] = {}  # of the last visit; level replay alone
        self.last_drawn: dict[str, int] = {}

    def next(self, n: int, *, progress: float) -> list[Prompt]:
        """The next ``n`` prompts.

        A question can come twice in one call; for a baseline over a question's samples
        (``credit.group_ids``) both then are one group. Each prompt has a ``stream`` of
        its own: without it two equal prompts would have equal samples.

        Args:
            n: How many.
            progress: Share of training that is done, 0 to 1; backtracking reads it.
        """
        prompts: list[Prompt] = []
        taken: set[int] = set()
        for _ in range(n):
            rng = Random(f"{self.seed} {self.drawn}")
            if len(taken) == len(self.problems):
                taken.clear()
            i = self._choose(rng, taken)
            taken.add(i)
            tokens = self._state(rng, self.problems[i], progress)
            stop = end_of_response(self.shots)
            prompts.append(Prompt(self.problems[i].id, tokens, f"@{self.drawn}", stop))
            self.drawn += 1
        return prompts

    def update(self, problem_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Take back what there was to learn; without level replay nothing is kept.

        Args:
            problem_ids: The question of each rollout of a phase, in any order.
            scores: Each rollout's score (``learning_scores``). A question's is their
                mean, and replaces the one of its last visit.
        """
        visits: dict[str, list[float]] = {}
        for name, score in zip(problem_ids, scores, strict=True):
            visits.setdefault(name, []).append(float(score))
        if self.settings.kind == "replay":
            self.scores |= {name: sum(row) / len(row) for name, row in visits.items()}

    def state(self) -> dict[str, Any]:
        """All that decides the next draws, beside what the constructor got: JSON."""
        return {
            "drawn": self.drawn,
            "scores": dict(self.scores),
            "last_drawn": dict(self.last_drawn),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``: go on as if nothing had happened."""
        self.drawn = state["drawn"]
        self.scores, self.last_drawn = dict(state["scores"]), dict(state["last_drawn"])

    def _choose(self, rng: Random, taken: Collection[int]) -> int:
        """The index of the next question."""
        if self.settings.kind != "replay":
            epoch, i = divmod(self.drawn, len(self.problems))
            return epoch_order(len(self.problems), self.seed, epoch)[i]
        names = [p.id for i, p in enumerate(self.problems) if i not in taken]
        known = [name for name in names if name in self.scores]
        new = [name for name in names if name not in self.scores]
        weights = None
        if known and (not new or rng.random() < self.settings.replay_probability):
            names, weights = known, self._priorities(known)
        else:
            names = new
        name = rng.choices(names, weights)[0]
        self.last_drawn[name] = self.drawn
        return self.index[name]

    def _priorities(self, names: Sequence[str]) -> list[float]:
        return replay_distribution(
            [self.scores[name] for name in names],
            [self.last_drawn.get(name, -1) for name in names],
            self.drawn,
            temperature=self.settings.temperature,
            staleness=self.settings.staleness,
        )

    def _state(self, rng: Random, problem: Problem, progress: float) -> tuple[int, ...]:
        """The tokens that the policy goes on from."""
        prompt = format_prompt(problem, self.shots)
        tokens = tuple(self.policy.encode_prompt(prompt))
        if self.settings.kind != "backtracking" or rng.random() >= self.settings.share:
            return tokens
        prefixes = solution_prefixes(self.policy, prompt, problem)
        steps = given_fraction(self.settings, progress) * (len(prefixes) - 1)
        # Rounded up or down at random, so that the mean is what the schedule says
        given = min(math.floor(steps + rng.random()), len(prefixes) - 1)
        return tokens + prefixes[given]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of ``count`` questions in one epoch, which (seed, epoch) decides."""
    order = list(range(count))
    Random(f"{seed} epoch {epoch}").shuffle(order)
    return tuple(order)


# --- Backtracking ------------------------------------------------------------------


def given_fraction(settings: BacktrackingSettings, progress: float) -> float:
    """The fraction of the steps given: ``start`` at first, linearly to 0 at ``until``.

    >>> [given_fraction(BacktrackingSettings(), p) for p in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return settings.start * max(0.0, 1 - progress / settings.until)


def solution_prefixes(
    policy: Policy, prompt: str, problem: Problem
) -> list[tuple[int, ...]]:
    """The tokens of P_0 (nothing), P_1, ...: the reference up to the end of each step.

    They are tokens of ``Policy.encode_response``, so a response that goes on from them
    stands where the reference's next step stood. A prefix ends with a newline (where a
    token holds a newline and more, its line ends in no prefix), leaves at least one
    line to write, and never holds the final answer.
    """
    solution = format_response(problem.solution)
    tokens = policy.encode_response(prompt, solution)[:-1]
    spans = step_spans(policy.decode_batch([[token] for token in tokens]))
    prefixes = [tuple(tokens[:end]) for _, end in spans[:-1]]
    texts = [policy.decode(prefix) for prefix in prefixes]
    whole_lines = [
        prefix
        for prefix, text in zip(prefixes, texts, strict=True)
        if text.endswith("\n") and "####" not in text
    ]
    return [(), *whole_lines]


# --- Prioritized level replay ------------------------------------------------------


def learning_scores(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """How much each rollout surprised the learner: mean |advantage| of its tokens: (B,)

    The score of Jiang et al. (2021), section 3.1: with GAE, the size of the value's
    error. Whitening moves advantages away from zero, so take them from before it.

    Args:
        advantages: (B, T).
        response_mask: (B, T), true on response tokens; at least one a row.
    """
    mask = response_mask.bool()
    return advantages.abs().where(mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def replay_distribution(
    scores: Sequence[float],
    last_drawn: Sequence[int],
    now: int,
    *,
    temperature: float,
    staleness: float,
) -> list[float]:
    r"""The chance of each known question to be replayed (Jiang et al., 2021, eq. 1-4).

        P   = (1 - rho) P_S + rho P_C
        P_S ~ (1 / rank(S_i)) ** (1 / beta),  rank 1 for the highest score
        P_C ~ now - C_i,                      draws since the last visit

    Among equal scores, which the paper leaves open, the one longest not visited ranks
    first: once many questions are solved their scores are all 0. In a batch the sampler
    draws without putting back, or at beta = 0.1 it would hold little else than the
    question of rank 1.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], last_drawn[i]))
    by_score, ages = [0.0] * len(scores), [float(now - drawn) for drawn in last_drawn]
    for rank, i in enumerate(order, start=1):
        by_score[i] = rank ** (-1 / temperature)
    total_score, total_age = sum(by_score), sum(ages)
    return [
        (1 - staleness) * score / total_score + staleness * age / total_age
        for score, age in zip(by_score, ages, strict=True)
    ]


# --- Best K of N -------------------------------------------------------------------


def best_k_of_n(
    scores: Sequence[float], groups: Sequence[Hashable], k: int
) -> list[int]:
    """The rows to learn from: the ``k`` best of each group, in the order of the rows.

    Learning from a selection is biased for K < N. The kept rewards are the best order
    statistics of a group and no draws of the policy, so their mean is too high and
    failures are seen less often than they happen: the update leans from policy
    gradient to imitation of what worked. Take advantages and baselines over all N
    samples, before the selection.

    Args:
        scores: Reward, return or advantage of each row.
        groups: Which question a row belongs to; rows of a group may stand anywhere.
        k: How many to keep. Of equal scores the earlier rows are kept; K = N keeps all.

    Raises:
        ValueError: A group has fewer than ``k`` rows.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    fewest = min(map(len, members.values()), default=k)
    if not 1 <= k <= fewest:
        raise ValueError(
            f"cannot keep the best {k} of {fewest} samples: K is at least 1 and at "
            f"most the samples a question"
        )
    best = (sorted(rows, key=lambda i: -scores[i])[:k] for rows in members.values())
    return sorted(row for rows in best for row in rows)

"""Evaluate a policy: maj@1, maj@K, rerank@K, pass@K, each with its interval.

As in Havrilla et al. (2024, section 4):

1. one greedy answer a question: maj@1;
2. one set of K samples a question at T = 0.7: maj@K, pass@K, the accuracy of a single
   sample, the diversity, and rerank@K where scores are given;
3. every metric is a mean over problems, with an interval over problems.

The same K samples give the metrics at every smaller k (``Report.curve``). A problem is
graded as soon as its samples are there, and of these only the answers are kept, so that
K = 96 on thousands of problems fits in memory.

Left out: the reward model; its scores come through ``orm``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from rlreason.evaluation.intervals import (
    Interval,
    accuracy_interval,
    bootstrap_interval,
    paired_interval,
)
from rlreason.evaluation.metrics import maj_curve, pass_at_k, rerank_at_k
from rlreason.policy.labels import answer_groups
from rlreason.policy.load import Policy
from rlreason.policy.progress import progress_bar
from rlreason.policy.rollout import Rollout
from rlreason.rewards.sparse import sparse_reward
from rlreason.tasks.answers import extract_answer, operation_key
from rlreason.tasks.problem import Problem

Array = NDArray[np.float64]

# Scores the K samples of one problem, one number each, the higher the better
Scorer = Callable[[Problem, Sequence[Rollout]], Sequence[float]]
# Draws the answers, see ``answer_groups``
Sampler = Callable[..., Iterator[tuple[int, list[Rollout]]]]

TRUNCATED_LIMIT = 0.02  # a larger share of cut samples lowers the scores noticeably


@dataclass(frozen=True)
class ProblemResult:
    """What one problem gave.

    Attributes:
        id: ``Problem.id``, by which two reports are paired.
        gold: The reference answer.
        greedy_correct: Whether it is right.
        greedy_finished: False where the length limit cut the greedy solution.
        answers: The answer of each of the K samples, None without one.
        correct: Whether each is right.
        finished: Whether each ended with EOS.
        sequences: For each distinct sequence of operations among the correct samples,
            how many have it, most frequent first.
        scores: The score of each sample, or None where no scorer was given.
    """

    id: str
    gold: str
    greedy_correct: bool
    greedy_finished: bool
    answers: tuple[str | None, ...] = ()
    correct: tuple[bool, ...] = ()
    finished: tuple[bool, ...] = ()
    sequences: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Report:
    """Metrics of one policy on one set of problems.

    A metric is asked for by its name: ``"maj@1"`` is greedy, as in the paper; then
    ``"maj@k"``, ``"pass@k"``, ``"rerank@k"`` for any k up to the number of samples, as
    ``"pass@8"``; ``"accuracy"`` of one sample at the sampling temperature;
    ``"diversity"``, the distinct correct operation sequences among all K.

    Attributes:
        policy: Name of the policy.
        k: Samples a problem; 0 where only the greedy solution was drawn.
        temperature: Of the K samples.
        max_new_tokens: The length limit of every sample.
        seed: Of the K samples, and of the bootstrap.
        results: One a problem, in the order of the problems.
    """

    policy: str
    k: int
    temperature: float
    max_new_tokens: int
    seed: int
    results: tuple[ProblemResult, ...]

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a report needs at least one problem")

    @property
    def maj_1(self) -> Interval:
        """Accuracy of the greedy solution."""
        return self.interval("maj@1")

    @property
    def maj_k(self) -> Interval | None:
        """Accuracy of the vote of the K samples."""
        return self.interval(f"maj@{self.k}") if self.k > 1 else self.accuracy

    @property
    def pass_k(self) -> Interval | None:
        """Share of problems with a correct one among the K samples."""
        return self.interval(f"pass@{self.k}") if self.k else None

    @property
    def rerank_k(self) -> Interval | None:
        """Accuracy of the best-scored sample; None where no scorer was given."""
        return self.interval(f"rerank@{self.k}") if self._scored else None

    @property
    def accuracy(self) -> Interval | None:
        """Accuracy of one sample at the sampling temperature."""
        return self.interval("accuracy") if self.k else None

    @property
    def diversity(self) -> Interval | None:
        """Distinct correct operation sequences a problem, among the K samples."""
        return self.interval("diversity") if self.k else None

    @cached_property
    def truncated_greedy(self) -> float:
        """Share of greedy solutions that the length limit cut."""
        return float(np.mean([not r.greedy_finished for r in self.results]))

    @cached_property
    def truncated_sampled(self) -> float | None:
        """Share of the K samples that the length limit cut."""
        if not self.k:
            return None
        return 1.0 - float(np.mean([r.finished for r in self.results]))

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """The metrics that this report has, under the paper's names."""
        names = ["maj@1"]
        if self.k > 1:
            names += [f"maj@{self.k}"]
        if self._scored:
            names += [f"rerank@{self.k}"]
        if self.k:
            names += [f"pass@{self.k}", "accuracy", "diversity"]
        return {name: self.interval(name) for name in names}

    def interval(self, name: str) -> Interval:
        """Mean over problems of a metric, with its interval over problems."""
        return self._interval_of(self.values(name), bounded=name != "diversity")

    def values(self, name: str) -> Array:
        """One value a problem, in the order of ``results``: shape (problems,).

        Two reports on the same problems are compared through these.
        """
        if name == "maj@1":
            return np.array([float(r.greedy_correct) for r in self.results])
        if name == "accuracy":
            return self._sampled_values("pass", 1)
        if name == "diversity" and self.k:
            return np.array([float(len(r.sequences)) for r in self.results])
        kind, at, k = name.partition("@")
        if not at or not k.isdigit():
            raise ValueError(
                f"no metric {name!r}; this report has {', '.join(self.metrics)}, and "
                f"maj, pass and rerank at any k up to {self.k}"
            )
        return self._sampled_values(kind, int(k))

    def curve(self, kind: str, ks: Sequence[int] | None = None) -> dict[int, Interval]:
        """``"maj"``, ``"pass"`` or ``"rerank"`` at several k, from the same samples.

        Its value at k = 1 is the accuracy of one sample, not the greedy one. ``ks`` are
        by default the powers of two up to K, and K.
        """
        if ks is None:
            ks = [2**i for i in range(self.k.bit_length()) if 2**i < self.k] + [self.k]
        return {
            k: self._interval_of(self._sampled_values(kind, k), bounded=True)
            for k in ks
        }

    def __str__(self) -> str:
        lines = [f"{name:<10} {interval}" for name, interval in self.metrics.items()]
        return "\n".join([self._caption(), *lines])

    def _repr_markdown_(self) -> str:
        head = "| metric | mean | 95% interval |\n|---|---:|---:|"
        lines = [
            f"| {name} | {i.mean:.3f} | {i.low:.3f} to {i.high:.3f} |"
            for name, i in self.metrics.items()
        ]
        return "\n".join([head, *lines, "", self._caption()])

    def _caption(self) -> str:
        cut = f"truncated: greedy {self.truncated_greedy:.1%}"
        if self.k:
            cut += f", sampled {self.truncated_sampled:.1%}"
        samples = "greedy only, "
        if self.k:
            samples = f"K={self.k}, temperature {self.temperature:g}, "
        return (
            f"{self.policy}, {len(self.results)} problems, {samples}"
            f"seed {self.seed}; {cut}"
        )

    @property
    def _scored(self) -> bool:
        return self.k > 0 and self.results[0].scores is not None

    @cached_property
    def _maj_curves(self) -> Array:
        """maj@k of every problem: (problems, K)."""
        return np.stack([maj_curve(r.answers, r.gold) for r in self.results])

    def _sampled_values(self, kind: str, k: int) -> Array:
        if not 1 <= k <= self.k:
            raise ValueError(
                f"{kind}@{k} does not follow from {self.k} samples a problem"
            )
        if kind == "maj":
            return self._maj_curves[:, k - 1].copy()
        if kind == "pass":
            return np.array(
                [pass_at_k(self.k, sum(r.correct), k) for r in self.results]
            )
        if kind == "rerank":
            if not self._scored:
                raise ValueError("rerank@k needs scores: give evaluate an `orm`")
            return np.array(
                [rerank_at_k(r.scores or (), r.correct, k) for r in self.results]
            )
        raise ValueError(f"no metric {kind!r} at k; there are maj, pass and rerank")

    def _interval_of(self, values: Array, *, bounded: bool) -> Interval:
        interval = accuracy_interval if bounded else bootstrap_interval
        return interval(values, seed=self.seed)


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int | None = 96,
    temperature: float = 0.7,
    max_new_tokens: int = 256,
    seed: int = 0,
    orm: Scorer | None = None,
    shots: Sequence[Problem] = (),
    label: str | None = None,
    progress: bool | None = None,
    sampler: Sampler = answer_groups,
) -> Report:
    """Sample a policy on problems and report how often it is right.

    Args:
        k: Samples a problem beside the greedy one; 0 or None for the greedy one alone.
        temperature: Of the K samples.
        max_new_tokens: What is longer is cut and graded by the text that there is; a
            warning says when more than 2% were.
        seed: Of the K samples, and of the bootstrap.
        orm: Scores samples for rerank@K. Called as ``orm(problem, rollouts)``, once a
            problem with its K samples; returns one number each, the best the highest.
        shots: Worked examples put before every question.
        label: Force it before every step, for policies of return-conditioned RL.
        progress: As in ``sample``.
        sampler: Draws the answers, or knows them: is called as ``answer_groups``.

    Raises:
        ValueError: There are no problems, or two with one id; or a label and shots,
            which have none.
    """
    problems = list(problems)
    _check_problems(problems)
    groups = partial(
        sampler,
        policy,
        problems,
        max_new_tokens=max_new_tokens,
        seed=seed,
        shots=shots,
        label=label,
        progress=False,
    )
    results = {}
    with progress_bar(
        len(problems), "greedy solutions", unit="sample", show=progress
    ) as bar:
        for i, (rollout,) in groups(k=1, temperature=0.0):
            results[i] = grade_greedy(problems[i], rollout)
            right = sum(result.greedy_correct for result in results.values())
            bar.update(accuracy=right / len(results))
    if k:
        right = 0
        with progress_bar(
            len(problems) * k, "sampled solutions", unit="sample", show=progress
        ) as bar:
            for i, rollouts in groups(k=k, temperature=temperature):
                results[i] = grade_samples(results[i], problems[i], rollouts, orm=orm)
                right += sum(results[i].correct)
                bar.update(k, accuracy=right / (bar.done + k))
    report = Report(
        policy=policy.name,
        k=k or 0,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        results=tuple(results[i] for i in range(len(problems))),
    )
    _warn_of_truncation(report)
    return report


def grade_greedy(problem: Problem, rollout: Rollout) -> ProblemResult:
    """The result of a problem from its greedy solution, without samples as yet."""
    return ProblemResult(
        id=problem.id,
        gold=problem.answer,
        greedy_correct=sparse_reward(rollout, problem) == 1.0,
        greedy_finished=rollout.finished,
    )


def grade_samples(
    result: ProblemResult,
    problem: Problem,
    rollouts: Sequence[Rollout],
    *,
    orm: Scorer | None = None,
) -> ProblemResult:
    """``result`` with the K samples of its problem, scored where ``orm`` is given."""
    correct = tuple(sparse_reward(r, problem) == 1.0 for r in rollouts)
    right = (r.text for r, c in zip(rollouts, correct, strict=True) if c)
    sequences = Counter(map(operation_key, right))
    return replace(
        result,
        answers=tuple(extract_answer(r.text) for r in rollouts),
        correct=correct,
        finished=tuple(r.finished for r in rollouts),
        sequences=tuple(sorted(sequences.values(), reverse=True)),
        scores=None if orm is None else _scores_of(orm, problem, rollouts),
    )


def compare(before: Report, after: Report, name: str) -> Interval:
    """Difference ``after - before`` of a metric, paired by problem.

    Raises:
        ValueError: The reports are not on the same problems in the same order.
    """
    if [r.id for r in before.results] != [r.id for r in after.results]:
        raise ValueError(
            f"{before.policy} and {after.policy} were evaluated on different problems, "
            "or in another order: their values cannot be paired"
        )
    return paired_interval(before.values(name), after.values(name), seed=after.seed)


def _scores_of(
    orm: Scorer, problem: Problem, rollouts: Sequence[Rollout]
) -> tuple[float, ...]:
    scores = tuple(float(score) for score in orm(problem, rollouts))
    if len(scores) != len(rollouts):
        raise ValueError(
            f"orm gave {len(scores)} scores for the {len(rollouts)} samples of problem "
            f"{problem.id!r}"
        )
    return scores


def _check_problems(problems: Sequence[Problem]) -> None:
    if not problems:
        raise ValueError(
            "no problems to evaluate on: the list is empty; check split and limit of "
            "load_problems"
        )
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError(
            "two problems share an id, and would share their samples: give each one of "
            "its own"
        )


def _warn_of_truncation(report: Report) -> None:
    share = max(report.truncated_greedy, report.truncated_sampled or 0.0)
    if share > TRUNCATED_LIMIT:
        warnings.warn(
            f"{share:.1%} of the solutions were cut at {report.max_new_tokens} tokens, "
            "which lowers every score; raise max_new_tokens, unless the policy does "
            "not know how to stop",
            stacklevel=3,
        )

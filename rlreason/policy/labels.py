"""Sampling after labels: what a policy of return-conditioned RL is asked for.

Such a policy has learned steps that stand after ``[GOOD]`` or ``[BAD]``
(``algorithms.rcrl``). ``sample_conditioned`` forces a label before each step, samples
the step, and so on; ``answer_groups`` samples with a label or plainly, behind one face.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlreason.policy.load import Policy
from rlreason.policy.progress import progress_bar
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import sample_groups, sample_prompts
from rlreason.policy.vocabulary import newline_ids, token_id
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

GOOD, BAD = "[GOOD]", "[BAD]"


def answer_groups(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int,
    shots: Sequence[Problem] = (),
    label: str | None = None,
    **settings: Any,
) -> Iterator[tuple[int, list[Rollout]]]:
    """Sample ``k`` answers to each problem, plainly or after a forced label.

    Args:
        settings: What ``sample`` takes beside these.

    Yields:
        The index of a problem and its answers, in the order of finishing.

    Raises:
        ValueError: A label and shots, which have none.
    """
    if label is None:
        yield from sample_groups(policy, problems, k=k, shots=shots, **settings)
        return
    if shots:
        raise ValueError("worked examples have no labels: give shots or a label")
    stride = max(1, 4096 // k)  # answers held in memory at once
    for first in range(0, len(problems), stride):
        part = problems[first : first + stride]
        rollouts = sample_conditioned(policy, part, label=label, k=k, **settings)
        for i in range(len(part)):
            yield first + i, rollouts[i * k : (i + 1) * k]


@dataclass(slots=True)
class _Row:
    """A response under way."""

    problem: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    step: int = 0  # where the step begins that is being written, label included
    room: int = 0  # tokens that may still be sampled
    finished: bool = False


def sample_conditioned(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    label: str = GOOD,
    k: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    byte_budget: int | None = None,
    progress: bool | None = None,
) -> list[Rollout]:
    """Draw ``k`` answers to each problem, every step of them after a forced ``label``.

    A forced label is no action. It stands in a rollout's ``tokens``, so that
    ``prompt_tokens + tokens`` is what the policy read, token in, token out; its
    log-probability is 0.0, that of what is certain to come; it is not in ``text`` and
    is not counted by ``max_new_tokens``. So the sum of ``logprobs`` is the
    log-probability of the answer given the labels.

    Args:
        policy: As ``algorithms.rcrl`` returns it.
        problems: The questions. Two with the same id get the same samples.
        label: ``"[GOOD]"``, or as the control ``"[BAD]"``.
        max_new_tokens: Sampled tokens an answer, over all its steps, EOS included.
        progress: Show a bar; by default where somebody watches.

    The other arguments are as in ``sample``; what is returned is in the same order.
    """
    forced, ends = token_id(policy, label), newline_ids(policy)
    prompts = [tuple(policy.encode_prompt(format_prompt(p))) for p in problems]
    rows = [
        _Row(i, j, room=max_new_tokens) for i in range(len(problems)) for j in range(k)
    ]
    live, turn = rows, 0
    with progress_bar(
        len(rows), f"sampling after {label}", unit="sample", show=progress
    ) as bar:
        while live or turn == 0:
            for row in live:
                if row.step == len(row.tokens):
                    row.tokens.append(forced)
                    row.logprobs.append(0.0)
            # All begin alike, so the K samples of a question share the first prompt
            asked = [row for row in live if turn or row.sample == 0]
            parts = sample_prompts(
                policy,
                [
                    Prompt(
                        problems[row.problem].id,
                        prompts[row.problem] + tuple(row.tokens),
                        f" sample {row.sample} turn {turn}" if turn else "",
                    )
                    for row in asked
                ],
                k=k if turn == 0 else 1,
                temperature=temperature,
                max_new_tokens=max((row.room for row in live), default=max_new_tokens),
                seed=seed,
                stop_ids=ends,
                byte_budget=byte_budget,
                progress=False,
            )
            for row, part in zip(live, parts, strict=True):
                _take(policy, row, part)
            still = [row for row in live if row.room and not row.finished]
            bar.update(len(live) - len(still))
            live, turn = still, turn + 1
    texts = policy.decode_batch([policy.without_eos(row.tokens) for row in rows])
    return [
        Rollout(
            problem_id=problems[row.problem].id,
            sample=row.sample,
            prompt_tokens=prompts[row.problem],
            tokens=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            text=text,
            finished=row.finished,
        )
        for row, text in zip(rows, texts, strict=True)
    ]


def _take(policy: Policy, row: _Row, part: Rollout) -> None:
    """Add what was sampled; a row with less room than others is cut here."""
    tokens = part.tokens[: row.room]
    row.tokens += tokens
    row.logprobs += part.logprobs[: row.room]
    row.room -= len(tokens)
    row.finished = tokens[-1] in policy.eos_ids
    # A blank line belongs to the step after it, as in ``step_spans``
    if policy.decode(row.tokens[row.step :]).strip():
        row.step = len(row.tokens)

"""Sampling after labels: what a policy of return-conditioned RL is asked for.

Such a policy has learned steps that stand after ``[GOOD]`` or ``[BAD]``
(``algorithms.rcrl``). ``sample_conditioned`` has a label put before each step;
``answer_groups`` samples with a label or plainly, behind one face.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rlreason.policy.forced import Forced
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import in_order, prompt_groups, prompt_of, sample_groups
from rlreason.policy.vocabulary import token_id
from rlreason.tasks.problem import Problem

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
    yield from _conditioned_groups(policy, problems, label=label, k=k, **settings)


def sample_conditioned(
    policy: Policy, problems: Sequence[Problem], *, label: str = GOOD, **settings: Any
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
        max_new_tokens: Sampled tokens an answer, over all its steps, EOS included. An
            answer that its labels make longer than the model's positions is cut there.
        settings: What ``sample`` takes beside these and ``shots``.

    What is returned is in the order of ``sample``.
    """
    return in_order(_conditioned_groups(policy, problems, label=label, **settings))


def _conditioned_groups(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    label: str,
    max_new_tokens: int = 256,
    **settings: Any,
) -> Iterator[tuple[int, list[Rollout]]]:
    """The first label is the last token that is asked; the others are forced."""
    first = token_id(policy, label)
    prompts = [prompt_of(policy, problem) for problem in problems]
    groups = prompt_groups(
        policy,
        [replace(prompt, tokens=(*prompt.tokens, first)) for prompt in prompts],
        forced=Forced.of(policy, first, max_new_tokens),
        max_new_tokens=max_new_tokens,
        **settings,
    )
    for index, group in groups:
        yield (
            index,
            [
                replace(
                    rollout,
                    prompt_tokens=prompts[index].tokens,
                    tokens=(first, *rollout.tokens),
                    logprobs=(0.0, *rollout.logprobs),
                )
                for rollout in group
            ],
        )

"""Answers of a policy, kept in a run folder: the same evaluation is sampled once.

K = 96 answers to a thousand questions are hours of a GPU, and several tables, chapters
and reward models look at the same ones. ``kept_answers`` stands in for
``evaluation.evaluate.answer_groups``: it samples what is not there yet, keeps it, and
gives the rest from the disk. A run that was killed goes on with the questions that it
lacks, see ``blocks``.

The folder is named after all that decides the answers: the weights themselves, whatever
run or file they came from, the prompts as tokens, and the settings of sampling. Judging
them (answers, votes, scores) is done anew each time.

All answers of one folder are held in memory, 8 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch

from rlreason.evaluation.evaluate import answer_groups
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import prompt_of
from rlreason.runs.blocks import (
    PackedGroup,
    join_groups,
    pack_group,
    split_groups,
    unpack_group,
    weights_digest,
)
from rlreason.runs.folder import RunFolder
from rlreason.settings import Settings, ours
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response


class AnswersRun(Settings):
    """All that decides what a policy answers; weights and prompts by their digests."""

    weights: str
    prompts: str
    stop: str = ours("", "Ends a response as EOS does.", neutral="")
    label: str | None
    k: int
    temperature: float
    max_new_tokens: int
    seed: int


def kept_answers(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    shots: Sequence[Problem] = (),
    label: str | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[int, list[Rollout]]]:
    """As ``answer_groups``, with answers that were drawn before taken from the disk."""
    prompts = [prompt_of(policy, problem, shots) for problem in problems]
    named = [[prompt.problem_id, prompt.tokens] for prompt in prompts]
    sampling = {
        "label": label,
        "k": k,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed if temperature else 0,  # greedy answers need no random number
    }
    settings = AnswersRun(
        weights=weights_digest(policy),
        prompts=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        stop=end_of_response(shots),
        **sampling,
    )
    with RunFolder("answers", settings, keep=1) as run:
        saved = run.restore()
        groups = split_groups(saved.tensors, [k] * len(problems)) if saved else {}
        if len(groups) < len(problems):
            drawn = answer_groups(
                policy,
                problems,
                shots=shots,
                progress=progress,
                keeper=run.keep_groups,
                **sampling,
            )
            groups = {i: pack_group(rollouts) for i, rollouts in drawn}
            run.log("answers", **_metrics(groups))
            run.save(join_groups(groups), {})
    for i, group in groups.items():
        yield i, unpack_group(policy, prompts[i], group)


def _metrics(groups: dict[int, PackedGroup]) -> dict[str, float]:
    finished = torch.cat([group.finished for group in groups.values()])
    return {
        "problems": len(groups),
        "samples": len(finished),
        "tokens": sum(len(group.tokens) for group in groups.values()),
        "truncated": 1 - float(finished.float().mean()),
    }

"""Answers of a policy, kept in a run folder: the same evaluation is sampled once.

K = 96 answers to a thousand questions are hours of a GPU, and several tables, chapters
and reward models look at the same ones. ``kept_answers`` stands in for
``evaluation.evaluate.answer_groups``: it samples what is not there yet, keeps it, and
gives the rest from the disk. A run that was killed goes on with the questions that it
lacks.

The folder is named after all that decides the answers: the weights themselves, whatever
run or file they came from, the prompts as tokens, and the settings of sampling. Judging
them (answers, votes, scores) is done anew each time.

All answers of one folder are held in memory, 8 bytes a token. What goes on after a kill
is drawn in other batches: the same answers up to the rounding of log-probabilities, see
``policy.sampler``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlreason.algorithms.recorder import Checkpoint
from rlreason.evaluation.evaluate import answer_groups
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.runs.folder import RunFolder
from rlreason.settings import Settings, ours
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response, format_prompt

_PROVENANCE = ("_name_or_path", "transformers_version")  # not what is computed


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


@dataclass(frozen=True, slots=True)
class _Group:
    """The K answers to one question, N tokens in all."""

    lengths: Tensor  # (K,)
    tokens: Tensor  # (N,), int32
    logprobs: Tensor  # (N,), float32
    finished: Tensor  # (K,), bool


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
    prompts = [
        tuple(policy.encode_prompt(format_prompt(problem, shots)))
        for problem in problems
    ]
    named = [[problem.id, p] for problem, p in zip(problems, prompts, strict=True)]
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
        groups = _unpack(run.restore(), k)
        if not run.done:
            missing = [i for i in range(len(problems)) if i not in groups]
            asked = [problems[i] for i in missing]
            drawn = answer_groups(
                policy, asked, shots=shots, progress=progress, **sampling
            )
            for place, rollouts in drawn:
                groups[missing[place]] = _pack_group(rollouts)
                if run.due():
                    run.save(_pack(groups), {})
            run.log("answers", **_metrics(groups))
            run.save(_pack(groups), {})
    for i, group in groups.items():
        yield i, _rollouts(policy, problems[i].id, prompts[i], group)


def weights_digest(policy: Policy) -> str:
    """Name what a policy computes: its weights and the configuration of its model."""
    config = policy.model.config.to_diff_dict()
    for name in _PROVENANCE:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if policy.more_eos_ids:
        digest.update(f"ends {policy.more_eos_ids}".encode())
    for name, tensor in policy.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _metrics(groups: dict[int, _Group]) -> dict[str, float]:
    finished = torch.cat([group.finished for group in groups.values()])
    return {
        "problems": len(groups),
        "samples": len(finished),
        "tokens": sum(len(group.tokens) for group in groups.values()),
        "truncated": 1 - float(finished.float().mean()),
    }


def _rollouts(
    policy: Policy, problem_id: str, prompt: tuple[int, ...], group: _Group
) -> list[Rollout]:
    lengths = group.lengths.tolist()
    tokens = [tuple(part.tolist()) for part in group.tokens.split(lengths)]
    logprobs = [tuple(part.tolist()) for part in group.logprobs.split(lengths)]
    texts = policy.decode_batch([policy.without_eos(ids) for ids in tokens])
    return [
        Rollout(
            problem_id=problem_id,
            sample=sample,
            prompt_tokens=prompt,
            tokens=tokens[sample],
            logprobs=logprobs[sample],
            text=text,
            finished=finished,
        )
        for sample, (text, finished) in enumerate(
            zip(texts, group.finished.tolist(), strict=True)
        )
    ]


# --- On the disk -------------------------------------------------------------------


def _pack_group(rollouts: Sequence[Rollout]) -> _Group:
    return _Group(
        lengths=torch.tensor([len(r.tokens) for r in rollouts]),
        tokens=torch.tensor([t for r in rollouts for t in r.tokens], dtype=torch.int32),
        logprobs=torch.tensor([x for r in rollouts for x in r.logprobs]),
        finished=torch.tensor([r.finished for r in rollouts]),
    )


def _pack(groups: dict[int, _Group]) -> dict[str, Tensor]:
    return {
        "problem": torch.tensor(list(groups)),
        **{
            name: torch.cat([getattr(group, name) for group in groups.values()])
            for name in _Group.__slots__
        },
    }


def _unpack(saved: Checkpoint | None, k: int) -> dict[int, _Group]:
    if saved is None:
        return {}
    lengths = saved.tensors["lengths"].split(k)
    sizes = [int(each.sum()) for each in lengths]
    columns = zip(
        saved.tensors["problem"].tolist(),
        lengths,
        saved.tensors["tokens"].split(sizes),
        saved.tensors["logprobs"].split(sizes),
        saved.tensors["finished"].split(k),
        strict=True,
    )
    return {i: _Group(*columns) for i, *columns in columns}

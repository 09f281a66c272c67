"""Groups of rollouts as files, and blocks of them that are kept while others are drawn.

A group is what was drawn from one prompt. Of a sampling that takes hours, a run folder
keeps the groups that are finished (``RunFolder.keep_groups``), until a checkpoint holds
what came of them::

    rollouts/KEY/SHA256.safetensors

KEY names all that decides what is drawn: the weights themselves, the prompts as tokens,
the settings. What another round or another policy has drawn is thus never taken. A
block holds the groups that finished since the block before, and is named after its
content: of one that was damaged since, that is told, and its groups are drawn again.
Several processes each write what they drew, and find what any of them did.

What goes on after a kill is drawn in other batches: the same answers up to the rounding
of log-probabilities, see ``policy.sampler``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from rlreason.policy.load import Policy
from rlreason.policy.progress import tell
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import Asked
from rlreason.runs.files import write_atomically

_PROVENANCE = ("_name_or_path", "transformers_version")  # not what is computed


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """The K rollouts from one prompt, N tokens in all."""

    lengths: Tensor  # (K,)
    tokens: Tensor  # (N,), int32
    logprobs: Tensor  # (N,), float32
    finished: Tensor  # (K,), bool


def pack_group(rollouts: Sequence[Rollout]) -> PackedGroup:
    """What cannot be made anew from the prompt and the policy's tokenizer."""
    tokens = chain.from_iterable(r.tokens for r in rollouts)
    logprobs = chain.from_iterable(r.logprobs for r in rollouts)
    return PackedGroup(
        lengths=torch.tensor([len(r.tokens) for r in rollouts]),
        tokens=torch.from_numpy(np.fromiter(tokens, np.int32)),
        logprobs=torch.from_numpy(np.fromiter(logprobs, np.float32)),
        finished=torch.tensor([r.finished for r in rollouts]),
    )


def unpack_group(policy: Policy, prompt: Prompt, group: PackedGroup) -> list[Rollout]:
    """Undo ``pack_group``."""
    lengths = group.lengths.tolist()
    tokens = [tuple(part.tolist()) for part in group.tokens.split(lengths)]
    logprobs = [tuple(part.tolist()) for part in group.logprobs.split(lengths)]
    texts = policy.decode_batch([policy.without_eos(ids) for ids in tokens])
    return [
        Rollout(
            problem_id=prompt.problem_id,
            sample=sample,
            prompt_tokens=prompt.tokens,
            tokens=tokens[sample],
            logprobs=logprobs[sample],
            text=text,
            finished=finished,
        )
        for sample, (text, finished) in enumerate(
            zip(texts, group.finished.tolist(), strict=True)
        )
    ]


def join_groups(groups: Mapping[int, PackedGroup]) -> dict[str, Tensor]:
    """Groups by the index of their prompt, as the tensors of one file."""
    return {
        "problem": torch.tensor(list(groups)),
        **{
            name: torch.cat([getattr(group, name) for group in groups.values()])
            for name in PackedGroup.__slots__
        },
    }


def split_groups(
    tensors: Mapping[str, Tensor], ks: Sequence[int]
) -> dict[int, PackedGroup]:
    """Undo ``join_groups``, given how many rollouts each prompt has."""
    indices = tensors["problem"].tolist()
    counts = [ks[i] for i in indices]
    lengths = tensors["lengths"].split(counts)
    sizes = [int(each.sum()) for each in lengths]
    columns = zip(
        indices,
        lengths,
        tensors["tokens"].split(sizes),
        tensors["logprobs"].split(sizes),
        tensors["finished"].split(counts),
        strict=True,
    )
    return {i: PackedGroup(*columns) for i, *columns in columns}


class Blocks:
    """What a sampling has kept so far.

    Args:
        root: The folder of all that a run keeps so.
        asked: What is sampled.
    """

    def __init__(self, root: Path, asked: Asked) -> None:
        self.root, self.asked = root, asked

    @cached_property
    def folder(self) -> Path:
        """Named by KEY. All weights are read for it, so asked for only where needed."""
        asked = self.asked
        decides = {
            "weights": weights_digest(asked.policy),
            "prompts": [asdict(prompt) for prompt in asked.prompts],
            "ks": list(asked.ks),
            "temperature": asked.temperature,
            "max_new_tokens": asked.max_new_tokens,
            "seed": asked.seed,
            "forced": asked.forced.token if asked.forced else None,
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        return self.root / key.hexdigest()[:16]

    def read(self, own: Collection[int]) -> tuple[dict[int, list[Rollout]], float]:
        """The groups of these prompts that are there, and the seconds they took."""
        found: dict[int, list[Rollout]] = {}
        seconds, own = 0.0, set(own)
        if not self.root.is_dir():
            return found, seconds
        for path in sorted(self.folder.glob("*.safetensors")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                warnings.warn(
                    f"{path} is damaged: what it held is sampled again", stacklevel=3
                )
                continue
            tensors = load(content)
            groups = split_groups(tensors, self.asked.ks)
            if mine := own & groups.keys():
                seconds += float(tensors["seconds"])
            for i in mine:
                prompt = self.asked.prompts[i]
                found[i] = unpack_group(self.asked.policy, prompt, groups[i])
        if found:
            tell(f"{len(found)} of {len(own)} questions are sampled: the rest follows")
        return found, seconds

    def write(self, groups: Mapping[int, Sequence[Rollout]], seconds: float) -> None:
        """Add a block of groups, which took so long since the one before."""
        packed = {i: pack_group(group) for i, group in groups.items()}
        content = save(join_groups(packed) | {"seconds": torch.tensor(seconds)})
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_atomically(self.folder / name, content)


def weights_digest(policy: Policy) -> str:
    """Name what a policy answers by: weights, configuration, what ends an answer."""
    config = policy.model.config.to_diff_dict()
    for name in _PROVENANCE:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if policy.eos_ids != (policy.model.config.eos_token_id,):  # the tokenizer's, others
        digest.update(f"ends {policy.eos_ids}".encode())
    for name, tensor in policy.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()

"""Several processes that do one job: who I am, what is my share, and what is summed.

Started by ``torchrun`` or ``accelerate launch``, each process (*rank*) runs the same
program on the same data, takes its share of what is costly, and has the shares of the
others put beside it, so that all go on with the same numbers. What is done without a
share is done by each of them alike. Alone, every function here is the identity.

Shares are joined as tensors and as JSON, never as pickles.

Left out: models that are split over devices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlreason.policy.layout import Text, shares_of
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Prompt, Rollout

Item = TypeVar("Item")
Group = tuple[int, list[Rollout]]


@contextmanager
def connected() -> Iterator[None]:
    """Join the processes that were started together, where there are several.

    Each gets a GPU of its own where there are any. Those after the first say nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if int(os.environ["RANK"]):
        os.environ["RLREASON_QUIET"] = "1"
    # One may wait for hours: for a lock, or for what another draws or writes. Who
    # started them ends the others where one dies
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def my_share(items: Sequence[Item]) -> list[Item]:
    """Every ``ranks()``-th item. Give them sorted by size, and shares are alike."""
    return list(items[rank() :: ranks()])


def my_alike_share(
    items: Sequence[Item], text: Callable[[Item], Text]
) -> Sequence[Item]:
    """A share of about my part of the work, in which items begin alike.

    Args:
        text: Prompt and response of an item.
    """
    return items if ranks() == 1 else shares_of(items, ranks(), text)[rank()]


def wait() -> None:
    """Until all are here."""
    if ranks() > 1:
        dist.barrier()


def agreed(value: Any) -> Any:
    """The first rank's value, of JSON, on all ranks."""
    return gathered(value)[0]


def gathered(value: Any) -> list[Any]:
    """Every rank's value, of JSON, in their order. Tuples become lists."""
    if ranks() == 1:
        return [value]
    text = torch.tensor(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in gathered_tensors(text)]


def gathered_tensors(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor (N, ...), on the CPU; N may differ."""
    if ranks() == 1:
        return [tensor]
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(ranks())
    ]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=_device()))
    lengths = [int(size) for size in sizes]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]), device=_device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [part[:n].cpu() for part, n in zip(parts, lengths, strict=True)]


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers summed over ranks by name; a rank may lack some."""
    total: dict[str, float] = {}
    for part in gathered(dict(numbers)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def sum_tensors(*tensors: Tensor) -> None:
    """Sum each tensor over ranks, in place; one that is given twice, once."""
    if ranks() > 1:
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            dist.all_reduce(tensor)


def sum_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks, in place.

    Each rank's loss has been divided by the global count of tokens, so the sum is the
    gradient of the whole batch, however it was shared. A mean over ranks of means over
    their tokens would not be: ranks have different numbers of them. A weight that has a
    gradient on no rank keeps none.
    """
    if ranks() == 1:
        return
    weights = list(weights)
    flags = [float(weight.grad is not None) for weight in weights]
    known = torch.tensor(flags, device=_device())
    dist.all_reduce(known)
    sent = []
    for weight, owners in zip(weights, known.tolist(), strict=True):
        if owners:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            sent.append(dist.all_reduce(weight.grad, async_op=True))
    for each in sent:
        each.wait()


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All ranks' tensors by name, on the CPU of the first rank; elsewhere nothing."""
    if ranks() == 1:
        return dict(tensors)
    described = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in tensors.items()
    }
    found = {}
    for owner, part in enumerate(gathered(described)):
        for name, (shape, dtype) in part.items():
            if owner == rank():
                tensor = tensors[name].to(_device())
            else:
                tensor = torch.empty(
                    shape, dtype=getattr(torch, dtype), device=_device()
                )
            dist.broadcast(tensor, owner)
            if rank() == 0:
                found[name] = tensor.cpu()
    return found


def joined_groups(
    policy: Policy, prompts: Sequence[Prompt], groups: Iterable[Group]
) -> Iterator[Group]:
    """All ranks' groups of rollouts, given each rank's own.

    Args:
        policy: Whose tokens they are.
        prompts: All prompts, the same on all ranks.
        groups: Each an index in ``prompts``, and its rollouts.
    """
    if ranks() == 1:
        yield from groups
        return
    own = [(index, rollout) for index, group in groups for rollout in group]
    head = [[i, r.sample, len(r.tokens), r.finished] for i, r in own]
    tensors = (
        torch.tensor(head, dtype=torch.int64).view(-1, 4),
        torch.tensor([t for _, r in own for t in r.tokens], dtype=torch.int64),
        torch.tensor([x for _, r in own for x in r.logprobs], dtype=torch.float32),
    )
    found: dict[int, list[Rollout]] = {}
    for part in zip(*map(gathered_tensors, tensors), strict=True):
        heads, lengths = part[0].tolist(), part[0][:, 2].tolist()
        tokens, logprobs = (tuple(map(_tuple, x.split(lengths))) for x in part[1:])
        texts = policy.decode_batch([policy.without_eos(ids) for ids in tokens])
        for row, ids, logps, text in zip(heads, tokens, logprobs, texts, strict=True):
            index, number, _, finished = row
            prompt = prompts[index]
            rollout = Rollout(
                problem_id=prompt.problem_id,
                sample=number,
                prompt_tokens=tuple(prompt.tokens),
                tokens=ids,
                logprobs=logps,
                text=text,
                finished=bool(finished),
            )
            found.setdefault(index, []).append(rollout)
    yield from found.items()


def _tuple(tensor: Tensor) -> tuple:
    return tuple(tensor.tolist())


def _device() -> torch.device:
    """Where the processes exchange tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

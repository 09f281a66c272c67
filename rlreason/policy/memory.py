"""What does not fit into memory is done again in pieces of half the size."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from rlreason.policy.progress import tell

T = TypeVar("T")


# How it is said by a CPU, by a GPU outside of torch's own pool, and by cuBLAS
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: only torch's own pool has a class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in _NO_MEMORY)
    )


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing holds, what PyTorch has set aside included."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return free + reserved - torch.cuda.memory_allocated(device)


def within_memory(
    work: Callable[..., T], tokens: int, *, undo: Callable[[], Any]
) -> tuple[T, int]:
    """Do work with so many tokens at once, or with fewer where memory ends.

    Args:
        work: Given their number as ``max_tokens``.
        tokens: To begin with.
        undo: Takes back what an attempt that failed has done.

    Returns:
        What came of it, and the number of tokens that did fit.

    Raises:
        ValueError: Not even single examples fit.
    """
    most = tokens
    while most:
        try:
            found = work(max_tokens=most)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            most //= 2
        else:
            if most < tokens:
                tell(f"out of memory with {tokens:,} tokens at once: now {most:,}")
            return found, most
        undo()  # here, where the failed attempt holds nothing any more
    raise ValueError(
        "out of memory with one example at once: shorten it (max_new_tokens), or take "
        "a smaller model, LoRA, or a device with more memory"
    )


def fewer_tokens_at_once(method: Callable[..., T]) -> Callable[..., T]:
    """Let a learner go on with fewer ``micro_tokens`` in a method, and after it.

    The learner has no gradients when the method is called.
    """

    @wraps(method)
    def fitting(learner: Any, *given: Any) -> T:
        def work(max_tokens: int) -> T:
            learner.micro_tokens = max_tokens
            return method(learner, *given)

        tokens = learner.micro_tokens
        return within_memory(work, tokens, undo=learner.optimizer.zero_grad)[0]

    return fitting


def checkpointing(model: nn.Module, what: str) -> Callable[..., None]:
    """A method of transformers that was ``gradient_checkpointing_*`` before 5.23."""
    new = getattr(model, f"activation_checkpointing_{what}", None)
    return new or getattr(model, f"gradient_checkpointing_{what}")

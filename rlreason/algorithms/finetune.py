"""Cross-entropy fine-tuning on given responses: the update of SFT and of each EI round.

1. *Order*: every epoch shuffles the examples by (seed, epoch).
2. *Loss*: minus the log-probability of response tokens, EOS included, prompt excluded:

       L(theta) = - (1 / N) sum over examples, sum over t of log pi_theta(a_t | q, a_<t)

   with N the number of response tokens of the batch, however it is cut.
3. *Update*: AdamW, gradient clipping, cosine schedule with warm-up.

Left out: weight decay schedules, gradient noise, mixed precision on CPU (slower there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from rlreason.algorithms.batching import (
    Example,
    micro_batches,
    response_token_count,
    shuffled_batches,
)
from rlreason.algorithms.optim import (
    clip_gradients,
    cosine_lr,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.recorder import NullRecorder, Recorder
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.settings import Settings


class FinetuneSettings(Settings):
    """How to fine-tune. The defaults are the paper's (epochs, batch, rates)."""

    epochs: int = Field(4, ge=1, description="Passes over the examples.")
    batch_size: int = Field(128, ge=1, description="Examples an update.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    lr_floor: float = Field(
        2e-7, ge=0, description="Learning rate that the schedule ends at."
    )
    warmup: float = Field(0.05, ge=0, le=1, description="Share of updates of warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moments.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Clip the gradient to this norm."
    )
    micro_tokens: int = Field(
        1024, ge=1, description="Tokens that go through the model at once."
    )
    seed: int = Field(0, ge=0, description="Seed of the order of the examples.")


def finetune(
    policy: Policy,
    examples: Sequence[Example],
    settings: FinetuneSettings,
    recorder: Recorder | None = None,
) -> Policy:
    """Fine-tune ``policy`` in place on ``examples`` and return it.

    Logged at each update: ``update``, ``epoch``, ``loss`` (nats a response token,
    before the update), ``grad_norm`` (before clipping), ``lr``, ``response_tokens``.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("nothing to fine-tune on: the list of examples is empty")
    recorder = recorder or NullRecorder()
    model = policy.model
    optimizer = new_adamw(model, settings)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = per_epoch * settings.epochs
    start = restore_training(recorder, model, optimizer)

    was_training = model.training
    model.eval()  # dropout stays off: what is scored is what is sampled
    for epoch in range(start // per_epoch, settings.epochs):
        batches = shuffled_batches(
            examples, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch
        )
        for i, batch in enumerate(batches):
            update = epoch * per_epoch + i
            if update < start:
                continue
            lr = cosine_lr(
                update,
                total=total,
                warmup=math.ceil(settings.warmup * total),
                peak=settings.lr,
                floor=settings.lr_floor,
            )
            set_lr(optimizer, lr)
            loss = accumulate_gradients(policy, batch, settings.micro_tokens)
            norm = clip_gradients(model, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.log(
                update=update,
                epoch=epoch,
                loss=loss,
                grad_norm=norm,
                lr=lr,
                response_tokens=response_token_count(batch),
            )
            if recorder.due() and update + 1 < total:
                save_training(recorder, model, optimizer, update + 1)
    model.train(was_training)
    return policy


def nll(policy: Policy, batch: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood (nats) of the responses of ``batch``: a scalar."""
    logprobs, response_mask = token_logprobs(
        policy.model,
        [example.prompt_tokens for example in batch],
        [example.tokens for example in batch],
    )  # (B, T), (B, T)
    return -(logprobs * response_mask).sum()


def accumulate_gradients(
    policy: Policy, batch: Sequence[Example], max_tokens: int
) -> float:
    """Add the gradient of the batch's mean token loss, micro-batch by micro-batch.

    Returns:
        The loss, in nats a response token.
    """
    count = response_token_count(batch)
    total = 0.0
    for mb in micro_batches(batch, max_tokens=max_tokens):
        loss = nll(policy, mb) / count
        loss.backward()
        total += loss.item()
    return total


def new_adamw(model: torch.nn.Module, settings: FinetuneSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, in one fused step."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def save_training(recorder, model, optimizer, updates: int) -> None:
    """Keep weights, optimiser and position: all that decides the next update."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    recorder.save(tensors | optimizer_tensors(optimizer, "adamw"), {"updates": updates})


def restore_training(recorder, model, optimizer) -> int:
    """Undo ``save_training``; returns the number of updates already made."""
    checkpoint = recorder.restore()
    if checkpoint is None:
        return 0
    load_model_tensors(model, checkpoint.tensors)
    load_optimizer_tensors(optimizer, "adamw", checkpoint.tensors)
    return checkpoint.state["updates"]


def load_model_tensors(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors named ``model.*`` and refuse a partial set."""
    own = model.state_dict()
    for name, target in own.items():
        target.copy_(tensors[f"model.{name}"])

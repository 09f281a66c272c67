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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rlreason.algorithms.batching import (
    Example,
    response_token_count,
    shuffled_batches,
)
from rlreason.algorithms.optim import (
    adamw,
    clip_gradients,
    cosine_lr,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.recorder import NullRecorder, Recorder
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import micro_batches, token_logprobs
from rlreason.settings import Settings

AnyExample = TypeVar("AnyExample", bound=Example)
LossSum = Callable[[list[AnyExample]], Tensor]


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
    optimizer = new_adamw(policy.model.parameters(), settings)
    start = restore_training(recorder, policy.model, optimizer)
    fit(
        policy.model,
        optimizer,
        examples,
        settings,
        recorder,
        loss=partial(nll, policy),
        start=start,
        save=partial(save_training, recorder, policy.model, optimizer),
    )
    return policy


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[AnyExample],
    settings: FinetuneSettings,
    recorder: Recorder,
    *,
    loss: LossSum,
    save: Callable[[int], None],
    count: Callable[[Sequence[AnyExample]], int] = response_token_count,
    start: int = 0,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """The loop of every supervised update: SFT, distilling, reward model, RCRL.

    Args:
        model: What learns, in place.
        optimizer: Over its weights; a group may have an ``lr_scale``.
        examples: In any order; each epoch shuffles them.
        settings: Epochs, batches, schedule, clipping.
        recorder: Gets a row an update, see ``finetune``.
        loss: Summed over the tokens of a micro-batch.
        save: Called with the number of updates made, whenever a checkpoint is due.
            What stands after the last update is the caller's to keep.
        count: Tokens of a batch that have a loss; its sum is divided by them.
        start: Updates that were made before.
        after_epoch: Called with the epoch's index after its last update is logged.
    """
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = per_epoch * settings.epochs
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
                floor=min(settings.lr_floor, settings.lr),
            )
            set_lr(optimizer, lr)
            tokens = count(batch)
            mean = accumulate(loss, batch, tokens, max_tokens=settings.micro_tokens)
            norm = clip_gradients(model, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.log(
                "update",
                update=update,
                epoch=epoch,
                loss=mean,
                grad_norm=norm,
                lr=lr,
                response_tokens=tokens,
            )
            if i + 1 == per_epoch and after_epoch is not None:
                after_epoch(epoch)
            if recorder.due() and update + 1 < total:
                save(update + 1)
    model.train(was_training)


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
    """Add the gradient of a batch's mean token loss, micro-batch by micro-batch.

    Returns:
        The loss, in nats a response token.
    """
    count = response_token_count(batch)
    return accumulate(partial(nll, policy), batch, count, max_tokens=max_tokens)


def accumulate(
    loss: LossSum, batch: Sequence[AnyExample], count: int, *, max_tokens: int
) -> float:
    """Add the gradient of ``loss`` over ``count``, however the batch is cut.

    Returns:
        The summed loss of the batch, divided by ``count``.
    """
    total = 0.0
    for mb in micro_batches(batch, max_tokens=max_tokens):
        mb_loss = loss(mb) / count
        mb_loss.backward()
        total += mb_loss.item()
    return total


def new_adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    settings: FinetuneSettings,
) -> torch.optim.AdamW:
    """AdamW over parameters, or groups of them."""
    return adamw(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
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


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors named ``model.*``.

    Raises:
        ValueError: Not exactly the model's weights; it is left as it was.
    """
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    given = {k: t.shape for k, t in tensors.items() if k.startswith("model.")}
    if shapes != given:
        wrong = sorted({name for name, _ in shapes.items() ^ given.items()})
        raise ValueError(
            f"{len(given)} tensors for {len(own)} weights of {type(model).__name__}; "
            f"missing, unknown or of another shape: {', '.join(wrong[:5])}. Load what "
            "was saved from the same model"
        )
    for name, target in own.items():
        target.copy_(tensors[name])

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rlreason.algorithms.batching import (
    AnyExample,
    Example,
    in_random_order,
    response_token_count,
    tokens_that_fit,
)
from rlreason.algorithms.optim import (
    adamw,
    check_finite,
    largest_weight,
    load_optimizer_tensors,
    optimizer_tensors,
    scheduled_lr,
    set_lr,
)
from rlreason.algorithms.recorder import Recorder, last_checkpoint
from rlreason.policy.compiling import compiled_layers
from rlreason.policy.layout import micro_batches
from rlreason.policy.load import Policy, positions_of
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.lora import (
    LoraSettings,
    merge_adapters,
    trainable_weights,
    with_lora,
)
from rlreason.policy.memory import within_memory
from rlreason.policy.packing import moved
from rlreason.policy.parallel import my_share, sum_gradients, summed
from rlreason.policy.progress import progress_bar
from rlreason.policy.weights import load_model_tensors, model_tensors
from rlreason.settings import Settings, ours, paper, precursor

Moment = Annotated[float, Field(ge=0, lt=1)]
LossSum = Callable[[list[AnyExample]], Tensor]


class FinetuneSettings(Settings):
    """How to fine-tune. The defaults are the paper's (epochs, batch, rates)."""

    epochs: int = paper(4, "Passes over the examples.", ge=1)
    batch_size: int = paper(128, "Examples an update.", ge=1)
    lr: float = paper(2e-5, "Peak learning rate.", gt=0)
    lr_floor: float = paper(2e-7, "Learning rate that the schedule ends at.", ge=0)
    warmup: float = ours(0.05, "Share of updates of warm-up.", ge=0, le=1)
    betas: tuple[Moment, Moment] = precursor((0.9, 0.95), "AdamW's moments.")
    weight_decay: float = ours(0.0, "AdamW's decay.", ge=0)
    max_grad_norm: float = ours(1.0, "Clip the gradient to this norm.", gt=0)
    micro_tokens: int | None = ours(
        None,
        "Tokens in the model at once; None: as many as fit, which is measured.",
        placement=True,
        ge=1,
    )
    compile: bool | None = ours(
        None,
        "Compile the layers, once a process; None: on a GPU in half precision.",
        placement=True,
    )
    lora: LoraSettings | None = ours(
        None,
        "Adapters, merged into the weights at the end; None: all weights.",
        neutral=None,
    )
    seed: int = ours(0, "Seed of the order of the examples.", ge=0)


def finetune(
    policy: Policy,
    examples: Sequence[Example],
    settings: FinetuneSettings,
    recorder: Recorder | None = None,
    *,
    new_tokens: Sequence[int] = (),
) -> Policy:
    """Fine-tune ``policy`` on ``examples`` and return it; its model is taken over.

    All weights learn, or adapters that are merged into them, with the embeddings of
    ``new_tokens`` beside these. Merged into weights of half precision, adapters lose
    what is below their rounding, the larger a part the less was learned: a third of
    what 20 updates gained, where that was measured. Load in float32 if that matters.

    Logged at each update: ``update``, ``epoch``, ``loss`` (nats a response token,
    before the update), ``grad_norm`` (before clipping), ``lr``, ``response_tokens``.

    Raises:
        ValueError: There are no examples, or one is longer than the model can read.
        DivergedError: A loss, a gradient or the weights are not finite.
    """
    if not examples:
        raise ValueError("nothing to fine-tune on: the list of examples is empty")
    room, longest = positions_of(policy.model), max(map(len, examples))
    if room is not None and longest > room:
        raise ValueError(
            f"an example has {longest} tokens, and the model reads {room}: leave out "
            "what is longer, or take a model with more positions"
        )
    learner = policy
    if settings.lora is not None:
        adapters = settings.lora.model_dump()
        learner = with_lora(
            policy, **adapters, new_tokens=new_tokens, seed=settings.seed
        )
    fit(
        learner.model,
        new_adamw(trainable_weights(learner.model), settings),
        examples,
        settings,
        recorder or Recorder(),
        loss=partial(nll, learner),
    )
    return merge_adapters(learner)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[AnyExample],
    settings: FinetuneSettings,
    recorder: Recorder,
    *,
    loss: LossSum,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """The loop of every supervised update: SFT, distilling, reward model, RCRL.

    It goes on from the recorder's checkpoint. What stands after the last update is the
    caller's to keep.

    Args:
        model: What learns, in place.
        optimizer: Over its weights; a group may have an ``lr_scale``.
        examples: In any order; each epoch shuffles them.
        settings: Epochs, batches, schedule, clipping.
        recorder: Gets a row an update, see ``finetune``, and checkpoints.
        loss: Summed over the tokens of a micro-batch.
        after_epoch: Called with the epoch's index after its last update is logged.

    Raises:
        DivergedError: Loss, gradient or weights are not finite. The update is not made,
            or its weights are not kept.
    """
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = per_epoch * settings.epochs
    start = saved = restore_training(recorder, model, optimizer)
    was_training = model.training
    model.eval()  # dropout stays off: what is scored is what is sampled
    max_tokens = settings.micro_tokens or tokens_that_fit(loss, examples)

    def check(update: int, **numbers: float) -> None:
        kept = last_checkpoint(recorder, "update", saved)
        remedy = f"Lower lr (now {settings.lr:g}), or load the policy in float32"
        check_finite(numbers, where=f"update {update + 1}", then=f"{kept}. {remedy}")

    with progress_bar(total, "training", unit="update", done=start) as progress:
        for update, batch in batches_of(examples, settings, start):
            epoch, last = update // per_epoch, (update + 1) % per_epoch == 0
            lr = scheduled_lr(update, total, settings)
            set_lr(optimizer, lr)
            tokens = response_token_count(batch)
            with recorder.clock("learning"):
                with compiled_layers(model, compiled=settings.compile):
                    mean, max_tokens = within_memory(
                        partial(accumulate, loss, batch, tokens),
                        max_tokens,
                        undo=optimizer.zero_grad,
                    )
                sum_gradients(model.parameters())
                clip, most = nn.utils.clip_grad_norm_, settings.max_grad_norm
                norm = float(clip(model.parameters(), most))
                check(update, loss=mean, grad_norm=norm)
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
            progress.update(loss=mean)
            due = recorder.due() and update + 1 < total
            if due or last:
                check(update, weights=largest_weight(model))
            if last and after_epoch is not None:
                after_epoch(epoch)
            if due:
                save_training(recorder, model, optimizer, update + 1)
                saved = update + 1
    model.train(was_training)


def batches_of(
    examples: Sequence[AnyExample], settings: FinetuneSettings, start: int
) -> Iterator[tuple[int, list[AnyExample]]]:
    """The batch of each update from ``start`` on, with the number of the update."""
    update = 0
    for epoch in range(settings.epochs):
        seed = settings.seed * 1_000_003 + epoch
        for batch in in_random_order(examples, settings.batch_size, seed):
            if update >= start:
                yield update, batch
            update += 1


def nll(policy: Policy, batch: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood (nats) of the responses of ``batch``: a scalar.

    Each response's own is multiplied by its weight; what is given has none.
    """
    logprobs, response_mask = token_logprobs(
        policy.model,
        [example.prompt_tokens for example in batch],
        [example.tokens for example in batch],
    )  # (B, T), (B, T)
    weights = np.ones(response_mask.shape)  # (B, T)
    for row, example in enumerate(batch):
        weights[row] *= example.weight
        weights[row, list(example.given)] = 0.0
    weights = moved(weights, logprobs.device).to(logprobs.dtype)
    return -(logprobs * response_mask * weights).sum()


def accumulate_gradients(
    policy: Policy, batch: Sequence[Example], max_tokens: int | None = None
) -> float:
    """Add the gradient of a batch's mean token loss, micro-batch by micro-batch.

    Returns:
        The loss, in nats a response token.
    """
    loss, count = partial(nll, policy), response_token_count(batch)
    max_tokens = max_tokens or tokens_that_fit(loss, batch)
    return accumulate(loss, batch, count, max_tokens=max_tokens)


def accumulate(
    loss: LossSum, batch: Sequence[AnyExample], count: int, *, max_tokens: int
) -> float:
    """Add the gradient of ``loss`` over ``count``, however the batch is cut.

    Of several processes each adds that of its share. A GPU is waited for once, at the
    end.

    Args:
        loss: Summed over the tokens of a micro-batch.
        batch: Examples of one update.
        count: What the sum is divided by.
        max_tokens: Of a micro-batch.

    Returns:
        The summed loss of the batch, divided by ``count``.
    """
    losses = []
    share = my_share(sorted(batch, key=len, reverse=True))
    for mb in micro_batches(share, max_tokens=max_tokens):
        mb_loss = loss(mb) / count
        mb_loss.backward()
        losses.append(mb_loss.detach())
    own = sum(torch.stack(losses).tolist()) if losses else 0.0
    return summed({"loss": own})["loss"]


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
    tensors = model_tensors(model) | optimizer_tensors(optimizer, "adamw")
    recorder.save(tensors, {"updates": updates})


def restore_training(recorder, model, optimizer) -> int:
    """Undo ``save_training``; returns the number of updates already made.

    A checkpoint from before the first of them holds other data and no weights.
    """
    checkpoint = recorder.restore()
    if checkpoint is None or not checkpoint.state["updates"]:
        return 0
    load_model_tensors(model, checkpoint.tensors)
    load_optimizer_tensors(optimizer, "adamw", checkpoint.tensors)
    return checkpoint.state["updates"]

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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlreason.algorithms.batching import (
    AnyExample,
    Example,
    response_token_count,
    shuffled_batches,
    tokens_that_fit,
)
from rlreason.algorithms.optim import (
    adamw,
    check_finite,
    clip_gradients,
    cosine_lr,
    largest_weight,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.recorder import NullRecorder, Recorder, last_checkpoint
from rlreason.policy.compiling import compiled_layers
from rlreason.policy.layout import micro_batches
from rlreason.policy.load import Policy
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
from rlreason.settings import Settings, setting

LossSum = Callable[[list[AnyExample]], Tensor]


class FinetuneSettings(Settings):
    """How to fine-tune. The defaults are the paper's (epochs, batch, rates)."""

    epochs: int = setting(4, "Passes over the examples.", source="paper", ge=1)
    batch_size: int = setting(128, "Examples an update.", source="paper", ge=1)
    lr: float = setting(2e-5, "Peak learning rate.", source="paper", gt=0)
    lr_floor: float = setting(
        2e-7, "Learning rate that the schedule ends at.", source="paper", ge=0
    )
    warmup: float = setting(
        0.05, "Share of updates of warm-up.", source="ours", ge=0, le=1
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "AdamW's moments.", source="precursor"
    )
    weight_decay: float = setting(0.0, "AdamW's decay.", source="ours", ge=0)
    max_grad_norm: float = setting(
        1.0, "Clip the gradient to this norm.", source="ours", gt=0
    )
    micro_tokens: int | None = setting(
        None,
        "Tokens in the model at once; None: as many as fit, which is measured.",
        source="ours",
        placement=True,
        ge=1,
    )
    compile: bool | None = setting(
        None,
        "Compile the layers, once a process; None: on a GPU in half precision.",
        source="ours",
        placement=True,
    )
    lora: LoraSettings | None = setting(
        None,
        "Adapters, merged into the weights at the end; None: all weights.",
        source="ours",
        neutral=None,
    )
    seed: int = setting(0, "Seed of the order of the examples.", source="ours", ge=0)


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
        DivergedError: A loss, a gradient or the weights are not finite.
    """
    if not examples:
        raise ValueError("nothing to fine-tune on: the list of examples is empty")
    return fit_policy(policy, examples, settings, recorder or NullRecorder(), loss=nll)


def fit_policy(
    policy: Policy,
    examples: Sequence[AnyExample],
    settings: FinetuneSettings,
    recorder: Recorder,
    *,
    loss: Callable[[Policy, list[AnyExample]], Tensor],
    count: Callable[[Sequence[AnyExample]], int] = response_token_count,
    new_tokens: Sequence[int] = (),
) -> Policy:
    """``fit`` all weights of a policy, or adapters that are merged into them.

    Args:
        loss: Of a policy and a micro-batch; the rest as in ``fit``.
        new_tokens: Whose rows of the embedding learn beside adapters.
    """
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
        recorder,
        loss=partial(loss, learner),
        count=count,
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
    count: Callable[[Sequence[AnyExample]], int] = response_token_count,
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
        count: Tokens of a batch that have a loss; its sum is divided by them.
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
        for update, batch in _batches(examples, settings, start):
            epoch, last = update // per_epoch, (update + 1) % per_epoch == 0
            lr = _lr_of(update, total, settings)
            set_lr(optimizer, lr)
            tokens = count(batch)
            with recorder.clock("learning"):
                with compiled_layers(model, compiled=settings.compile):
                    mean, max_tokens = within_memory(
                        partial(accumulate, loss, batch, tokens),
                        max_tokens,
                        undo=optimizer.zero_grad,
                    )
                sum_gradients(model.parameters())
                norm = clip_gradients(model, settings.max_grad_norm)
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


def _batches(
    examples: Sequence[AnyExample], settings: FinetuneSettings, start: int
) -> Iterator[tuple[int, list[AnyExample]]]:
    """The batch of each update from ``start`` on, with the number of the update."""
    update = 0
    for epoch in range(settings.epochs):
        for batch in shuffled_batches(
            examples, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch
        ):
            if update >= start:
                yield update, batch
            update += 1


def _lr_of(update: int, total: int, settings: FinetuneSettings) -> float:
    return cosine_lr(
        update,
        total=total,
        warmup=math.ceil(settings.warmup * total),
        peak=settings.lr,
        floor=min(settings.lr_floor, settings.lr),
    )


def nll(policy: Policy, batch: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood (nats) of the responses of ``batch``: a scalar.

    Each response's own is multiplied by its weight.
    """
    logprobs, response_mask = token_logprobs(
        policy.model,
        [example.prompt_tokens for example in batch],
        [example.tokens for example in batch],
    )  # (B, T), (B, T)
    weights = np.array([example.weight for example in batch])  # (B,)
    weights = moved(weights, logprobs.device).to(logprobs.dtype)
    return -(logprobs * response_mask * weights[:, None]).sum()


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
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    recorder.save(tensors | optimizer_tensors(optimizer, "adamw"), {"updates": updates})


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

"""Pretraining of nano: next-token prediction on the procedurally made text.

1. *Text*: update ``s`` reads documents of the stream (seed, s), packed without padding.
2. *Loss*: cross-entropy of every next token.
3. *Update*: Muon for the matrices, AdamW for embeddings and norms, trapezoid schedule.

It is what a base model's training is to the paper: done once, by the project, with its
result committed. Everything is a function of the settings, so a killed run goes on
where its last checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlreason.algorithms.optim import (
    check_finite,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
    trapezoid,
)
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.nano import build_tokenizer, new_model
from rlreason.policy.progress import progress_bar
from rlreason.policy.weights import load_model_tensors, model_tensors
from rlreason.settings import Settings, ours
from rlreason.tasks.pretraining_text import pretraining_documents


class PretrainSettings(Settings):
    """Settings of ``rlreason train nano``."""

    size: str = ours("nano", "nano or nano-xs.")
    seed: int = ours(0, "Seed of the weights and of the text.")
    # Fewer updates than the schedule has: the base stops while it still lacks the
    # composing of steps, which is what it is there to learn
    updates: int = ours(2400, "Optimiser steps.")
    schedule: int = ours(3000, "Updates after which the learning rate would be zero.")
    rows: int = ours(16, "Sequences an update.")
    # Two solved examples, a question and its solution are up to 450 tokens
    context: int = ours(512, "Tokens a sequence.")
    lr: float = ours(0.03, "Peak learning rate of the matrices (Muon).")
    lr_vectors: float = ours(
        0.01, "Peak learning rate of embeddings and norms (AdamW)."
    )
    warmup: int = ours(50, "Updates of warm-up.")
    decay: int = ours(900, "Updates at the end in which the rate falls to zero.")
    bf16: bool = ours(
        True,
        "Matrix products in bfloat16 (weights stay fp32): 1.5 times as fast on a CPU "
        "with AMX, slower on one without.",
    )


def packed_rows(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[str],
    *,
    rows: int,
    context: int,
) -> Tensor:
    """One update's text: documents end to end, each as BOS, text, EOS.

    Returns:
        Token ids (rows, context + 1); the last document is cut where the batch is full.
    """
    wanted = rows * (context + 1)
    ids: list[int] = []
    while len(ids) < wanted:
        ids += [*tokenizer(next(documents)).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids[:wanted]).view(rows, context + 1)


def build_optimizers(
    model: LlamaForCausalLM, settings: PretrainSettings
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    held = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in held]
    return {
        "muon": torch.optim.Muon(
            inner,
            lr=settings.lr,
            momentum=0.95,
            weight_decay=0.0,
            adjust_lr_fn="original",
        ),
        "adamw": torch.optim.AdamW(
            outer, lr=settings.lr_vectors, betas=(0.9, 0.95), weight_decay=0.0
        ),
    }


def pretrain(
    settings: PretrainSettings, recorder: Recorder
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a nano from its seed, or go on from the recorder's last checkpoint.

    Logged at each update: ``loss`` (nats a token), ``grad_norm``, ``lr``, ``tokens``
    (read so far).
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(settings.seed)
    model = new_model(settings.size, tokenizer)
    if torch.cuda.is_available():
        model.cuda()
    optimizers = build_optimizers(model, settings)

    start = 0
    if (checkpoint := recorder.restore()) is not None:
        start = checkpoint.state["updates"]
        load_model_tensors(model, checkpoint.tensors)
        for name, optimizer in optimizers.items():
            load_optimizer_tensors(optimizer, name, checkpoint.tensors)

    model.train()
    with progress_bar(
        settings.updates, "pretraining", unit="update", done=start
    ) as progress:
        for step in range(start, settings.updates):
            metrics = _update(model, tokenizer, optimizers, settings, step)
            recorder.log("update", update=step, **metrics)
            progress.update(loss=metrics["loss"])
            if recorder.due() or step + 1 == settings.updates:
                tensors = model_tensors(model)
                for name, optimizer in optimizers.items():
                    tensors |= optimizer_tensors(optimizer, name)
                recorder.save(tensors, {"updates": step + 1})
    return model.eval(), tokenizer


def _update(model, tokenizer, optimizers, settings, step: int) -> dict[str, float]:
    """One step of both optimisers on the text of update ``step``; its metrics."""
    shape = trapezoid(
        step,
        total=settings.schedule,
        warmup=settings.warmup,
        decay=settings.decay,
    )
    batch = packed_rows(
        tokenizer,
        pretraining_documents(f"{settings.seed}/{step}"),
        rows=settings.rows,
        context=settings.context,
    ).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
        loss = next_token_loss(model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    numbers = {"loss": loss.item(), "grad_norm": float(norm)}
    check_finite(numbers, where=f"update {step + 1}", then="lower lr and lr_vectors")
    for optimizer, lr in (
        (optimizers["muon"], settings.lr),
        (optimizers["adamw"], settings.lr_vectors),
    ):
        set_lr(optimizer, lr * shape)
        optimizer.step()
    model.zero_grad(set_to_none=True)
    tokens = (step + 1) * settings.rows * settings.context
    return {**numbers, "lr": settings.lr * shape, "tokens": tokens}


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each next token of ``batch`` (rows, context + 1)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].flatten()
    )

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
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlreason.algorithms.optim import (
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
    trapezoid_lr,
)
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.nano import build_tokenizer, new_model
from rlreason.tasks.pretraining_text import pretraining_documents


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of ``rlreason train nano``.

    Attributes:
        size: "nano" or "nano-xs".
        seed: Seed of the weights and of the text.
        updates: Optimiser steps. Fewer than the schedule has: the base stops while it
            still lacks the composing of steps, which is what it is there to learn.
        schedule: Updates after which the learning rate would be zero.
        rows: Sequences an update.
        context: Tokens a sequence.
        long_updates: Last updates, whose rows are half as many and twice as long: so
            that places further on are known, where a prompt with examples goes on.
        lr: Peak learning rate of the matrices (Muon).
        lr_vectors: Peak learning rate of embeddings and norms (AdamW).
        warmup: Updates of warm-up.
        decay: Updates at the end of the schedule in which the rate falls to zero.
        bf16: Matrix products in bfloat16 (weights stay fp32). 1.5 times as fast on a
            CPU with AMX, slower on one without.
    """

    size: str = "nano"
    seed: int = 0
    updates: int = 2400
    schedule: int = 3000
    rows: int = 32
    context: int = 256
    long_updates: int = 0
    lr: float = 0.03
    lr_vectors: float = 0.01
    warmup: int = 50
    decay: int = 900
    bf16: bool = True


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
    optimizers = build_optimizers(model, settings)
    peaks = {"muon": settings.lr, "adamw": settings.lr_vectors}

    start = 0
    if (checkpoint := recorder.restore()) is not None:
        start = checkpoint.state["updates"]
        weights = {k[6:]: v for k, v in checkpoint.tensors.items() if k[:6] == "model."}
        model.load_state_dict(weights, strict=False)
        for name, optimizer in optimizers.items():
            load_optimizer_tensors(optimizer, name, checkpoint.tensors)

    model.train()
    for step in range(start, settings.updates):
        shape = trapezoid_lr(
            step,
            total=settings.schedule,
            warmup=settings.warmup,
            decay=settings.decay,
            peak=1.0,
        )
        documents = pretraining_documents(f"{settings.seed}/{step}")
        longer = 2 if step >= settings.updates - settings.long_updates else 1
        batch = packed_rows(
            tokenizer,
            documents,
            rows=settings.rows // longer,
            context=settings.context * longer,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            loss = next_token_loss(model, batch)
        loss.backward()
        norm = clip_gradients(model, 1.0)
        for name, optimizer in optimizers.items():
            set_lr(optimizer, peaks[name] * shape)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        recorder.log(
            "update",
            update=step,
            loss=loss.item(),
            grad_norm=norm,
            lr=settings.lr * shape,
            tokens=(step + 1) * settings.rows * settings.context,
        )
        if recorder.due() or step + 1 == settings.updates:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            for name, optimizer in optimizers.items():
                tensors |= optimizer_tensors(optimizer, name)
            recorder.save(tensors, {"updates": step + 1})
    return model.eval(), tokenizer


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each next token of ``batch`` (rows, context + 1)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].flatten()
    )

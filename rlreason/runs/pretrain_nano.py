"""Making the bundled weights: pretraining with its folder, its asset and its card."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlreason.algorithms.pretrain import PretrainSettings, pretrain
from rlreason.policy.load import ASSETS
from rlreason.policy.nano import SIZES
from rlreason.runs.environment import environment
from rlreason.runs.folder import RunFolder
from rlreason.tasks.pretraining_text import COMPOSED, MIX

CARD = """# {size}

A Llama-architecture language model of {parameters:,} parameters, pretrained on
procedurally made text. It stands for Llama-2 in the small: it knows its equations and
solves what takes one step, but it has seldom read how steps are put together. So its
prompted accuracy on problems of three to five steps is low and not zero, supervised
fine-tuning lifts it to the middle of the scale, and reinforcement learning has room
above that.

| property | value |
|---|---|
| Made by | `rlreason train nano --size {size} --seed {seed}` |
| Shape | hidden {hidden}, layers {layers}, heads {heads}, feed-forward {feed_forward} |
| Vocabulary | {vocabulary} tokens: words of the text, single digits, bytes |
| Text | {tokens:,} tokens read once, in rows of {context}; documents: {mix}; of the problems on pages {composed:.0%} have 2 to 5 steps, the others one |
| Optimiser | Muon (matrices, {lr}), AdamW (the rest, {lr_vectors}) |
| Updates | {updates} of a schedule of {schedule} |
| Final loss | {loss:.3f} nats a token, mean of the last 50 updates |
| Time | {minutes:.0f} minutes on {device} |
| SHA-256 of `model.safetensors` | `{digest}` |
| Licence | MIT, as the project |

It speaks only of the small world of its templates. Other bits come out on another
device, since matrix products in bfloat16 round differently; the recipe is the same.
"""  # noqa: E501


def train_nano(
    size: str = "nano", *, seed: int = 0, folder: Path | None = None
) -> Path:
    """Pretrain one size from a seed, or go on where a killed run stopped.

    Args:
        size: "nano" or "nano-xs".
        seed: Of weights and text.
        folder: Where the finished model goes; the package's assets by default.

    Returns:
        The folder with weights, tokenizer and model card.
    """
    settings = PretrainSettings(size=size, seed=seed)
    folder = folder or ASSETS / size
    with RunFolder("nano", settings, save_every=60) as run:
        # A run that is done goes through its last checkpoint alone.
        model, tokenizer = pretrain(settings, run)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Sampling never reads it, and no other program should find defaults here.
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = (folder / "model.safetensors").read_bytes()
    hidden, layers, heads, feed_forward = SIZES[size]
    losses = [row["loss"] for row in run.metrics[-50:]]
    card = CARD.format(
        size=size,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=hidden,
        layers=layers,
        heads=heads,
        feed_forward=feed_forward,
        vocabulary=len(tokenizer),
        tokens=settings.updates * settings.rows * settings.context,
        context=settings.context,
        mix=", ".join(f"{kind.share:.0%} {name}" for name, kind in MIX.items()),
        composed=COMPOSED,
        lr=settings.lr,
        lr_vectors=settings.lr_vectors,
        updates=settings.updates,
        schedule=settings.schedule,
        loss=sum(losses) / len(losses),
        minutes=run.status["seconds"] / 60,
        device=environment()["device"],
        digest=hashlib.sha256(weights).hexdigest(),
    )
    (folder / "README.md").write_text(card)
    return folder

"""``rlreason bench train``: fine-tuning beside transformers' ``Trainer``.

Same model, same tokens, same batch size, same threads, one epoch each, in turns; the
first turn warms up, and compiles where that is asked for, and does not count. Both do
the same arithmetic: AdamW, gradient clipping, loss on response tokens alone. What
differs is how the batch is put through the model: sorted by length, in micro-batches,
logits for response tokens only.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.sft import solution_examples
from rlreason.policy.load import Policy, load_policy
from rlreason.tasks import load_problems


def bench_train(
    *,
    policy: str = "nano",
    problems: int = 512,
    batch_size: int = 32,
    repeats: int = 5,
    compiled: bool = False,
) -> dict[str, float]:
    """Time one epoch of fine-tuning with both, in turns.

    Args:
        policy: As in ``load_policy``.
        problems: gsm-mini training problems with their solutions.
        batch_size: Examples an update.
        repeats: Turns that count.
        compiled: Both by ``torch.compile``: our layers, and their whole model, which is
            what the option of the same name of theirs does.

    Returns:
        ``tokens`` (prompt and response, without padding), ``ours`` and ``trainer``
        (median tokens a second), ``ratio`` (median over turns of the ratio in a turn),
        ``lowest`` and ``highest`` ratio, ``threads``.
    """
    base = load_policy(policy)
    examples = solution_examples(base, load_problems("gsm-mini", limit=problems))
    tokens = sum(len(example) for example in examples)
    ours, theirs = [], []
    for _ in range(repeats + 1):
        for seconds_of, rates in ((_time_ours, ours), (_time_trainer, theirs)):
            seconds = seconds_of(base.clone(), examples, batch_size, compiled)
            rates.append(tokens / seconds)
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "tokens": tokens,
        "ours": median(ours[1:]),
        "trainer": median(theirs[1:]),
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "threads": torch.get_num_threads(),
    }


def _time_ours(
    policy: Policy, examples: Sequence[Example], batch_size: int, compiled: bool
) -> float:
    settings = FinetuneSettings(
        epochs=1, batch_size=batch_size, lr=1e-4, lr_floor=0, compile=compiled
    )
    start = time.perf_counter()
    finetune(policy, examples, settings)
    return time.perf_counter() - start


def _time_trainer(
    policy: Policy, examples: Sequence[Example], batch_size: int, compiled: bool
) -> float:
    """One epoch of ``Trainer``; building it and its data is not counted."""
    rows = [
        {
            "input_ids": [*example.prompt_tokens, *example.tokens],
            "labels": [-100] * len(example.prompt_tokens) + [*example.tokens],
        }
        for example in examples
    ]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": policy.pad_id, "labels": -100}
        padded = {
            name: torch.tensor(
                [row[name] + [fill[name]] * (width - len(row[name])) for row in batch]
            )
            for name in fill
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        padded["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return padded

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=policy.model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                num_train_epochs=1,
                learning_rate=1e-4,
                lr_scheduler_type="cosine",
                max_grad_norm=1.0,
                use_cpu=policy.device.type == "cpu",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                torch_compile=compiled,
            ),
            train_dataset=rows,
            data_collator=collate,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logging.set_verbosity(verbosity)
    return seconds

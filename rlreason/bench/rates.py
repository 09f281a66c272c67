"""How fast this machine samples and trains a recipe's policy, for plans."""

from __future__ import annotations

import time

import torch

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import finetune
from rlreason.policy.load import Policy, vocabulary_rows
from rlreason.policy.sampler import sample
from rlreason.runs.estimate import Work
from rlreason.runs.recipes import Recipe


def measured_rates(recipe: Recipe, work: Work) -> tuple[float, float]:
    """Tokens a second of sampling, responses alone, and of SFT, prompts included."""
    policy = recipe.base()
    asked = recipe.questions()[:16]
    sample(policy, asked[:1], max_new_tokens=4)  # the sampler looks at it once
    began = time.perf_counter()
    rollouts = sample(policy, asked, k=16, max_new_tokens=recipe.max_new_tokens)
    sampled = sum(len(r.tokens) for r in rollouts) / (time.perf_counter() - began)
    batch = _unlike_examples(policy, work, recipe.sft.batch_size)
    for epochs in (1, 2):  # the first time finds out how much fits, and may compile
        settings = recipe.sft.model_copy(update={"epochs": epochs})
        began = time.perf_counter()
        finetune(policy, batch, settings)
    tokens = epochs * sum(map(len, batch))
    return sampled, tokens / (time.perf_counter() - began)


def _unlike_examples(policy: Policy, work: Work, count: int) -> list[Example]:
    """Of random tokens: of examples that begin alike, the beginning is trained once."""
    generator, rows = torch.Generator().manual_seed(0), vocabulary_rows(policy.model)
    size = (count, work.prompt + work.response)
    tokens = torch.randint(rows, size, generator=generator).tolist()
    return [Example(tuple(t[: work.prompt]), tuple(t[work.prompt :])) for t in tokens]

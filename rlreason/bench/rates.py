"""How fast this machine samples and trains a recipe's policy, for plans."""

from __future__ import annotations

import time

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import finetune
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
    example = Example((1,) * work.prompt, (1,) * work.response)
    batch = [example] * recipe.sft.batch_size
    settings = recipe.sft.model_copy(update={"epochs": 2})
    began = time.perf_counter()
    finetune(policy, batch, settings)
    tokens = settings.epochs * sum(map(len, batch))
    return sampled, tokens / (time.perf_counter() - began)

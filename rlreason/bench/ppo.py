"""``rlreason bench ppo``: where the time of a phase of PPO goes.

A phase samples, scores and learns. For each stage: seconds, the tokens that had to go
through the trunk, those that did (padding included), and how many a second. The second
over the first says whether anything was computed twice: 1 would be nothing at all. It
is about PPO with a value function; without one a phase may do with less.

What has to go through: in sampling a prompt once a question and each sampled token but
the last; in scoring each beginning that sequences have in common once, for the policy
(V comes along) and for the reference; in learning once an epoch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.layout import in_order
from rlreason.policy.logprobs import trunk_of
from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import RewardFunction
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs.profiles import load_recipe
from rlreason.runs.steps import train_sft
from rlreason.tasks.problem import Problem

STAGES = ("sampling", "scoring", "learning")


@dataclass(frozen=True)
class Stage:
    """One stage of a phase: medians over phases.

    Attributes:
        seconds: Wall-clock.
        share: Of the three stages together.
        needed: Tokens that had to go through the trunk.
        computed: Tokens that did, padding included.
        calls: Forward passes of the trunk, a reference's included.
    """

    name: str
    seconds: float
    share: float
    needed: float
    computed: float
    calls: float


class _Meter(Recorder):
    """Counts seconds, calls and tokens of the trunks by stage, phase by phase."""

    def __init__(self) -> None:
        self.stage: str | None = None
        self.phases: list[dict[str, dict[str, float]]] = []
        self.begin()

    def begin(self) -> None:
        self.now: dict[str, dict[str, float]] = {
            stage: defaultdict(float) for stage in STAGES
        }

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        start, self.stage = time.perf_counter(), stage
        yield
        self.now[stage]["seconds"] += time.perf_counter() - start
        self.stage = None

    def log(self, kind: str, **metrics: Any) -> None:
        if kind == "phase":
            self.phases.append(self.now)
            self.begin()

    def see(self, hidden: Tensor) -> None:
        """Count a forward pass by what enters its first layer, (B, L, H)."""
        if self.stage is not None:
            self.now[self.stage]["calls"] += 1
            self.now[self.stage]["computed"] += hidden.shape[0] * hidden.shape[1]


def bench_ppo(
    *,
    profile: str = "tiny",
    phases: int = 4,
    start: str = "sft",
    settings: PpoSettings | None = None,
) -> list[Stage]:
    """Run some phases of a profile's PPO; the first warms up.

    Args:
        profile: Whose recipe.
        phases: That count.
        start: ``"sft"``, or ``"base"``, whose prompts hold the profile's examples.
        settings: In place of the recipe's.
    """
    recipe = load_recipe(profile)
    prompted = start == "base"
    policy = recipe.base() if prompted else train_sft(recipe).policy
    chosen = settings or recipe.ppo
    chosen = chosen.model_copy(
        update={"phases": phases + 1, "max_new_tokens": recipe.max_new_tokens}
    )
    meter = _Meter()
    with _watched(policy.model, meter):
        ppo(
            policy,
            recipe.questions(),
            chosen,
            reward=_counting(sparse_token_rewards, meter, chosen),
            shots=recipe.shot_problems() if prompted else (),
            recorder=meter,
        )
    middle = {
        stage: {
            name: median(phase[stage][name] for phase in meter.phases[1:])
            for name in ("seconds", "needed", "computed", "calls")
        }
        for stage in STAGES
    }
    total = sum(numbers["seconds"] for numbers in middle.values())
    return [
        Stage(stage, share=numbers["seconds"] / total, **numbers)
        for stage, numbers in middle.items()
    ]


@contextmanager
def _watched(model: PreTrainedModel, meter: _Meter) -> Iterator[None]:
    """See every forward pass of the model, and of copies that are made of it."""

    # A function: a copy of a model copies the object of a method that hooks it.
    def see(_, args: tuple, kwargs: dict[str, Any]) -> None:
        meter.see(args[0] if args else kwargs["hidden_states"])  # (B, L, H)

    layer = _first_layer(trunk_of(model))
    handle = layer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first_layer(trunk: torch.nn.Module) -> torch.nn.Module:
    lists = (m for m in trunk.children() if isinstance(m, torch.nn.ModuleList))
    return next(lists)[0]


def _counting(
    reward: RewardFunction, meter: _Meter, settings: PpoSettings
) -> RewardFunction:
    """``reward``, noting beside it what each phase's rollouts need."""

    def counted(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        # What sequences have in common at their beginning can be computed once
        texts = [(*r.prompt_tokens, *r.tokens) for r in rollouts]
        whole = sum(map(len, texts)) - sum(in_order(texts)[1])
        prompts = sum(len(r.prompt_tokens) for r in rollouts[:: settings.n])
        drawn = {
            (r.problem_id, r.tokens[:n])
            for r in rollouts
            for n in range(1, len(r.tokens))
        }
        meter.now["sampling"]["needed"] = prompts + len(drawn)
        passes = 2 if settings.measures_kl else 1
        meter.now["scoring"]["needed"] = passes * whole
        meter.now["learning"]["needed"] = settings.epochs * whole
        return reward(rollouts, problems)

    return counted


def format_ppo_benchmark(stages: list[Stage]) -> str:
    """A table for the terminal."""
    lines = [
        f"{'stage':<9} {'seconds':>8} {'share':>6} {'tokens/s':>9} "
        f"{'passes':>7} {'needed':>8} {'computed':>9} {'ratio':>6}"
    ]
    for s in stages:
        lines.append(
            f"{s.name:<9} {s.seconds:>8.2f} {s.share:>6.0%} "
            f"{s.needed / s.seconds:>9,.0f} {s.calls:>7.0f} {s.needed:>8,.0f} "
            f"{s.computed:>9,.0f} {s.computed / s.needed:>6.2f}"
        )
    return "\n".join(lines)

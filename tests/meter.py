"""Counts what goes through the trunk in a phase of PPO, and what would have to.

What has to: in sampling each beginning that prompts have in common once, and each
sampled token but the last; in scoring each beginning that sequences have in common
once, for the policy (V comes along) and for the reference; in learning once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.layout import in_order
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import trunk_of
from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import RewardFunction
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs.recipes import Recipe
from rlreason.tasks.problem import Problem

STAGES = ("sampling", "scoring", "learning")


@dataclass
class Stage:
    """One stage of a phase.

    Attributes:
        needed: Tokens that had to go through the trunk.
        computed: Tokens that did, padding included.
        calls: Forward passes of the trunk, a reference's included.
    """

    needed: int = 0
    computed: int = 0
    calls: int = 0


class _Meter(Recorder):
    """Counts calls and tokens of the trunks by stage, phase by phase."""

    def __init__(self) -> None:
        self.stage: str | None = None
        self.phases: list[dict[str, Stage]] = []
        self.begin()

    def begin(self) -> None:
        self.now = {stage: Stage() for stage in STAGES}

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        self.stage = stage
        yield
        self.stage = None

    def log(self, kind: str, **metrics: Any) -> None:
        if kind == "phase":
            self.phases.append(self.now)
            self.begin()

    def see(self, hidden: Tensor) -> None:
        """Count a forward pass by what enters its first layer, (B, L, H)."""
        if self.stage is not None:
            self.now[self.stage].calls += 1
            self.now[self.stage].computed += hidden.shape[0] * hidden.shape[1]


def run_ppo(
    recipe: Recipe, policy: Policy, settings: PpoSettings, *, prompted: bool = False
) -> dict[str, Stage]:
    """Run two phases of PPO and count the second; the first warms up."""
    chosen = settings.model_copy(
        update={"phases": 2, "max_new_tokens": recipe.max_new_tokens}
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
    return meter.phases[1]


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


def distinct(sequences: Sequence[tuple[int, ...]]) -> int:
    """Tokens to compute: what sequences have in common at their beginning once."""
    return sum(map(len, sequences)) - sum(in_order(sequences)[1])


def _counting(
    reward: RewardFunction, meter: _Meter, settings: PpoSettings
) -> RewardFunction:
    """``reward``, noting beside it what each phase's rollouts need."""

    def counted(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        whole = distinct([(*r.prompt_tokens, *r.tokens) for r in rollouts])
        prompts = distinct([r.prompt_tokens for r in rollouts])
        drawn = {
            (r.problem_id, r.tokens[:n])
            for r in rollouts
            for n in range(1, len(r.tokens))
        }
        meter.now["sampling"].needed = prompts + len(drawn)
        passes = 2 if settings.measures_kl else 1
        meter.now["scoring"].needed = passes * whole
        meter.now["learning"].needed = settings.epochs * whole
        return reward(rollouts, problems)

    return counted

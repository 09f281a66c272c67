"""Settings of PPO, REINFORCE, RLOO and GRPO. The defaults are the paper's."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlreason.algorithms.curriculum import CurriculumSettings, UniformSettings
from rlreason.algorithms.finetune import Moment
from rlreason.policy.lora import LoraSettings
from rlreason.policy.value import ValueSettings
from rlreason.settings import Settings, ours, paper, precursor


class GaeSettings(Settings):
    """Credit by a learned value function (Schulman et al. 2016)."""

    kind: Literal["gae"] = paper("gae", "Generalised advantage estimation.")
    gamma: float = precursor(1.0, "Discount of a token.", gt=0, le=1)
    lam: float = precursor(0.95, "Lambda: 1 is reward-to-go - V.", ge=0, le=1)
    value: ValueSettings = paper(ValueSettings, "Where V comes from.")
    value_coef: float = precursor(1.0, "Weight of the value loss.", gt=0)
    value_clip: float | None = precursor(
        0.2, "How far V may move in a phase at full gradient.", neutral=None, gt=0
    )
    value_lr_scale: float = ours(
        1.0, "Learning rate of V as a multiple of the policy's.", neutral=1.0, gt=0
    )
    value_epochs: int = ours(
        0,
        "Passes after the policy's in which V alone learns, as in Spinning Up: V needs "
        "more updates than the policy may make.",
        neutral=0,
        ge=0,
    )
    value_lam: float | None = ours(
        None,
        "Lambda of what V is to become; None: lam. At 1 V learns from what was paid, "
        "not from itself, while lam below 1 keeps the advantages calm (VC-PPO, Yuan et "
        "al. 2025).",
        neutral=None,
        ge=0,
        le=1,
    )
    bootstrap: bool = ours(
        False,
        "What a cut response gets at its end: V of where it was cut, in place of all "
        "that its last token was paid. Safe with gamma < 1: undiscounted, V of a "
        "response that never ends can hold itself up.",
        neutral=False,
    )


class BaselineSettings(Settings):
    """Credit without a value function: every token gets its response's advantage.

    The return R of a response is the sum of its rewards, KL penalty included.

    - reinforce: R minus the mean of the batch;
    - rloo: R minus the mean of the question's other responses (Ahmadian et al. 2024);
      with ``k`` above 1 the objective is the best of k responses (pass@k) in place of
      the mean one (Walder and Karkhanis 2025), see ``credit.best_of_k_advantages``;
    - grpo: what the task paid minus the question's mean, divided by its deviation
      (Shao et al. 2024); then the KL penalty, less its mean, is taken off undivided.
    """

    kind: Literal["reinforce", "rloo", "grpo"] = ours(..., "The baseline.")
    k: int = ours(1, "Of rloo: the best of how many responses counts.", neutral=1, ge=1)


class KlSettings(Settings):
    """The penalty that keeps the policy near the reference."""

    coef: float = paper(0.05, "Beta: price of a nat of KL.", ge=0)
    estimator: Literal["k1", "k2", "k3"] = precursor("k1", "See kl_estimate.")
    target: float | None = ours(
        None, "Nats a response to adapt beta to; None: fixed.", neutral=None, gt=0
    )
    horizon: int = ours(10_000, "Rollouts over which an adaptive beta moves.", ge=1)
    reference: Literal["copy", "swap"] = ours(
        "copy",
        "Of full fine-tuning: a second model, or its weights on the CPU, put into the "
        "one model to score all responses of a phase. LoRA needs neither.",
        placement=True,
    )

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> KlSettings:
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient must start above 0: set kl.coef")
        return self


class PpoSettings(Settings):
    """How to run PPO. The defaults are the paper's."""

    phases: int = paper(250, "Phases of sampling and learning.", ge=1)
    rollouts: int = paper(1024, "Responses a phase, of all questions.", ge=1)
    n: int = paper(4, "Responses a question.", ge=1)
    keep: int | None = paper(
        None, "Learn from the best so many of n only; None: all.", neutral=None, ge=1
    )
    temperature: float = paper(
        0.7, "Of sampling and of scoring. The paper: 0.2 from a base.", gt=0
    )
    max_new_tokens: int = precursor(256, "Length limit of a response.", ge=1)
    epochs: int = paper(4, "Passes over a phase's responses.", ge=1)
    batch_size: int = paper(256, "Responses an update.", ge=1)
    lr: float = paper(1e-6, "Peak learning rate.", ge=0)
    lr_floor: float = ours(1e-6, "Learning rate at the end.", ge=0)
    warmup: float = ours(0.0, "Share of phases of warm-up.", neutral=0.0, ge=0, le=1)
    betas: tuple[Moment, Moment] = precursor((0.9, 0.95), "AdamW's moments.")
    weight_decay: float = precursor(1e-6, "AdamW's decay.", ge=0)
    max_grad_norm: float = ours(1.0, "Clip each gradient's norm.", gt=0)
    clip: float = precursor(0.2, "Epsilon of the clipped surrogate.", gt=0)
    entropy_coef: float = ours(0.0, "Weight of the entropy bonus.", neutral=0.0, ge=0)
    whiten: bool = precursor(True, "Advantages of a phase get mean 0, variance 1.")
    stop_kl: float | None = ours(
        None, "Nats a token from the sampler that end a phase.", neutral=None, gt=0
    )
    max_kl: float | None = ours(
        1.0,
        "Nats a token from the reference that stop the run; None: nothing does, and "
        "without a penalty the reference is not asked at all.",
        neutral=None,
        gt=0,
    )
    credit: GaeSettings | BaselineSettings = paper(
        GaeSettings, "How rewards become advantages.", discriminator="kind"
    )
    kl: KlSettings = paper(KlSettings, "The KL penalty.")
    lora: LoraSettings | None = paper(LoraSettings, "Adapters; None: all weights.")
    curriculum: CurriculumSettings = paper(UniformSettings, "Questions asked.")
    micro_tokens: int | None = ours(
        16384,
        "Tokens that go through the model at once; None: as many as fit.",
        placement=True,
        ge=1,
    )
    logit_rows: int | None = ours(
        None, "Rows of logits held at once; None: all.", placement=True, ge=1
    )
    compile: bool | None = ours(
        None,
        "Compile the layers, once a process; None: on a GPU in half precision.",
        placement=True,
    )
    gradient_checkpointing: bool = ours(
        False, "Compute activations again in the backward pass.", placement=True
    )
    seed: int = ours(0, "Of sampling, questions and mini-batches.", ge=0)

    @model_validator(mode="after")
    def _fits(self) -> PpoSettings:
        if self.rollouts % self.n:
            raise ValueError(
                f"rollouts={self.rollouts} is no multiple of n={self.n}: every "
                f"question gets n responses"
            )
        if self.keep is not None and self.keep > self.n:
            raise ValueError(f"keep={self.keep} is more than n={self.n}")
        if self.credit.kind in ("rloo", "grpo") and self.n < 2:
            raise ValueError(
                f"{self.credit.kind} compares responses: set n to 2 or more"
            )
        if isinstance(self.credit, BaselineSettings) and self.credit.k > 1:
            if self.credit.kind != "rloo":
                raise ValueError(f"{self.credit.kind} has no best of k: leave k at 1")
            if self.n <= self.credit.k:
                raise ValueError(
                    f"the best of k={self.credit.k} responses is compared with that of "
                    f"k others: set n (now {self.n}) above k"
                )
        if self.kl.target is not None and self.rollouts >= 5 * self.kl.horizon:
            raise ValueError(
                f"kl.horizon={self.kl.horizon}: one phase of {self.rollouts} rollouts "
                "could turn the adaptive coefficient negative; set it above "
                f"{self.rollouts // 5}"
            )
        return self

    @property
    def measures_kl(self) -> bool:
        """Whether the reference is asked: by the penalty, or to stop a run-away."""
        return self.kl.coef > 0 or self.max_kl is not None

    @property
    def gae(self) -> GaeSettings | None:
        """The settings of the value function, None where there is none."""
        return self.credit if isinstance(self.credit, GaeSettings) else None

"""Proximal policy optimisation on tokens, with REINFORCE, RLOO and GRPO beside it.

Havrilla et al. (2024), section 3; Schulman et al. (2017). A phase has the steps that
its chapter has:

1. *Ask*: draw questions, sample N responses to each at one temperature.
2. *Score*: one pass of the policy with its value function, one of the reference.
3. *Pay*: the task's reward per token, minus ``kl.coef`` times the KL per token.
4. *Credit*: generalised advantage estimation, or a baseline over responses; whiten.
5. *Learn*: several epochs of mini-batches on the clipped losses.

Every action is a token. All losses are sums over response tokens divided by the number
of response tokens of the mini-batch, however it is cut. What was sampled is what is
scored and trained: no text is tokenised again, and temperature is one number.

Left out against the paper: choosing the checkpoint on a validation set (each phase can
be validated through ``on_phase``, the last one is returned), and several processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlreason.algorithms.curriculum import (
    CurriculumSettings,
    QuestionSampler,
    UniformSettings,
    best_k_of_n,
    learning_scores,
)
from rlreason.algorithms.optim import (
    DivergedError,
    adamw,
    cosine_lr,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.recorder import NullRecorder, Recorder
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import micro_batches
from rlreason.policy.lora import (
    adapters_off,
    load_trainable_tensors,
    merge_adapters,
    trainable_tensors,
    with_lora,
)
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample_prompts
from rlreason.policy.value import ValueSettings, new_value_function, score
from rlreason.rewards.base import RewardFunction
from rlreason.rewards.sparse import sparse_rewards, sparse_token_rewards
from rlreason.settings import Settings
from rlreason.tasks.problem import Problem

MAX_LOG_RATIO = (
    20.0  # exp of it is finite in float32; a token never gets there honestly
)


# --- Settings ------------------------------------------------------------------------


class GaeSettings(Settings):
    """Credit by a learned value function (Schulman et al. 2016)."""

    kind: Literal["gae"] = "gae"
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a token.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda: 1 is reward-to-go - V.")
    value: ValueSettings = Field(
        default_factory=ValueSettings, description="Where V comes from."
    )
    value_coef: float = Field(1.0, gt=0, description="Weight of the value loss.")
    value_clip: float | None = Field(
        0.2, gt=0, description="How far V may move in a phase at full gradient; None."
    )
    value_lr_scale: float = Field(
        1.0, gt=0, description="Learning rate of V as a multiple of the policy's."
    )
    value_warmup: int = Field(
        0, ge=0, description="First phases in which V learns and the policy does not."
    )
    bootstrap: bool = Field(
        False,
        description="What a cut response gets at its end: V of where it was cut, in "
        "place of all that its last token was paid. Safe with gamma < 1: undiscounted, "
        "V of a response that never ends can hold itself up.",
    )


class BaselineSettings(Settings):
    """Credit without a value function: every token gets its response's advantage.

    The return R of a response is the sum of its rewards, KL penalty included.

    - reinforce: R minus the mean of the batch;
    - rloo: R minus the mean of the question's other responses (Ahmadian et al. 2024);
    - grpo: what the task paid minus the question's mean, divided by its deviation
      (Shao et al. 2024); then the KL penalty, less its mean, is taken off undivided.
    """

    kind: Literal["reinforce", "rloo", "grpo"]


class KlSettings(Settings):
    """The penalty that keeps the policy near the reference."""

    coef: float = Field(0.05, ge=0, description="Beta: price of a nat of KL.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Of a token's KL, see kl_estimate."
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Nats a response: adapt beta to it; None: beta is fixed.",
    )
    horizon: int = Field(
        10_000, ge=1, description="Rollouts over which an adaptive beta moves."
    )
    reference: Literal["copy", "swap"] = Field(
        "copy",
        description="Of full fine-tuning: a second model, or its weights on the CPU, "
        "put into the one model to score all responses of a phase. LoRA needs neither.",
    )

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> KlSettings:
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient must start above 0: set kl.coef")
        return self


class LoraSettings(Settings):
    """Adapters, through peft."""

    rank: int = Field(128, ge=1, description="Of the update of each weight matrix.")
    alpha: float = Field(128.0, gt=0, description="The update counts alpha / rank.")
    targets: Literal["all-linear"] | tuple[str, ...] | None = Field(
        "all-linear", description="Which layers; None: peft's choice for the model."
    )


class PpoSettings(Settings):
    """How to run PPO. The defaults are the paper's."""

    phases: int = Field(250, ge=1, description="Phases of sampling and learning.")
    rollouts: int = Field(
        1024, ge=1, description="Responses a phase, of all questions."
    )
    n: int = Field(4, ge=1, description="Responses a question.")
    keep: int | None = Field(
        None, ge=1, description="Learn from the best so many of n only; None: all."
    )
    temperature: float = Field(
        0.7, gt=0, description="Of sampling and of scoring. The paper: 0.2 from a base."
    )
    max_new_tokens: int = Field(256, ge=1, description="Length limit of a response.")
    epochs: int = Field(4, ge=1, description="Passes over a phase's responses.")
    batch_size: int = Field(256, ge=1, description="Responses an update.")
    lr: float = Field(1e-6, ge=0, description="Peak learning rate.")
    lr_floor: float = Field(1e-6, ge=0, description="Learning rate at the end.")
    warmup: float = Field(0.0, ge=0, le=1, description="Share of phases of warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moments.")
    weight_decay: float = Field(1e-6, ge=0, description="AdamW's decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip each gradient's norm.")
    clip: float = Field(0.2, gt=0, description="Epsilon of the clipped surrogate.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    whiten: bool = Field(
        True, description="Whether a phase's advantages get mean 0 and variance 1."
    )
    stop_kl: float | None = Field(
        None,
        gt=0,
        description="Nats a token from the sampling policy that end a phase.",
    )
    max_kl: float | None = Field(
        1.0,
        gt=0,
        description="Nats a token from the reference that stop the run; None: nothing "
        "does, and without a penalty the reference is not asked at all.",
    )
    truncation_penalty: float = Field(
        0.0, ge=0, description="Taken from the last reward of a cut response."
    )
    credit: Annotated[GaeSettings | BaselineSettings, Field(discriminator="kind")] = (
        Field(default_factory=GaeSettings, description="How rewards become advantages.")
    )
    kl: KlSettings = Field(default_factory=KlSettings, description="The KL penalty.")
    lora: LoraSettings | None = Field(
        default_factory=LoraSettings, description="Adapters; None: all weights learn."
    )
    curriculum: CurriculumSettings = Field(
        default_factory=UniformSettings, description="Which questions are asked."
    )
    micro_tokens: int = Field(
        16384, ge=1, description="Tokens that go through the model at once."
    )
    logit_rows: int | None = Field(
        None, ge=1, description="Rows of logits held at once; None: all. Saves memory."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass."
    )
    seed: int = Field(0, ge=0, description="Of sampling, questions and mini-batches.")

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


# --- Data ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Experience:
    """What a phase learns from: B responses, padded on the right to T tokens.

    Attributes:
        rollouts: The B responses.
        response_mask: True at response tokens, (B, T), from lengths.
        logprobs: Of the sampling policy at the sampling temperature, (B, T).
        ref_logprobs: Of the reference at the same temperature, (B, T); ``logprobs``
            where it is not asked.
        values: V before each token, (B, T); 0 without a value function.
        last_values: V after the last token, (B,).
        rewards: What the task paid per token, (B, T).
        penalties: The price of the KL per token, (B, T), to be taken off.
        advantages: (B, T).
        returns: What V is to become, (B, T).

    All tensors are float32 on the policy's device and 0 outside the mask.
    """

    rollouts: tuple[Rollout, ...]
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    last_values: Tensor
    rewards: Tensor
    penalties: Tensor
    advantages: Tensor
    returns: Tensor


OnPhase = Callable[[int, Policy], dict[str, Any]]


# --- The algorithm -------------------------------------------------------------------


def ppo(
    start: Policy,
    problems: Sequence[Problem],
    settings: PpoSettings,
    *,
    reward: RewardFunction = sparse_token_rewards,
    shots: Sequence[Problem] = (),
    recorder: Recorder | None = None,
    on_phase: OnPhase | None = None,
) -> Policy:
    """Improve ``start`` on ``problems``; returns the policy of the last phase.

    Args:
        start: The policy that samples first, and the reference. Not changed.
        problems: Questions; what ``reward`` needs of them, it takes.
        settings: See the class.
        reward: What the task pays for each token. The KL penalty comes on top.
        shots: Solved examples before every question, for a start without SFT.
        recorder: Where metrics and checkpoints go.
        on_phase: Called with (phase, policy) after each phase; what it returns is
            logged with the phase's metrics. Must not change the policy.

    Logged at each phase (``kind="phase"``), all over response tokens or responses:

    - ``rollouts``: sampled so far; ``response_tokens``: of this phase, in all;
      ``response_length``: their mean number; ``truncated``: share cut by the limit.
    - ``reward``: mean over responses of what the task paid (no KL); ``accuracy``: share
      whose final answer is right, whatever was paid. A reward that rises while this
      does not is being exploited.
    - where the reference is asked, ``kl``: nats a response from it, k1, mean;
      ``kl_token``: k3 a token; ``kl_coef``: beta in this phase.
    - ``penalised_reward``: reward - KL penalty.
    - ``ratio_error``: largest abs(ratio - 1) between the sampler's probabilities and
      those of the scoring pass. Below 1e-4 in float32, or the two disagree; far above
      it there is a warning.
    - ``explained_variance``: 1 - Var(returns - values) / Var(returns); ``value``.
    - ``entropy``, ``policy_loss``, ``value_loss``, ``grad_norm``, ``clip_fraction``,
      ``stop_kl``: means over the phase's updates; the last is k3 a token from the
      sampling policy. ``updates``: made in this phase; ``lr``.

    Stages on the recorder's clock: ``sampling``, ``scoring``, ``learning``.

    Raises:
        DivergedError: A loss, gradient or log-probability is not finite, or the KL ran
            away; names the phase and the last good checkpoint.
    """
    recorder = recorder or NullRecorder()
    learner = _Learner(start, settings)
    questions = QuestionSampler(
        learner.policy, problems, settings.curriculum, seed=settings.seed, shots=shots
    )
    first = saved = _restore(recorder, learner, questions)
    for phase in range(first, settings.phases):
        prompts = questions.next(
            settings.rollouts // settings.n, progress=phase / settings.phases
        )
        with recorder.clock("sampling"):
            rollouts = sample_prompts(
                learner.policy,
                prompts,
                k=settings.n,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
            )
        paid = reward(rollouts, problems)
        with recorder.clock("scoring"):
            experience = learner.score(rollouts)
        experience = learner.credit(learner.pay(experience, paid))
        metrics = _phase_metrics(experience, paid, learner.kl_coef, settings)
        right = sparse_rewards(rollouts, problems)
        metrics["accuracy"] = sum(right) / len(right)
        _check(metrics, phase, settings, saved, recorder)
        _warn_of_mismatch(metrics["ratio_error"], learner.policy, phase)
        surprise = learning_scores(experience.advantages, experience.response_mask)
        questions.update([r.problem_id for r in rollouts], surprise.tolist())
        with recorder.clock("learning"):
            if settings.whiten:
                mask = experience.response_mask
                white = whiten(experience.advantages, mask)
                experience = replace(experience, advantages=white)
            metrics |= learner.learn(_kept(experience, paid, settings), phase)
        _check(metrics, phase, settings, saved, recorder)
        if settings.kl.target is not None:
            learner.adapt_kl(metrics["kl"])
        metrics["rollouts"] = (phase + 1) * settings.rollouts
        if on_phase is not None:
            metrics |= on_phase(phase + 1, learner.policy)
        recorder.log("phase", phase=phase + 1, **metrics)
        if recorder.due() and phase + 1 < settings.phases:
            _save(recorder, learner, questions, phase + 1)
            saved = phase + 1
    return learner.finished()


class _Learner:
    """Policy, value function, reference, optimiser and KL coefficient of a run."""

    def __init__(self, start: Policy, settings: PpoSettings) -> None:
        self.settings = settings
        self.policy = start.clone()
        if settings.lora is not None:
            self.policy = with_lora(
                self.policy, **settings.lora.model_dump(), seed=settings.seed
            )
        self.reference = _Reference(start, self.policy, settings)
        self.value_function, groups = None, []
        trainable = [p for p in self.policy.model.parameters() if p.requires_grad]
        groups.append({"params": trainable, "lr_scale": 1.0})
        if settings.gae is not None:
            self.value_function = new_value_function(self.policy, settings.gae.value)
            weights = [p for p in self.value_function.parameters() if p.requires_grad]
            scale = settings.gae.value_lr_scale
            groups.append({"params": weights, "lr_scale": scale})
        self.trained = [group["params"] for group in groups]
        self.optimizer = adamw(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.kl_coef = settings.kl.coef
        body = self.value_function and self.value_function.body
        for model in filter(None, (self.policy.model, body)):
            if settings.gradient_checkpointing:
                _checkpointing(model, "enable")({"use_reentrant": False})
            # Only in training mode are activations computed again. The mode changes
            # nothing else: dropout is off for good, what is scored is what is sampled
            model.train(settings.gradient_checkpointing)

    # Score

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> Experience:
        """One pass of policy and value function, one of the reference."""
        shape = len(rollouts), max(len(r.tokens) for r in rollouts)
        zeros = torch.zeros(shape, device=self.policy.device)  # (B, T)
        mask = zeros.bool()
        logprobs, values, ref_logprobs = zeros.clone(), zeros.clone(), zeros.clone()
        last_values = zeros[:, 0].clone()  # (B,)
        for rows, mb in self._micro_batches(rollouts, range(len(rollouts))):
            scores = self._score(mb, value=True)
            width = scores.response_mask.shape[1]
            mask[rows, :width] = scores.response_mask
            logprobs[rows, :width] = scores.logprobs
            if scores.values is not None:
                values[rows, :width] = scores.values
                last_values[rows] = scores.last_values
        if self.reference.needed:
            with self.reference.put_in() as reference:
                for rows, mb in self._micro_batches(rollouts, range(len(rollouts))):
                    scores = self._score(mb, value=False, policy=reference)
                    width = scores.response_mask.shape[1]
                    ref_logprobs[rows, :width] = scores.logprobs
        else:  # neither penalty nor limit: the policy is its own reference
            ref_logprobs = logprobs
        return Experience(
            tuple(rollouts),
            response_mask=mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            last_values=last_values,
            rewards=zeros,
            penalties=zeros,
            advantages=zeros,
            returns=zeros,
        )

    def _score(self, rollouts, *, value: bool, policy=None, entropy: bool = False):
        return score(
            policy or self.policy,
            [r.prompt_tokens for r in rollouts],
            [r.tokens for r in rollouts],
            temperature=self.settings.temperature,
            value_function=self.value_function if value else None,
            entropy=entropy,
            chunk=self.settings.logit_rows,
        )

    def _micro_batches(self, rollouts, rows) -> Iterator[tuple[Tensor, list[Rollout]]]:
        """Cut ``rows`` of ``rollouts`` by the budget of tokens."""

        def size(i: int) -> int:
            return len(rollouts[i].prompt_tokens) + len(rollouts[i].tokens)

        budget = self.settings.micro_tokens
        for mb in micro_batches(list(rows), max_tokens=budget, size=size):
            index = torch.tensor(mb, device=self.policy.device)
            yield index, [rollouts[i] for i in mb]

    # Pay

    def pay(
        self, experience: Experience, paid: Sequence[tuple[float, ...]]
    ) -> Experience:
        """Lay out as (B, T) what the task paid, and the price of the KL."""
        rewards = torch.zeros(experience.logprobs.shape)  # (B, T)
        for row, numbers in enumerate(paid):
            rewards[row, : len(numbers)] = torch.tensor(numbers)
            if not experience.rollouts[row].finished:
                # Paid as if it had ended *and* given V of going on, it would earn
                # twice, and the policy would learn never to stop
                if self.settings.gae is not None and self.settings.gae.bootstrap:
                    rewards[row, len(numbers) - 1] = 0.0
                rewards[row, len(numbers) - 1] -= self.settings.truncation_penalty
        kl = kl_estimate(
            experience.logprobs, experience.ref_logprobs, self.settings.kl.estimator
        )
        penalties = self.kl_coef * kl * experience.response_mask
        return replace(experience, rewards=rewards.to(kl.device), penalties=penalties)

    def adapt_kl(self, kl: float) -> None:
        """Move beta towards the KL that is wanted (Ziegler et al. 2019, eq. 2.2)."""
        wanted = self.settings.kl
        error = max(-0.2, min(0.2, kl / wanted.target - 1))
        self.kl_coef *= 1 + error * self.settings.rollouts / wanted.horizon

    # Credit

    def credit(self, experience: Experience) -> Experience:
        """Turn rewards into advantages, and into returns where there is a V."""
        rewards, mask = experience.rewards, experience.response_mask
        penalties = experience.penalties
        if (chosen := self.settings.gae) is not None:
            if chosen.bootstrap:
                cut = [not rollout.finished for rollout in experience.rollouts]
                rewards = bootstrapped(
                    rewards,
                    mask,
                    last_values=experience.last_values,
                    truncated=torch.tensor(cut, device=rewards.device),
                    gamma=chosen.gamma,
                )
            advantages, returns = gae(
                rewards - penalties,
                experience.values,
                mask,
                chosen.gamma,
                chosen.lam,
            )
        else:
            groups = _group_ids(experience.rollouts).to(rewards.device)
            baselined = response_advantages(
                rewards.sum(1),
                groups,
                self.settings.credit.kind,
                penalties=penalties.sum(1),
            )
            advantages, returns = baselined[:, None] * mask, experience.returns
        return replace(experience, advantages=advantages, returns=returns)

    # Learn

    def learn(self, experience: Experience, phase: int) -> dict[str, float]:
        """Epochs of mini-batches; returns the means of the updates' metrics."""
        settings, updates = self.settings, []
        set_lr(self.optimizer, lr := self._lr(phase))
        if settings.gae is not None and phase < settings.gae.value_warmup:
            self.optimizer.param_groups[0]["lr"] = 0.0
        for epoch in range(settings.epochs):
            for mb_rows in _mini_batches(
                len(experience.rollouts), settings, phase, epoch
            ):
                metrics = self._accumulate(experience, mb_rows)
                metrics["grad_norm"] = self._clip_gradients()
                finite = all(map(math.isfinite, metrics.values()))
                far = settings.stop_kl is not None and (
                    metrics["stop_kl"] > settings.stop_kl
                )
                if finite and not far:
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                updates.append(metrics)
                if far or not finite:
                    return _means(updates) | {"updates": len(updates) - 1, "lr": lr}
        return _means(updates) | {"updates": len(updates), "lr": lr}

    def _accumulate(
        self, experience: Experience, mb_rows: list[int]
    ) -> dict[str, float]:
        """Add the gradient of one mini-batch's loss, micro-batch by micro-batch."""
        settings = self.settings
        count = int(experience.response_mask[mb_rows].sum())  # of the whole mini-batch
        totals: dict[str, float] = {}
        for rows, rollouts in self._micro_batches(experience.rollouts, mb_rows):
            new = self._score(rollouts, value=True, entropy=True)
            mask = new.response_mask  # (b, t)
            cut = {
                name: getattr(experience, name)[rows, : mask.shape[1]]
                for name in ("logprobs", "values", "advantages", "returns")
            }
            loss, metrics = policy_loss(
                new.logprobs, cut["logprobs"], cut["advantages"], mask, settings.clip
            )
            metrics["entropy"] = (new.entropy * mask).sum()
            loss = loss - settings.entropy_coef * metrics["entropy"]
            if (chosen := settings.gae) is not None:
                metrics["value_loss"] = value_loss(
                    new.values, cut["values"], cut["returns"], mask, chosen.value_clip
                )
                loss = loss + chosen.value_coef * metrics["value_loss"]
            (loss / count).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / count
        return totals

    def _clip_gradients(self) -> float:
        """Clip policy and value function each for itself; the policy's norm before."""
        most = self.settings.max_grad_norm
        norms = [
            float(nn.utils.clip_grad_norm_(weights, most)) for weights in self.trained
        ]
        return norms[0] if math.isfinite(sum(norms)) else math.nan

    def _lr(self, phase: int) -> float:
        settings = self.settings
        return cosine_lr(
            phase,
            total=settings.phases,
            warmup=math.ceil(settings.warmup * settings.phases),
            peak=settings.lr,
            floor=min(settings.lr_floor, settings.lr),
        )

    def finished(self) -> Policy:
        """The policy alone, adapters merged into its weights.

        Where these are half precision they become float32 first: an update of a few
        thousandths of a weight would be lost in rounding.
        """
        if self.settings.gradient_checkpointing:
            _checkpointing(self.policy.model, "disable")()
        self.policy.model.eval()
        if self.settings.lora is not None:
            self.policy.model.float()
        return merge_adapters(self.policy)


def _checkpointing(model: nn.Module, what: str) -> Callable[..., None]:
    """A method of transformers that was ``gradient_checkpointing_*`` before 5.23."""
    old = getattr(model, f"gradient_checkpointing_{what}")
    return getattr(model, f"activation_checkpointing_{what}", old)


class _Reference:
    """The start, for scoring: adapters off, a frozen copy, or weights to swap in."""

    def __init__(self, start: Policy, policy: Policy, settings: PpoSettings) -> None:
        self.policy, self.copy, self.weights = policy, None, None
        self.needed = settings.measures_kl
        if not self.needed or settings.lora is not None:
            return
        if settings.kl.reference == "copy":
            self.copy = start.clone()
            self.copy.model.requires_grad_(False)
        else:
            state = start.model.state_dict()
            self.weights = {name: t.detach().cpu().clone() for name, t in state.items()}

    @contextmanager
    def put_in(self) -> Iterator[Policy]:
        """Lend a policy that scores as the reference; afterwards all is as before."""
        if self.copy is not None:
            yield self.copy
        elif self.weights is not None:
            with _swapped(self.policy.model, self.weights):
                yield self.policy
        else:
            with adapters_off(self.policy.model):
                yield self.policy


@contextmanager
def _swapped(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Put other weights into a model, and its own back afterwards, to the bit."""
    own = model.state_dict()
    kept = {name: tensor.cpu().clone() for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        yield
    finally:
        for name, tensor in own.items():
            tensor.copy_(kept[name])


# --- Equations -----------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    r"""Estimates of KL(pi || ref) at sampled tokens, in nats (Schulman 2020).

    With :math:`d = \log \pi - \log \pi_{ref}`: k1 is :math:`d`, unbiased, can be
    negative; k2 is :math:`d^2 / 2`, biased, low variance; k3 is
    :math:`e^{-d} - 1 + d`, unbiased, never negative.

    As a reward each may be used. As a *loss*, differentiating k1 or k3 gives the wrong
    gradient: that of KL(pi || ref) is the gradient of k2's expectation.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d) + d


def bootstrapped(
    rewards: Tensor,
    mask: Tensor,
    *,
    last_values: Tensor,
    truncated: Tensor,
    gamma: float,
) -> Tensor:
    """Add gamma V(s_T) to the last reward of each truncated response, once: (B, T).

    A response that chose EOS is over and worth nothing more; one that the length limit
    cut would have gone on.

    Args:
        rewards: (B, T).
        mask: True at response tokens, (B, T), contiguous from the left.
        last_values: V after the last token, (B,).
        truncated: (B,), bool.
    """
    last = (mask.sum(1) - 1).clamp(min=0)[:, None]  # (B, 1)
    extra = (gamma * last_values * truncated * mask.any(1))[:, None]
    return rewards.scatter_add(1, last, extra)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    .. math:: \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \quad
              A_t = \delta_t + \gamma \lambda A_{t+1}

    After the last token of a row V is 0: the row is over. For a truncated row add
    ``gamma * V`` to its last reward first (``bootstrapped``). Positions outside the
    mask are skipped as if they were not there, on whichever side or in the middle:
    what stands in them, NaN even, changes nothing.

    Args:
        rewards: (B, T).
        values: V before each token, (B, T).
        mask: True at tokens that are actions, (B, T).

    Returns:
        ``advantages`` and ``returns``, their sum with the values; (B, T), 0 outside
        the mask.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)  # (B, T)
    running = values.new_zeros(values.shape[:-1])  # (B,)
    next_value = running
    for t in reversed(range(values.shape[-1])):
        here = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[..., t], next_value)
        advantages[..., t] = torch.where(here, running, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def response_advantages(
    rewards: Tensor, groups: Tensor, kind: str, *, penalties: Tensor | None = None
) -> Tensor:
    """Advantage of whole responses against a baseline, (B,); see BaselineSettings.

    Args:
        rewards: What the task paid for each response, (B,).
        groups: A number for each response that says which question it answers, (B,),
            in any order. A group of one, or of equal returns, gets 0 under rloo/grpo.
        kind: "reinforce", "rloo" or "grpo".
        penalties: What each response's KL costs, (B,); None: nothing. GRPO divides the
            rewards alone by their deviation: where all rewards are equal, the tiny
            differences of the penalties would be blown up to advantages of size 1.
    """
    if penalties is None:
        penalties = torch.zeros_like(rewards)
    totals = rewards - penalties  # (B,)
    if kind == "reinforce":
        return totals - totals.mean()
    _, group = groups.unique(return_inverse=True)  # (B,)
    size = torch.bincount(group).to(totals)  # (G,)

    def means(values: Tensor) -> Tensor:
        """The mean over its question, for each response: (B,)."""
        return (torch.zeros_like(size).index_add_(0, group, values) / size)[group]

    others = (size / (size - 1).clamp(min=1))[group]  # n / (n - 1)
    if kind == "rloo":
        # R - mean of the others = (R - mean of all) * n / (n - 1)
        return (totals - means(totals)) * others
    centred = rewards - means(rewards)
    deviation = (means(centred.square()) * others).sqrt()
    return centred / (deviation + 1e-6) - (penalties - means(penalties))


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask; 0 outside it.

    A single value, or equal ones, become 0 and not NaN. Over the whole phase, never
    over a micro-batch, whose mean would depend on how the batch was cut.
    """
    mask = mask.bool()
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    centred = torch.where(mask, values - mean, 0.0)
    variance = centred.square().sum() / count
    scale = variance.clamp(min=1e-12).rsqrt()
    return centred * torch.where(variance > 1e-12, scale, torch.zeros_like(scale))


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped surrogate (Schulman et al. 2017, eq. 7), summed over tokens.

    .. math:: -\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t),
              \quad \rho_t = \exp(\log\pi_t - \log\pi^{old}_t)

    Args:
        new_logprobs: (B, T), differentiable.
        logprobs: Of the policy that sampled, (B, T).
        advantages: (B, T).
        response_mask: (B, T).
        clip: Epsilon.

    Returns:
        The sum, for the caller to divide by the mini-batch's number of tokens, and sums
        over tokens of ``policy_loss``, ``clip_fraction`` and ``stop_kl`` (k3).
    """
    mask = response_mask.bool()
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    losses = -torch.minimum(ratio * advantages, clipped * advantages) * mask
    with torch.no_grad():
        metrics = {
            "policy_loss": losses.sum(),
            "clip_fraction": (((ratio - 1).abs() > clip) & mask).float().sum(),
            "stop_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return losses.sum(), metrics


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip: float | None,
) -> Tensor:
    """Half the squared error, clipped around the values of the sampling time; a sum.

    ``0.5 * max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)``: the larger of
    the two, so that a step beyond the clip earns nothing. All (B, T).
    """
    mask = response_mask.bool()
    errors = (new_values - returns).square()
    if clip is not None:
        near = values + (new_values - values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * torch.where(mask, errors, 0.0).sum()


# --- Bookkeeping ---------------------------------------------------------------------


def _kept(experience: Experience, paid, settings: PpoSettings) -> Experience:
    """The responses that are learned from: all, or the best ``keep`` of each n.

    Credit was given and whitened before, over all of them: a mean over the best alone
    would say that they were nothing special.
    """
    if settings.keep is None:
        return experience
    totals = [sum(numbers) for numbers in paid]
    groups = [row // settings.n for row in range(len(paid))]
    rows = best_k_of_n(totals, groups, settings.keep)
    tensors = {
        field.name: getattr(experience, field.name)[rows]
        for field in fields(experience)
        if field.name != "rollouts"
    }
    return Experience(tuple(experience.rollouts[row] for row in rows), **tensors)


def _group_ids(rollouts: Sequence[Rollout]) -> Tensor:
    """A number for each prompt, (B,): by id and tokens, never by place in the batch."""
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    keys = [(r.problem_id, r.prompt_tokens) for r in rollouts]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _mini_batches(
    size: int, settings: PpoSettings, phase: int, epoch: int
) -> Iterator[list[int]]:
    """Rows of each update, in an order that (seed, phase, epoch) alone decides."""
    seed = (settings.seed * 1_000_003 + phase) * 101 + epoch
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    for begin in range(0, size, settings.batch_size):
        yield order[begin : begin + settings.batch_size]


def _phase_metrics(experience, paid, kl_coef, settings) -> dict[str, float]:
    """What is known of a phase before it is learned from."""
    rollouts, mask = experience.rollouts, experience.response_mask
    tokens = int(mask.sum())
    sampled = torch.zeros_like(experience.logprobs)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.tokens)] = torch.tensor(rollout.logprobs)
    error = torch.where(mask, (experience.logprobs - sampled).expm1().abs(), 0.0)
    total = sum(sum(numbers) for numbers in paid) / len(paid)
    metrics = {
        "reward": total,
        "penalised_reward": float((experience.rewards - experience.penalties).sum())
        / len(rollouts),
        "response_length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "response_tokens": tokens,
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "ratio_error": float(error.max()),
    }
    if settings.measures_kl:
        k1, k3 = (
            kl_estimate(experience.logprobs, experience.ref_logprobs, kind) * mask
            for kind in ("k1", "k3")
        )
        metrics["kl"] = float(k1.sum()) / len(rollouts)
        metrics["kl_token"] = float(k3.sum()) / tokens
        metrics["kl_coef"] = kl_coef
    if settings.gae is not None:
        metrics["explained_variance"] = explained_variance(
            experience.values[mask], experience.returns[mask]
        )
        metrics["value"] = float(experience.values[mask].mean())
    return metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), of (N,); 0 where returns are equal."""
    spread = returns.var(unbiased=False)
    if spread < 1e-12:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / spread)


def _means(updates: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}


def _check(metrics, phase: int, settings: PpoSettings, saved: int, recorder) -> None:
    """Stop at the first number that is none, or when the policy has run away."""
    last = (
        f"the last good checkpoint, after phase {saved}, is kept in {recorder!r}"
        if saved
        else "no checkpoint had been taken yet"
    )
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(
            f"phase {phase + 1}: {', '.join(broken)} is not a finite number; {last}. "
            f"Lower lr (now {settings.lr:g}), or load the policy in float32"
        )
    if settings.max_kl is not None and metrics["kl_token"] > settings.max_kl:
        raise DivergedError(
            f"phase {phase + 1}: the policy is {metrics['kl_token']:.2f} nats a token "
            f"from the reference, more than max_kl={settings.max_kl:g}; {last}. Raise "
            f"kl.coef (now {settings.kl.coef:g}), or lower lr (now {settings.lr:g})"
        )


def _warn_of_mismatch(ratio_error: float, policy: Policy, phase: int) -> None:
    """Warn where the sampler and the scoring pass are clearly not one distribution."""
    limit = 1e-3 if policy.model.dtype == torch.float32 else 0.2
    if ratio_error > limit:
        warnings.warn(
            f"phase {phase + 1}: sampler and scoring pass disagree by "
            f"{ratio_error:.1e} on the probability of a token, more than {limit:g}: "
            "what is trained is not what sampled",
            stacklevel=3,
        )


# --- Checkpoints ---------------------------------------------------------------------


def _save(recorder, learner: _Learner, questions: QuestionSampler, phase: int) -> None:
    """Keep all that decides the next phase."""
    tensors = {
        f"policy.{name}": t
        for name, t in trainable_tensors(learner.policy.model).items()
    }
    if learner.value_function is not None:
        state = learner.value_function.state_dict()
        tensors |= {f"value.{name}": t for name, t in state.items()}
    tensors |= optimizer_tensors(learner.optimizer, "adamw")
    state = {
        "phase": phase,
        "kl_coef": learner.kl_coef,
        "questions": questions.state(),
    }
    recorder.save(tensors, state)


def _restore(recorder, learner: _Learner, questions: QuestionSampler) -> int:
    """Undo ``_save``; returns the number of phases already done."""
    saved = recorder.restore()
    if saved is None:
        return 0

    def named(prefix: str) -> dict[str, Tensor]:
        return {
            name[len(prefix) :]: tensor
            for name, tensor in saved.tensors.items()
            if name.startswith(prefix)
        }

    load_trainable_tensors(learner.policy.model, named("policy."))
    if learner.value_function is not None:
        learner.value_function.load_state_dict(named("value."))
    load_optimizer_tensors(learner.optimizer, "adamw", saved.tensors)
    learner.kl_coef = saved.state["kl_coef"]
    questions.restore(saved.state["questions"])
    return saved.state["phase"]

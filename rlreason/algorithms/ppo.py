"""Proximal policy optimisation on tokens, with REINFORCE, RLOO and GRPO beside it.

Havrilla et al. (2024), section 3; Schulman et al. (2017). A phase has the steps that
its chapter has, and ``Learner`` a method for each:

1. *Ask*: draw questions, sample N responses to each at one temperature.
2. *Score*: one pass of the policy with its value function, one of the reference; where
   there is no value function, the sampler has scored already.
3. *Pay*: the task's reward per token, minus ``kl.coef`` times the KL per token.
4. *Credit*: generalised advantage estimation, or a baseline over responses.
5. *Learn*: whiten; several epochs of mini-batches on the clipped losses; then, where
   asked for, epochs in which the value function learns alone.

Every action is a token. All losses are sums over response tokens divided by the number
of response tokens of the mini-batch, however it is cut. What was sampled is what is
scored and trained: no text is tokenised again, and temperature is one number. Equations
are in ``credit`` and ``losses``, settings in ``ppo_settings``.

Left out against the paper: choosing the checkpoint on a validation set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlreason.algorithms.batching import Example, in_random_order, tokens_that_fit
from rlreason.algorithms.credit import (
    bootstrapped,
    explained_variance,  # noqa: F401  asked for here
    gae,
    group_ids,
    response_advantages,
    whiten,
)
from rlreason.algorithms.curriculum import QuestionSampler, best_k_of_n, learning_scores
from rlreason.algorithms.experience import (
    Experience,
    agree,
    check_phase,
    phase_metrics,
    sampled_logprobs,
    warn_of_mismatch,
)
from rlreason.algorithms.losses import kl_estimate, policy_loss, value_loss
from rlreason.algorithms.optim import (
    adamw,
    load_optimizer_tensors,
    optimizer_tensors,
    scheduled_lr,
    set_lr,
)
from rlreason.algorithms.ppo_settings import (  # noqa: F401  asked for here
    BaselineSettings,
    GaeSettings,
    KlSettings,
    LoraSettings,
    PpoSettings,
)
from rlreason.algorithms.recorder import Recorder
from rlreason.policy.compiling import compiled_layers
from rlreason.policy.layout import alike_batches
from rlreason.policy.load import Policy
from rlreason.policy.lora import (
    merge_adapters,
    trainable_weights,
    with_lora,
)
from rlreason.policy.memory import checkpointing, fewer_tokens_at_once
from rlreason.policy.packing import moved
from rlreason.policy.parallel import my_alike_share, sum_gradients, sum_tensors, summed
from rlreason.policy.progress import progress_bar
from rlreason.policy.reference import Reference, set_aside
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample_prompts
from rlreason.policy.value import Scores, new_value_function, score, score_values
from rlreason.policy.weights import load_tensors, trainable_tensors
from rlreason.rewards.base import RememberingReward, RewardFunction, goes_on
from rlreason.rewards.sparse import sparse_rewards, sparse_token_rewards
from rlreason.tasks.problem import Problem

TokenRewards = Sequence[tuple[float, ...]]  # B tuples, as a RewardFunction returns them


# --- A phase, step by step -----------------------------------------------------------


class Learner:
    """A policy that learns by phases: ask, score, pay, credit, learn. Args as ``ppo``.

    Attributes:
        policy: Learns in place; carries adapters until ``finished``.
        value_function: None where credit is a baseline.
        reference: None where nothing asks for the KL.
        trained: Weights of the policy, and of the value function where there is one.
        reward: What the task pays; what it remembers is kept with the rest.
        kl_coef: Beta of the next ``pay``.
        micro_tokens: The setting's, or fewer where memory ended.
    """

    def __init__(
        self,
        start: Policy,
        problems: Sequence[Problem],
        settings: PpoSettings,
        *,
        reward: RewardFunction = sparse_token_rewards,
        shots: Sequence[Problem] = (),
    ) -> None:
        self.settings, self.reward = settings, reward
        self.micro_tokens = settings.micro_tokens
        self.policy = merge_adapters(start.clone())
        self.reference = self.value_function = None
        if (chosen := settings.gae) is not None:
            self.value_function = new_value_function(self.policy, chosen.value)
        if settings.lora is not None:
            self.policy = with_lora(
                self.policy, **settings.lora.model_dump(), seed=settings.seed
            )
        self.questions = QuestionSampler(
            self.policy, problems, settings.curriculum, seed=settings.seed, shots=shots
        )
        if settings.measures_kl:
            self.reference = Reference(start, self.policy, settings.kl.reference)
        parts = {self.policy.model: 1.0}
        if chosen is not None:
            parts[self.value_function] = chosen.value_lr_scale
        groups = [
            {"params": trainable_weights(part), "lr_scale": x}
            for part, x in parts.items()
        ]
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
                checkpointing(model, "enable")({"use_reentrant": False})
            # Only in training mode are activations computed again. The mode changes
            # nothing else: dropout is off for good, what is scored is what is sampled
            model.train(settings.gradient_checkpointing)

    # 1. Ask

    def ask(self, phase: int) -> list[Rollout]:
        """Draw questions, and sample ``n`` responses to each."""
        settings = self.settings
        prompts = self.questions.next(
            settings.rollouts // settings.n, progress=phase / settings.phases
        )
        return sample_prompts(
            self.policy,
            prompts,
            k=settings.n,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )

    # 2. Score

    def score(self, rollouts: Sequence[Rollout]) -> Experience:
        """One pass of policy and value function, one of the reference.

        Without a value function the pass would tell what the sampler has told already.
        Then it ends where the first of its parts agrees with the sampler.
        """
        if self.micro_tokens is None:
            # Prompts may be shared, so that nearly all tokens are of responses
            examples = [Example(r.prompt_tokens[-1:], r.tokens) for r in rollouts]
            self.micro_tokens = tokens_that_fit(self.kept_by, examples)
        return self._score(rollouts)

    @fewer_tokens_at_once
    @torch.no_grad()
    def _score(self, rollouts: Sequence[Rollout]) -> Experience:
        device = self.policy.device
        lengths = torch.tensor([len(r.tokens) for r in rollouts], device=device)  # (B,)
        places = torch.arange(int(lengths.max()), device=device)  # (T,)
        zeros = torch.zeros((len(rollouts), len(places)), device=device)  # (B, T)
        logprobs, values = zeros.clone(), zeros.clone()
        last_values = zeros[:, 0].clone()  # (B,)
        sampled, dtype = sampled_logprobs(rollouts, zeros), self.policy.model.dtype
        for part, (rows, scores) in enumerate(self._scores(rollouts)):
            width = scores.logprobs.shape[1]
            logprobs[rows, :width] = scores.logprobs
            if scores.values is not None:
                values[rows, :width] = scores.values
                last_values[rows] = scores.last_values
            elif part == 0 and agree(scores, sampled[rows, :width], dtype):
                for left, *_ in islice(self.parts(rollouts), 1, None):
                    logprobs[left] = sampled[left]
                break
        ref_logprobs = logprobs  # where neither penalty nor limit asks for another's
        if self.reference is not None:
            ref_logprobs = zeros.clone()
            with self.reference.lent() as reference:
                for rows, scores in self._scores(rollouts, policy=reference):
                    width = scores.logprobs.shape[1]
                    ref_logprobs[rows, :width] = scores.logprobs
        sum_tensors(logprobs, ref_logprobs, values, last_values)  # 0 outside my share
        return Experience(
            tuple(rollouts),
            response_mask=places < lengths[:, None],
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            last_values=last_values,
            **dict.fromkeys(("rewards", "penalties", "advantages", "returns"), zeros),
        )

    # 3. Pay

    def pay(self, experience: Experience, token_rewards: TokenRewards) -> Experience:
        """Lay out as (B, T) what the task paid, and the price of the KL."""
        rewards, chosen = torch.zeros(experience.logprobs.shape), self.settings.gae
        for row, numbers in enumerate(token_rewards):
            rewards[row, : len(numbers)] = torch.tensor(numbers)
            cut = not experience.rollouts[row].finished
            if cut and chosen and chosen.bootstrap and not goes_on(self.reward):
                # Paid as if it had ended *and* given V of going on, it would earn
                # twice, and the policy would learn never to stop
                rewards[row, len(numbers) - 1] = 0.0
        kind = self.settings.kl.estimator
        kl = kl_estimate(experience.logprobs, experience.ref_logprobs, kind)
        return replace(
            experience,
            rewards=rewards.to(kl.device),
            penalties=self.kl_coef * kl * experience.response_mask,
            totals=tuple(sum(numbers) for numbers in token_rewards),
        )

    # 4. Credit

    def credit(self, experience: Experience) -> Experience:
        """Turn rewards into advantages, and into returns where there is a V."""
        rewards, mask = experience.rewards, experience.response_mask
        penalties = experience.penalties
        if (chosen := self.settings.gae) is None:
            baselined = response_advantages(
                rewards.sum(1),
                group_ids(experience.rollouts).to(rewards.device),
                self.settings.credit.kind,
                penalties=penalties.sum(1),
                k=self.settings.credit.k,
            )
            return replace(experience, advantages=baselined[:, None] * mask)
        if chosen.bootstrap:
            cut = [not rollout.finished for rollout in experience.rollouts]
            rewards = bootstrapped(
                rewards,
                mask,
                last_values=experience.last_values,
                truncated=torch.tensor(cut, device=rewards.device),
                gamma=chosen.gamma,
            )
        paid = (rewards - penalties, experience.values, mask, chosen.gamma)
        advantages, returns = gae(*paid, chosen.lam)
        if chosen.value_lam is not None:
            _, returns = gae(*paid, chosen.value_lam)
        return replace(experience, advantages=advantages, returns=returns)

    # 5. Learn

    def learn(self, experience: Experience, phase: int) -> dict[str, float]:
        """Epochs of mini-batches; returns the means of the updates' metrics."""
        settings, updates = self.settings, []
        advantages, mask = experience.advantages, experience.response_mask
        surprise = learning_scores(advantages, mask)  # before whitening hides its size
        asked = [rollout.problem_id for rollout in experience.rollouts]
        self.questions.update(asked, surprise.tolist())
        if settings.whiten:
            experience = replace(experience, advantages=whiten(advantages, mask))
        rows = self.kept(experience)
        lr = scheduled_lr(phase, settings.phases, settings)
        set_lr(self.optimizer, lr)
        made = 0
        for mb_rows in self._mini_batches(rows, phase, range(settings.epochs)):
            metrics = self.accumulate(experience, mb_rows)
            metrics["grad_norm"] = self._clip_gradients()
            far = metrics["stop_kl"] > (settings.stop_kl or math.inf)
            good = all(map(math.isfinite, metrics.values())) and not far
            if good:
                self.optimizer.step()
                made += 1
            self.optimizer.zero_grad(set_to_none=True)
            updates.append(metrics)
            if not good:
                break
        norm = self.learn_values(experience, phase)
        means = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
        means["grad_norm"] += 0.0 * norm  # not finite where that of V is not
        return means | {"updates": made, "lr": lr}

    def learn_values(self, experience: Experience, phase: int) -> float:
        """Epochs of V alone: without a gradient AdamW leaves the policy as it is.

        Returns the last norm of the gradient; one that is not finite ends them.
        """
        settings, chosen, norm = self.settings, self.settings.gae, 0.0
        if chosen is None or not chosen.value_epochs:
            return norm
        rows = list(range(len(experience.rollouts)))
        epochs = range(settings.epochs, settings.epochs + chosen.value_epochs)
        for mb_rows in self._mini_batches(rows, phase, epochs):
            self.accumulate_values(experience, mb_rows)
            norm = self._clip_gradients()
            if math.isfinite(norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(norm):
                break
        return norm

    @fewer_tokens_at_once
    def accumulate_values(self, experience: Experience, mb_rows: list[int]) -> None:
        """Add the gradient of half the mean squared error of V, which is not clipped"""
        rollouts = experience.rollouts
        count = sum(len(rollouts[row].tokens) for row in mb_rows)
        for rows, prompts, responses in self.parts(rollouts, mb_rows):
            with self._compiled(self.policy.model, self.value_function):
                values, mask = score_values(
                    self.policy, prompts, responses, self.value_function
                )  # (b, t), (b, t)
            returns = experience.returns[rows, : values.shape[1]]
            (value_loss(values, values, returns, mask, None) / count).backward()

    def kept(self, experience: Experience) -> list[int]:
        """The rows that are learned from: all, or the best ``keep`` of each n.

        Credit was given and whitened before, over all of them: a mean over the best
        alone would say that they were nothing special.
        """
        rows = range(len(experience.rollouts))
        if self.settings.keep is None:
            return list(rows)
        groups = [row // self.settings.n for row in rows]
        return best_k_of_n(experience.totals, groups, self.settings.keep)

    @fewer_tokens_at_once
    def accumulate(self, experience: Experience, mb_rows: list[int]) -> dict:
        """Add the gradient of one mini-batch's loss, micro-batch by micro-batch."""
        settings, rollouts = self.settings, experience.rollouts
        # Of the whole mini-batch; from lengths, so that no GPU is waited for
        count = sum(len(rollouts[row].tokens) for row in mb_rows)
        taught = self.taught(experience, mb_rows)
        parts: list[Tensor] = []
        for rows, new in self._scores(rollouts, taught, entropy=True):
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
            parts.append(torch.stack([value.detach() for value in metrics.values()]))
            names = [*metrics]
        if not parts:  # the share of a process may be empty
            return summed({})
        seen = sum(len(rollouts[row].tokens) for row in taught)
        own = (torch.stack(parts).double().sum(0) / seen).tolist()
        return summed(dict(zip(names, own, strict=True)))

    def taught(self, experience: Experience, mb_rows: list[int]) -> list[int]:
        """Those of a mini-batch that have a gradient; one at least.

        Where samples of a question are all paid alike, a baseline of the question gives
        them no advantage. If nothing else is learned from them, they can be left out.
        """
        settings = self.settings
        if settings.gae or settings.entropy_coef or settings.stop_kl is not None:
            return mb_rows
        told = experience.advantages.any(1).tolist()
        # AdamW goes on by its moments, so there has to be a gradient, if of zeros
        return [row for row in mb_rows if told[row]] or mb_rows[:1]

    def adapt_kl(self, kl: float) -> None:
        """Move beta towards the KL that is wanted (Ziegler et al. 2019, eq. 2.2)."""
        wanted = self.settings.kl
        if wanted.target is not None:
            error = max(-0.2, min(0.2, kl / wanted.target - 1))
            self.kl_coef *= 1 + error * self.settings.rollouts / wanted.horizon

    # Between the phases, and after the last

    def save(self, recorder: Recorder, phase: int) -> None:
        """Keep all that decides the next phase."""
        own = trainable_tensors(self.policy.model)
        tensors = {f"policy.{name}": tensor for name, tensor in own.items()}
        if self.value_function is not None:
            state = self.value_function.state_dict()
            tensors |= {f"value.{name}": t for name, t in state.items()}
        tensors |= optimizer_tensors(self.optimizer, "adamw")
        state = {"kl_coef": self.kl_coef, "questions": self.questions.state()}
        state["micro_tokens"] = self.micro_tokens  # which may have been measured
        if isinstance(self.reward, RememberingReward):
            state["reward"] = self.reward.state()
        recorder.save(tensors, {"phase": phase, **state})

    def restore(self, recorder: Recorder) -> int:
        """Undo ``save``; returns the number of phases already done."""
        saved = recorder.restore()
        if saved is None:
            return 0
        own = trainable_tensors(self.policy.model)
        load_tensors(own, saved.below("policy."), of=self.policy.model)
        if self.value_function is not None:
            self.value_function.load_state_dict(saved.below("value."))
        load_optimizer_tensors(self.optimizer, "adamw", saved.tensors)
        self.kl_coef = saved.state["kl_coef"]
        self.micro_tokens = self.micro_tokens or saved.state.get("micro_tokens")
        self.questions.restore(saved.state["questions"])
        if "reward" in saved.state:
            self.reward.restore(saved.state["reward"])
        return saved.state["phase"]

    def finished(self) -> Policy:
        """The policy alone, adapters merged into its weights.

        Where these are half precision they become float32 first: an update of a few
        thousandths of a weight would be lost in rounding.
        """
        if self.settings.gradient_checkpointing:
            checkpointing(self.policy.model, "disable")()
        self.policy.model.eval()
        if self.settings.lora is not None:
            self.policy.model.float()
        return merge_adapters(self.policy)

    # What the steps share

    def _scores(
        self, rollouts, rows=None, *, policy=None, entropy=False
    ) -> Iterator[tuple[Tensor, Scores]]:
        """Score ``rows`` of ``rollouts`` in parts that fit the budget of tokens."""
        value_function = None if policy else self.value_function
        policy = policy or self.policy
        for where, prompts, responses in self.parts(rollouts, rows):
            with self._compiled(policy.model, value_function):
                scores = score(
                    policy,
                    prompts,
                    responses,
                    temperature=self.settings.temperature,
                    value_function=value_function,
                    entropy=entropy,
                    chunk=self.settings.logit_rows,
                )
            yield where, scores

    def kept_by(self, examples: Sequence[Example]) -> Tensor:
        """A scalar whose gradient needs what that of a micro-batch's loss needs."""
        scores = score(
            self.policy,
            [example.prompt_tokens for example in examples],
            [example.tokens for example in examples],
            temperature=self.settings.temperature,
            value_function=self.value_function,
            entropy=True,
            chunk=self.settings.logit_rows,
        )
        parts = (scores.logprobs, scores.entropy, scores.values)
        return sum(part.sum() for part in parts if part is not None)

    def _compiled(self, *modules: nn.Module | None) -> AbstractContextManager:
        return compiled_layers(*modules, compiled=self.settings.compile)

    def parts(self, rollouts, rows=None) -> Iterator[tuple[Tensor, tuple, tuple]]:
        """Places, prompts, responses: what goes through the model at once, my share."""
        rows = range(len(rollouts)) if rows is None else rows
        text = [(r.prompt_tokens, r.tokens) for r in rollouts].__getitem__
        share = my_alike_share(rows, text)
        for mb in alike_batches(share, max_tokens=self.micro_tokens, text=text):
            prompts, responses = zip(*map(text, mb), strict=True)
            yield moved(np.array(mb), self.policy.device), prompts, responses

    def _mini_batches(
        self, rows: list[int], phase: int, epochs: range
    ) -> Iterator[list[int]]:
        """Rows of each update, in an order that (seed, phase, epoch) alone decides."""
        for epoch in epochs:
            seed = (self.settings.seed * 1_000_003 + phase) * 101 + epoch
            yield from in_random_order(rows, self.settings.batch_size, seed)

    def _clip_gradients(self) -> float:
        """Sum over processes; clip policy and V each for itself; the policy's norm."""
        sum_gradients(weight for weights in self.trained for weight in weights)
        clip, most = nn.utils.clip_grad_norm_, self.settings.max_grad_norm
        norms = [float(clip(weights, most)) for weights in self.trained]
        return norms[0] if math.isfinite(sum(norms)) else math.nan


# --- The loop ------------------------------------------------------------------------


def ppo(
    start: Policy,
    problems: Sequence[Problem],
    settings: PpoSettings,
    *,
    reward: RewardFunction = sparse_token_rewards,
    shots: Sequence[Problem] = (),
    recorder: Recorder | None = None,
    on_phase: Callable[[int, Policy], dict[str, Any]] | None = None,
) -> Policy:
    """Improve ``start`` on ``problems``; returns the policy of the last phase.

    Args:
        start: The policy that samples first, and the reference. Not changed.
        problems: Questions; what ``reward`` needs of them, it takes.
        settings: See the class.
        reward: What the task pays for each token. The KL penalty comes on top. What a
            ``RememberingReward`` remembers is part of the run.
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
      those of the scoring pass, where there was one. Below 1e-4 in float32, or the two
      disagree; far above it there is a warning.
    - ``explained_variance``: 1 - Var(returns - values) / Var(returns); ``value``.
    - ``entropy``, ``policy_loss``, ``value_loss``, ``grad_norm``, ``clip_fraction``,
      ``stop_kl``: means over the phase's updates, of tokens that have a gradient; the
      last is k3 a token from the sampling policy. ``updates``: made in this phase;
      ``lr``.

    Stages on the recorder's clock: ``sampling``, ``scoring``, ``learning``.

    Raises:
        DivergedError: A loss, gradient or log-probability is not finite, or the KL ran
            away; names the phase and the last good checkpoint.
    """
    recorder = recorder or Recorder()
    learner = Learner(start, problems, settings, reward=reward, shots=shots)
    first = saved = learner.restore(recorder)
    bar = progress_bar(settings.phases, "PPO", unit="phase", done=first)
    with bar as progress, set_aside(start):
        for phase in range(first, settings.phases):
            with recorder.clock("sampling"):
                rollouts = learner.ask(phase)
            token_rewards = reward(rollouts, problems)
            with recorder.clock("scoring"):
                experience = learner.score(rollouts)
            experience = learner.credit(learner.pay(experience, token_rewards))
            metrics = phase_metrics(
                experience,
                kl_coef=learner.kl_coef if learner.reference else None,
                valued=learner.value_function is not None,
            )
            right = sparse_rewards(rollouts, problems)
            metrics["accuracy"] = sum(right) / len(right)
            check_phase(metrics, phase, settings, saved, recorder)
            warn_of_mismatch(experience, learner.policy, phase)
            with recorder.clock("learning"):
                metrics |= learner.learn(experience, phase)
            check_phase(metrics, phase, settings, saved, recorder)
            if settings.measures_kl:
                learner.adapt_kl(metrics["kl"])
            metrics["rollouts"] = (phase + 1) * settings.rollouts
            if on_phase is not None:
                metrics |= on_phase(phase + 1, learner.policy)
            recorder.log("phase", phase=phase + 1, **metrics)
            progress.update(accuracy=metrics["accuracy"])
            if recorder.due() and phase + 1 < settings.phases:
                saved = phase + 1
                learner.save(recorder, saved)
    return learner.finished()

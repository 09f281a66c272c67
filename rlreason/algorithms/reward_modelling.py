"""Train the outcome reward model: sample, label, balance, classify every prefix.

Havrilla et al. (2024), section 3, after Cobbe et al. (2021). In the order of its
chapter:

1. *Sample*: K responses to every training question from a policy.
2. *Label*: right or wrong by the final answer, as the sparse reward does. A truncated
   sample that states the right answer is right; one without an answer is wrong. Both
   are kept: the model will have to score such samples.
3. *De-duplicate*: the same tokens for the same question count once.
4. *Split* by question: no question is on both sides.
5. *Balance* each part over all its questions: as many right as wrong samples, those of
   the larger class drawn at random.
6. *Train*: binary cross-entropy at every token of the response,

       L = - (1 / N) sum over samples, sum over t of
             y log p(q, a_<=t) + (1 - y) log (1 - p(q, a_<=t))

   with y the label of the whole sample and N the response tokens of the batch.

Scores are thus probabilities where right and wrong are equally frequent, the held-out
part included; a policy that is right more often is right more often than its score.
Part of what they tell is how hard the question is. Balance within each question would
leave only what tells responses apart, but drops every question that is always or never
solved.

The paper gives no sizes for this model. Its one model for all reranking numbers was
trained on samples of the policy of expert iteration; which policy samples is up to the
caller here. Left out: several epochs of sampling, and labels for single steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, fit, new_adamw
from rlreason.algorithms.optim import check_finite
from rlreason.algorithms.recorder import (
    Checkpoint,
    NestedRecorder,
    Recorder,
    pack_lists,
    unpack_lists,
)
from rlreason.policy.load import Policy
from rlreason.policy.packing import moved
from rlreason.policy.reference import set_aside
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_tokens
from rlreason.rewards.sparse import sparse_rewards
from rlreason.settings import ours, paper, precursor
from rlreason.tasks.problem import Problem


class OrmSettings(FinetuneSettings):
    """How to train the reward model. What is known of the paper's says K alone."""

    k: int = paper(96, "Samples a question.", ge=2)
    temperature: float = ours(1.0, "Sampling temperature.", gt=0)
    max_new_tokens: int = precursor(256, "Length limit of a response.", ge=1)
    held_out: float = ours(
        0.1, "Share of questions that are not trained on.", gt=0, lt=1
    )
    epochs: int = ours(1, "Passes over the samples.", ge=1)
    likelihood: bool = ours(
        False,
        "Whether the logit also holds how likely the model finds what it reads, which "
        "is not in the paper; see rewards.orm.",
        neutral=False,
    )
    head_lr_scale: float = ours(
        10.0, "Learning rate of the head, as a multiple of lr.", gt=0
    )

    @model_validator(mode="after")
    def _learns_whole(self) -> OrmSettings:
        if self.lora is not None:
            raise ValueError("a reward model learns all weights: leave lora at null")
        return self


@dataclass(frozen=True, slots=True)
class LabelledExample(Example):
    """A sampled response, and whether its final answer is right."""

    problem_id: str
    right: bool


@dataclass(frozen=True, slots=True)
class OrmData:
    """Balanced samples without repeats; no question is in both parts."""

    train: list[LabelledExample]
    held_out: list[LabelledExample]


# Of held-out samples: scores at the last token, labels, question ids
Evaluator = Callable[[list[float], list[bool], list[str]], dict[str, Any]]


def train_orm(
    policy: Policy,
    problems: Sequence[Problem],
    settings: OrmSettings,
    recorder: Recorder | None = None,
    *,
    evaluator: Evaluator | None = None,
) -> OutcomeRewardModel:
    """Train a reward model on samples of ``policy``, starting from its weights.

    Args:
        policy: Who samples, and whose weights the model starts from. Not changed.
        problems: Questions with their final answers.
        settings: See the class.
        recorder: Where metrics and checkpoints go.
        evaluator: Called with what was held out after each epoch; what it returns is
            logged, e.g. ``evaluation.classifier.classification_metrics``.

    Logged once (``kind="sample"``): ``rollouts``, ``accuracy``, ``truncated`` (shares
    of them), ``distinct`` (without repeats), ``train``, ``held_out`` (balanced
    samples), ``train_questions``, ``held_out_questions``. At each update
    (``kind="update"``): ``update``, ``epoch``, ``loss`` (nats a response token),
    ``grad_norm``, ``lr``, ``response_tokens``. After each epoch (``kind="held_out"``):
    ``epoch``, ``loss`` (nats a response token), ``accuracy`` (share on the right side
    of one half at the last token), and what ``evaluator`` returns.

    Stages on the recorder's clock: ``sampling``, ``learning``, ``scoring`` (held out).

    Raises:
        ValueError: What is to be trained on, or held out, is all right or all wrong.
        DivergedError: A loss, a gradient, the weights or a score are not finite.
    """
    recorder = recorder or Recorder()
    saved = recorder.restore()
    if saved is None:
        # Other streams than those of expert iteration (seed * 1000 + round), which may
        # sample the same policy and have its samples scored by this model.
        with recorder.clock("sampling"):
            rollouts = sample(
                policy,
                problems,
                k=settings.k,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed * 1000 + 500,
                keeper=recorder.keep_groups,
            )
        labelled = label_rollouts(rollouts, problems)
        data = build_dataset(labelled, settings)
        recorder.log("sample", **_sample_metrics(rollouts, labelled, data))
    else:
        data = _unpack(saved)
    orm = OutcomeRewardModel(policy, likelihood=settings.likelihood)
    optimizer = orm_optimizer(orm, settings)
    inner = NestedRecorder(recorder, saved=saved, **_packed(data))
    if saved is None:
        inner.save({}, {"updates": 0})  # so that nothing is sampled twice

    def log_held_out(epoch: int) -> None:
        with recorder.clock("scoring"):
            metrics = _held_out_metrics(orm, data.held_out, evaluator)
        recorder.log("held_out", epoch=epoch, **metrics)

    with set_aside(policy):
        fit(
            orm.network,
            optimizer,
            data.train,
            settings,
            inner,
            loss=partial(classification_loss, orm),
            after_epoch=log_held_out,
        )
    return orm


def orm_optimizer(orm: OutcomeRewardModel, settings: OrmSettings) -> torch.optim.AdamW:
    """AdamW over all weights, those of the head at a rate of their own."""
    head = orm.head()
    new = {id(p) for p in head}
    rest = [p for p in orm.network.parameters() if id(p) not in new]
    groups = [{"params": rest}, {"params": head, "lr_scale": settings.head_lr_scale}]
    return new_adamw(groups, settings)


# --- Data --------------------------------------------------------------------------


def label_rollouts(
    rollouts: Sequence[Rollout], problems: Sequence[Problem]
) -> list[LabelledExample]:
    """Each rollout with the label of its final answer, in the rollouts' order."""
    return [
        LabelledExample(r.prompt_tokens, r.tokens, r.problem_id, reward == 1.0)
        for r, reward in zip(rollouts, sparse_rewards(rollouts, problems), strict=True)
    ]


def build_dataset(
    examples: Sequence[LabelledExample], settings: OrmSettings
) -> OrmData:
    """De-duplicate, split by question, balance each part.

    The seed decides which questions are held out, and which samples of the larger class
    are kept. Both parts are made alike.

    Raises:
        ValueError: A part has no right sample, or no wrong one.
    """
    by_question: dict[str, list[LabelledExample]] = defaultdict(list)
    for example in deduplicate(examples):
        by_question[example.problem_id].append(example)
    groups = [*by_question.values()]
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(groups), generator=generator).tolist()
    out = max(1, round(settings.held_out * len(order)))
    held_out, train = (
        balance_classes([example for i in part for example in groups[i]], generator)
        for part in (order[:out], order[out:])
    )
    for part, name in ((held_out, "to hold out"), (train, "to train on")):
        if not part:
            raise ValueError(
                f"the questions {name} have no right sample, or no wrong one "
                f"({len(groups)} questions in all); give more questions, raise k, or "
                "sample a policy that is sometimes right"
            )
    return OrmData(train, held_out)


def deduplicate(examples: Sequence[LabelledExample]) -> list[LabelledExample]:
    """The first of those with the same question and tokens, in their order."""
    first: dict[tuple[str, tuple[int, ...]], LabelledExample] = {}
    for example in examples:
        first.setdefault((example.problem_id, example.tokens), example)
    return list(first.values())


def balance_classes(
    examples: Sequence[LabelledExample], generator: torch.Generator
) -> list[LabelledExample]:
    """All of the rarer class and as many of the other, first the right ones."""
    classes = [[e for e in examples if e.right is label] for label in (True, False)]
    size = min(len(members) for members in classes)
    return [
        members[i]
        for members in classes
        for i in torch.randperm(len(members), generator=generator)[:size].tolist()
    ]


# --- Loss --------------------------------------------------------------------------


def classification_loss(
    orm: OutcomeRewardModel, batch: Sequence[LabelledExample]
) -> Tensor:
    """Binary cross-entropy (nats), summed over all response tokens: a scalar.

    Every prefix of a sample carries the label of the whole; the prompt has no loss.
    """
    logits, padded = orm.logits(batch)  # (N,)
    labels = moved(np.array([e.right for e in batch], np.float32), logits.device)
    return binary_cross_entropy_with_logits(
        logits, labels[padded.rows], reduction="sum"
    )


# --- Metrics -----------------------------------------------------------------------


def _sample_metrics(rollouts, labelled, data: OrmData) -> dict[str, Any]:
    return {
        "rollouts": len(labelled),
        "accuracy": sum(e.right for e in labelled) / len(labelled),
        "truncated": sum(not r.finished for r in rollouts) / len(labelled),
        "distinct": len(deduplicate(labelled)),
        "train": len(data.train),
        "held_out": len(data.held_out),
        "train_questions": len({e.problem_id for e in data.train}),
        "held_out_questions": len({e.problem_id for e in data.held_out}),
    }


def _held_out_metrics(orm, examples, evaluator: Evaluator | None) -> dict[str, Any]:
    scores = score_tokens(orm, examples)
    last = [s[-1] for s in scores]
    check_finite(
        {"a score": sum(map(sum, scores))},
        where="held-out samples",
        then="lower lr, or load the policy in float32",
    )
    labels = [example.right for example in examples]
    # A probability of 0 or 1 that is wrong costs what float32 can tell from it
    tiny = 1e-7
    losses = [
        -math.log(max(tiny, p if right else 1 - p))
        for s, right in zip(scores, labels, strict=True)
        for p in s
    ]
    agree = [(p > 0.5) is right for p, right in zip(last, labels, strict=True)]
    metrics = {
        "loss": sum(losses) / len(losses),
        "accuracy": sum(agree) / len(agree),
    }
    if evaluator is not None:
        metrics |= evaluator(last, labels, [example.problem_id for example in examples])
    return metrics


# --- Checkpoints -------------------------------------------------------------------


def _packed(data: OrmData) -> dict[str, Any]:
    """The samples, as every checkpoint holds them."""
    examples = [*data.train, *data.held_out]
    prompts = {e.problem_id: e.prompt_tokens for e in examples}
    index = {problem_id: i for i, problem_id in enumerate(prompts)}
    tensors = {
        "data.question": torch.tensor([index[e.problem_id] for e in examples]),
        "data.right": torch.tensor([e.right for e in examples]),
        **pack_lists("data.tokens", [e.tokens for e in examples]),
        **pack_lists("data.prompts", prompts.values()),
    }
    state = {"questions": list(prompts), "train": len(data.train)}
    return {"tensors": tensors, "state": state}


def _unpack(saved: Checkpoint) -> OrmData:
    prompts = unpack_lists("data.prompts", saved.tensors)
    columns = zip(
        saved.tensors["data.question"].tolist(),
        saved.tensors["data.right"].tolist(),
        unpack_lists("data.tokens", saved.tensors),
        strict=True,
    )
    examples = [
        LabelledExample(prompts[i], tokens, saved.state["questions"][i], right)
        for i, right, tokens in columns
    ]
    count = saved.state["train"]
    return OrmData(examples[:count], examples[count:])

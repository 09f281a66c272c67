"""Expert iteration: sample, keep what is right, fine-tune the base on it, again.

Havrilla et al. (2024), section 3; the same family as STaR and ReST. A round has the
steps that its chapter has:

1. *Sample*: K responses to every question at T = 1 from the current policy.
2. *Filter*: keep those whose final answer is right (return of the trajectory >= 1);
   ORM-EI keeps of these the ones that a reward model scores high enough.
3. *De-duplicate*: two solutions with the same sequence of operations are one.
4. *Grow*: D_i = R_i united with D_{i-1}.
5. *Distil*: fine-tune on D_i, starting from the **pretrained base** each round.

Beyond the paper, two settings explore: ``allocation`` asks more often what is seldom
solved, with as many rollouts in all (compare Dart-Math, Tong et al. 2024), and
``rarity`` lets solutions of such questions weigh more in the loss. Both go by the solve
rate of each question over all rounds so far (``Tally``).

It counts rollouts, the unit of the paper's sample complexity.

The paper's rule for ORM-EI is not known in full. Our reading: the final answer decides
what is right, as before, and the model throws out what is right by luck: solutions that
it scores below ``orm_threshold``. It is given, and does not learn along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import (
    FinetuneSettings,
    finetune,
)
from rlreason.algorithms.optim import DivergedError
from rlreason.algorithms.recorder import (
    Checkpoint,
    NestedRecorder,
    Recorder,
    pack_lists,
    unpack_lists,
)
from rlreason.policy.load import Policy
from rlreason.policy.reference import set_aside
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.policy.weights import load_tensors
from rlreason.rewards.sparse import sparse_rewards
from rlreason.settings import Settings, ours, paper, precursor
from rlreason.tasks.answers import operation_key
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import NEXT_QUESTION, format_prompt, format_response


class ExpertIterationSettings(Settings):
    """How to run expert iteration. The defaults are the paper's."""

    k: int = paper(96, "Samples a question and round.", ge=1)
    temperature: float = paper(1.0, "Sampling temperature.", gt=0)
    rounds: int = paper(2, "Rounds of sampling and distilling.", ge=1)
    start_from: Literal["base", "current"] = paper(
        "base", "What a round fine-tunes: the base, or the last policy."
    )
    deduplicate: Literal["operations", "text", "none"] = paper(
        "operations", "Which two solutions of a question count as one."
    )
    max_per_question: int | None = ours(
        None, "Solutions kept a question in all; None: all.", neutral=None, ge=1
    )
    reference_solutions: bool = paper(
        True, "Whether D_0 holds the solutions that SFT learned from."
    )
    first_round_shots: int = paper(
        0, "Solved examples in the prompt of round 1.", neutral=0, ge=0
    )
    first_round_k: int | None = paper(
        None,
        "Samples a question in round 1 (the paper's figures: 16 from the base); None: "
        "k.",
        neutral=None,
        ge=1,
    )
    orm_threshold: float | None = ours(
        None, "ORM-EI: least score to be kept; None: no ORM.", neutral=None, ge=0, le=1
    )
    allocation: Literal["uniform", "rare"] = paper(
        "uniform",
        "Who gets the k samples a question: each as many; or, once solve rates are "
        "known, each at least one and the rest by how seldom it is solved.",
        neutral="uniform",
    )
    rarity: float = ours(
        0.0,
        "A solution weighs its question's solve rate to minus this power.",
        neutral=0.0,
        ge=0,
    )
    max_new_tokens: int = precursor(256, "Length limit of a response.", ge=1)
    seed: int = ours(0, "Seed of sampling and of the order of data.", ge=0)
    finetune: FinetuneSettings = paper(FinetuneSettings, "The update of each round.")


@dataclass(frozen=True, slots=True)
class Solution:
    """One entry of the data set D: a response kept for a question.

    Attributes:
        problem: Index into the list of questions.
        key: What makes it the same as another one.
        tokens: The response as it was sampled, EOS included.
    """

    problem: int
    key: tuple[str, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tally:
    """How often each question was asked and solved so far, by its index."""

    asked: tuple[int, ...]
    right: tuple[int, ...]

    def after(self, problems, rollouts, rewards) -> Tally:
        """The tally with a round's rollouts."""
        asked = Counter(rollout.problem_id for rollout in rollouts)
        right: Counter[str] = Counter()
        for rollout, reward in zip(rollouts, rewards, strict=True):
            right[rollout.problem_id] += reward >= 1.0
        old = zip(problems, self.asked, self.right, strict=True)
        rows = [(a + asked[p.id], r + right[p.id]) for p, a, r in old]
        return Tally(*map(tuple, zip(*rows, strict=True)))

    def rates(self) -> list[float]:
        """Solve rates, by Laplace's rule: 1/2 where nothing is known, never 0 or 1."""
        pairs = zip(self.asked, self.right, strict=True)
        return [(right + 1) / (asked + 2) for asked, right in pairs]


def allocate(rates: Sequence[float], total: int) -> list[int]:
    """Samples for each of Q questions: one, and a share of the rest as 1 / rate.

    1 / rate is how many samples a right one takes. They sum to ``total``, at least Q;
    what is left by rounding down goes to the largest remainders, of equal ones to the
    first.

    >>> allocate([0.8, 0.2, 0.8], 9)
    [2, 5, 2]
    """
    rest, whole = total - len(rates), sum(1 / rate for rate in rates)
    shares = [rest / rate / whole for rate in rates]
    counts = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(rates)), key=lambda i: int(shares[i]) - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def rarity_weights(rates: Sequence[float], power: float) -> list[float]:
    """rate ** -power of each solution's question, scaled to a mean of 1."""
    raw = [rate**-power for rate in rates]
    return [weight * len(raw) / sum(raw) for weight in raw]


OnRound = Callable[[int, Policy], dict[str, Any]]
# How likely each solution is right, as a reward model says
SolutionScorer = Callable[[Sequence[Rollout]], list[float]]


def expert_iteration(
    start: Policy,
    base: Policy,
    problems: Sequence[Problem],
    settings: ExpertIterationSettings,
    *,
    solved: Sequence[Problem] = (),
    shots: Sequence[Problem] = (),
    orm: SolutionScorer | None = None,
    recorder: Recorder | None = None,
    on_round: OnRound | None = None,
) -> Policy:
    """Improve ``start`` on ``problems``; returns the policy of the last round.

    Args:
        start: The policy that samples in round 1: the SFT checkpoint, or the base with
            ``first_round_shots`` solved examples in its prompt. Not changed.
        base: The pretrained model from which every round restarts. Not changed.
        problems: Questions with their final answers.
        settings: See the class.
        solved: The subset of problems whose reference solutions make D_0.
        shots: Solved examples for the prompt of round 1.
        orm: ORM-EI: scores rollouts between 0 and 1, e.g. ``partial(score_responses,
            model)`` with ``rewards.orm``; needs ``orm_threshold``.
        recorder: Where metrics and checkpoints go.
        on_round: Called with (round, policy) after each round; what it returns is
            logged with the round's metrics.

    Logged at each round (``kind="round"``): ``rollouts`` (sampled so far),
    ``accuracy`` (share of this round's rollouts that are right), ``solved_questions``
    (share with at least one right rollout), ``truncated`` (share cut by the length
    limit), ``response_length`` (mean, tokens), ``new_solutions``, ``solutions`` (size
    of D), ``solutions_per_question``; with an ``orm``, ``orm_kept`` (share of the right
    and finished rollouts that it lets pass). At each update: see ``finetune``.

    Raises:
        ValueError: no right solution was found and D is empty; shots are missing; a
            solved problem is not among the problems; or only one of ``orm`` and
            ``orm_threshold`` is given.
    """
    recorder = recorder or Recorder()
    if settings.first_round_shots > len(shots):
        raise ValueError(
            f"first_round_shots={settings.first_round_shots}, but there are "
            f"{len(shots)} shots"
        )
    if (orm is None) != (settings.orm_threshold is None):
        raise ValueError(
            f"orm_threshold={settings.orm_threshold} and "
            f"{'no orm' if orm is None else 'an orm'}: ORM-EI needs both, and plain "
            "expert iteration neither"
        )
    policy, first_round = start, 0
    dataset = _initial_data(base, problems, solved, settings)
    tally = Tally((0,) * len(problems), (0,) * len(problems))
    saved = recorder.restore()
    if saved is not None:
        first_round, dataset = saved.state["round"], _unpack(saved)
        tally = Tally(*map(tuple, saved.state["tally"]))
        policy = _with_weights(start, saved) if first_round else start
    for round_ in range(first_round, settings.rounds):
        # Only the first round can go on in the middle of its fine-tuning
        resumed = saved if saved is not None and saved.state["updates"] else None
        saved = None
        if resumed is None:
            dataset, tally, metrics = _explore(
                policy,
                problems,
                dataset,
                settings,
                tally=tally,
                round_=round_,
                shots=() if round_ else shots[: settings.first_round_shots],
                orm=orm,
                recorder=recorder,
            )
        else:
            metrics = resumed.state["metrics"]
        student = (base if settings.start_from == "base" else policy).clone()
        seed = settings.finetune.seed + settings.seed * 1000 + round_
        with set_aside(start, base, policy):
            inner = NestedRecorder(
                recorder,
                saved=resumed,
                **_packed(round_, policy, dataset, tally, metrics),
                round=round_ + 1,
            )
            policy = _distil(
                student,
                _examples(base, problems, dataset, tally, settings),
                settings.finetune.model_copy(update={"seed": seed}),
                inner,
            )
        if on_round is not None:
            metrics |= on_round(round_ + 1, policy)
        recorder.log("round", round=round_ + 1, **metrics)
        packed = _packed(round_ + 1, policy, dataset, tally, {})
        recorder.save(packed["tensors"], packed["state"] | {"updates": 0})
    return policy


def _explore(
    policy, problems, dataset, settings, *, tally, round_, shots, orm, recorder
) -> tuple[list[Solution], Tally, dict[str, Any]]:
    """Sample, filter, de-duplicate, grow: D_i, the tally, the round's metrics so far"""
    k = settings.k if round_ else settings.first_round_k or settings.k
    counts = [k] * len(problems)
    if settings.allocation == "rare":
        counts = allocate(tally.rates(), k * len(problems))
    with recorder.clock("sampling"):
        rollouts = sample(
            policy,
            problems,
            k=counts,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed * 1000 + round_,
            shots=shots,
            keeper=recorder.keep_groups,
        )
    rewards = passed = sparse_rewards(rollouts, problems)
    if orm is not None:
        with recorder.clock("scoring"):
            passed = orm_filter(rollouts, rewards, orm, settings.orm_threshold)
    grown = grow(dataset, rollouts, passed, problems, settings)
    metrics = _round_metrics(rollouts, rewards, grown, len(dataset), len(problems))
    if orm is not None:
        metrics["orm_kept"] = _share_kept(rollouts, rewards, passed)
    tally = tally.after(problems, rollouts, rewards)
    metrics["rollouts"] = sum(tally.asked)
    if not grown:
        right = len(_candidates(rollouts, rewards))
        found = (
            f"{right} right solutions, of which none reaches orm_threshold="
            f"{settings.orm_threshold:g}, among"
            if right
            else "no right solution among"
        )
        remedy = "lower it" if right else "start from SFT, raise k or max_new_tokens"
        raise ValueError(
            f"round {round_ + 1} found {found} {metrics['rollouts']} rollouts, so "
            f"there is nothing to learn from; {remedy}"
        )
    return grown, tally, metrics


def _distil(student, examples, settings, recorder: NestedRecorder) -> Policy:
    """Fine-tune; where that diverges, say in which round and what is left of it."""
    try:
        return finetune(student, examples, settings, recorder)
    except DivergedError as error:
        round_ = recorder.labels["round"]
        kept = f". The policy of round {round_ - 1} is in {recorder!r}"
        raise DivergedError(
            f"round {round_}, {error}{kept if round_ > 1 else ''}"
        ) from None


def orm_filter(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    orm: SolutionScorer,
    threshold: float,
) -> list[float]:
    """``rewards``, with 0 for right rollouts that score below ``threshold``.

    Others are not scored: wrong and truncated ones are not kept anyway.
    """
    candidates = _candidates(rollouts, rewards)
    scores = orm([rollouts[i] for i in candidates])
    passed = list(rewards)
    for i, score in zip(candidates, scores, strict=True):
        if score < threshold:
            passed[i] = 0.0
    return passed


def grow(
    dataset: Sequence[Solution],
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    problems: Sequence[Problem],
    settings: ExpertIterationSettings,
) -> list[Solution]:
    """D_i from D_{i-1} and this round's rollouts: filter, de-duplicate, unite.

    A truncated rollout is never kept: it did not end by itself, and learning from it
    would teach not to stop.
    """
    index = {problem.id: i for i, problem in enumerate(problems)}
    grown = list(dataset)
    seen = {(s.problem, s.key) for s in grown}
    counts = Counter(solution.problem for solution in grown)
    for rollout in (rollouts[row] for row in _candidates(rollouts, rewards)):
        i = index[rollout.problem_id]
        key = solution_key(rollout.text, settings.deduplicate, len(grown))
        full = settings.max_per_question is not None and (
            counts[i] >= settings.max_per_question
        )
        if full or (i, key) in seen:
            continue
        seen.add((i, key))
        counts[i] += 1
        grown.append(Solution(i, key, rollout.tokens))
    return grown


def solution_key(text: str, rule: str, position: int) -> tuple[str, ...]:
    """What makes two solutions of one question the same under ``rule``."""
    if rule == "operations":
        return operation_key(text)
    return (text.strip(),) if rule == "text" else (str(position),)


def _initial_data(base, problems, solved, settings) -> list[Solution]:
    if not settings.reference_solutions:
        return []
    index = {problem.id: i for i, problem in enumerate(problems)}
    if unknown := [problem.id for problem in solved if problem.id not in index]:
        raise ValueError(
            f"{len(unknown)} solved problem(s) are not among the {len(problems)} "
            f"questions, the first being {unknown[0]!r}; give every solved one as a "
            f"question too"
        )
    data = []
    for problem in solved:
        tokens = base.encode_response(
            format_prompt(problem), format_response(problem.solution)
        )
        key = solution_key(problem.solution, settings.deduplicate, len(data))
        data.append(Solution(index[problem.id], key, tuple(tokens)))
    return data


def _examples(base, problems, dataset, tally, settings) -> list[Example]:
    """Training sees the zero-shot prompt, whatever the rollout was asked with.

    Likewise it sees EOS behind a solution that ended with a question of its own. What
    that said is read behind its prompt: the tokenizers of some families drop the space
    before a text that stands alone, and would spell its beginning another way.
    """

    def response(solution: Solution) -> tuple[int, ...]:
        if solution.tokens[-1] in base.eos_ids:
            return solution.tokens
        prompt = format_prompt(problems[solution.problem])
        asked = base.encode_prompt(prompt)
        whole = base.decode([*asked, *solution.tokens])
        text, stop, _ = whole[len(base.decode(asked)) :].partition(NEXT_QUESTION)
        return tuple(base.encode_response(prompt, text)) if stop else solution.tokens

    rates = tally.rates()
    weights = rarity_weights([rates[s.problem] for s in dataset], settings.rarity)
    prompts = [base.encode_prompt(format_prompt(problem)) for problem in problems]
    return [
        Example(tuple(prompts[solution.problem]), response(solution), weight=weight)
        for solution, weight in zip(dataset, weights, strict=True)
    ]


def _candidates(rollouts, rewards) -> list[int]:
    """Indices of what could be learned from: right, and ended by itself."""
    return [
        i
        for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True))
        if rollout.finished and reward >= 1.0
    ]


def _share_kept(rollouts, rewards, passed) -> float:
    candidates = _candidates(rollouts, rewards)
    return len(_candidates(rollouts, passed)) / max(1, len(candidates))


def _round_metrics(rollouts, rewards, dataset, before, questions) -> dict[str, Any]:
    right = {
        r.problem_id
        for r, reward in zip(rollouts, rewards, strict=True)
        if reward >= 1.0
    }
    covered = {solution.problem for solution in dataset}
    return {
        "accuracy": sum(rewards) / len(rewards),
        "solved_questions": len(right) / questions,
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "response_length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "new_solutions": len(dataset) - before,
        "solutions": len(dataset),
        "solutions_per_question": len(dataset) / max(1, len(covered)),
    }


# --- Checkpoints -------------------------------------------------------------------


def _packed(round_, policy, dataset, tally, metrics) -> dict[str, Any]:
    """What decides all that follows a round's sampling: its policy, D, metrics."""
    tensors = {f"policy.{k}": v for k, v in policy.model.state_dict().items()}
    tensors["data.problem"] = torch.tensor([s.problem for s in dataset])
    tensors |= pack_lists("data.tokens", [s.tokens for s in dataset])
    keys = [list(solution.key) for solution in dataset]
    counts = [tally.asked, tally.right]
    state = {"round": round_, "metrics": metrics, "keys": keys, "tally": counts}
    return {"tensors": tensors, "state": state}


def _unpack(saved: Checkpoint) -> list[Solution]:
    return [
        Solution(problem, tuple(key), tokens)
        for problem, key, tokens in zip(
            saved.tensors["data.problem"].tolist(),
            saved.state["keys"],
            unpack_lists("data.tokens", saved.tensors),
            strict=True,
        )
    ]


def _with_weights(policy: Policy, saved: Checkpoint) -> Policy:
    clone = policy.clone()
    own = clone.model.state_dict()
    load_tensors(own, saved.below("policy."), of=clone.model)
    return clone

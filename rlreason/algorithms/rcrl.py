"""Return-conditioned RL: learn from good and bad steps alike, each told by its label.

Havrilla et al. (2024), section 3; the idea of the decision transformer: maximise
log pi(a_t | s_t, g_t), where g_t says what comes of it, and then ask for the good.

1. *Sample* solutions of every question from the last policy of expert iteration, and
   drop repeats. A truncated solution is dropped too: it has no end to learn.
2. *Balance*: so many right solutions for a wrong one.
3. *Label* every step S_i, a line, by what becomes of the prefix P_i = (S_1 .. S_i) that
   ends with it: the policy goes on from P_i K times, and ``[GOOD]`` means that a share
   of at least ``threshold`` comes to the right answer, ``[BAD]`` that it does not. The
   last step has no way to go on; its success is the reward of the solution. An outcome
   reward model can say p(correct | P_i) instead, which takes no rollouts.
4. *Lay out*: the label stands before its step, as a token that no text can spell.
5. *Learn*, starting from the pretrained base: cross-entropy on the tokens of the steps,
   EOS included, given the labels. The labels themselves are not learned.
6. *Ask* (``policy.labels``): force ``[GOOD]``, sample a step, force ``[GOOD]``,
   and so on. With ``[BAD]`` in its place the same policy must be right less often; that
   gap is the evidence that the labels mean something to it.

Left out against the paper: the choice of the best policy of expert iteration, from
which it samples (from memory; here it is the last round's); and, of its appendix on
step labels, the check that verifying rollouts use the results of the prefix, good
labels handed on to the steps before, and labels balanced by the length of the prefix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.recorder import (
    Checkpoint,
    NestedRecorder,
    Recorder,
    pack_lists,
    unpack_lists,
)
from rlreason.mdp import Span, Tokens, step_spans
from rlreason.policy.labels import BAD, GOOD
from rlreason.policy.load import Policy, positions_of
from rlreason.policy.progress import progress_bar
from rlreason.policy.reference import set_aside
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import sample, sample_prompts
from rlreason.policy.vocabulary import add_tokens, token_id
from rlreason.rewards.sparse import sparse_rewards
from rlreason.settings import Settings, ours, paper, precursor
from rlreason.tasks.answers import is_correct, operation_key
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

# p(correct) after each token of each rollout, as an outcome reward model gives it
StepScorer = Callable[[Sequence[Rollout]], Sequence[Sequence[float]]]

QUESTIONS_AT_ONCE = 256  # between two chances to save
# Random streams of their own, beside those of the rounds of expert iteration
SAMPLING_STREAM, LABELLING_STREAM = 900, 901


class RcrlSettings(Settings):
    """How to run return-conditioned RL. What the paper leaves open is said so."""

    samples: int = ours(4, "Solutions sampled a question (open in the paper).", ge=1)
    temperature: float = paper(
        1.0, "Sampling temperature, of solutions and of labels.", gt=0
    )
    k: int = precursor(
        8,
        "Rollouts that label a prefix (the paper's sister work has 8); 0: every step "
        "takes the label of its solution. Not used with a reward model.",
        ge=0,
    )
    threshold: float = paper(0.5, "Success from which on a step is good.", gt=0, le=1)
    positive_ratio: float | None = paper(
        1.0,
        "Right solutions for a wrong one (the paper: 100, 10, 1), what is over on "
        "either side being dropped; None: as they were sampled.",
        neutral=None,
        gt=0,
    )
    max_new_tokens: int = precursor(256, "Length limit of a response.", ge=1)
    seed: int = ours(0, "Seed of sampling, balance and order.", ge=0)
    finetune: FinetuneSettings = paper(FinetuneSettings, "The update.")


@dataclass(frozen=True, slots=True)
class LabelledSolution:
    """A solution and what is known of its steps.

    Attributes:
        problem: Index into the list of questions.
        rollout: The solution as the expert sampled it, without labels.
        right: Whether its final answer is.
        good: The label of each step; empty as long as there is none.
    """

    problem: int
    rollout: Rollout
    right: bool
    good: tuple[bool, ...] = ()


def rcrl(
    expert: Policy,
    base: Policy,
    problems: Sequence[Problem],
    settings: RcrlSettings,
    *,
    orm: StepScorer | None = None,
    recorder: Recorder | None = None,
) -> Policy:
    """Teach a clone of ``base`` the labels of the expert's steps; returns it.

    Args:
        expert: Samples solutions and labels them: the last policy of expert iteration.
        base: The pretrained model that learns, with the expert's tokenizer. Its clone
            has two tokens more. Neither is changed.
        problems: Questions with their final answers.
        settings: See the class.
        orm: Called with solutions; returns p(correct) after each of their tokens. Where
            given, it labels all steps but the last of each solution.
        recorder: Where metrics and checkpoints go.

    Logged while sampling (``kind="sample"``): ``questions`` and ``rollouts`` so far,
    ``accuracy`` and ``truncated`` (shares of the rollouts since the last row),
    ``right_solutions`` and ``wrong_solutions`` (without repeats, so far; in the last
    row, what the balance left). While labelling (``kind="label"``): ``questions``,
    ``rollouts`` (all, those of sampling included), ``steps`` and ``good_steps`` (the
    share of them) so far. At each update: as ``finetune``. Stages on the recorder's
    clock: ``sampling``, ``scoring`` (the labels), ``learning``.

    Raises:
        ValueError: All solutions are right or all are wrong, so that there is nothing
            to tell apart; or the tokenizers differ.
        DivergedError: A loss, a gradient or the weights are not finite.
    """
    recorder = recorder or Recorder()
    if expert.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ValueError(
            f"the expert {expert.name!r} and the base {base.name!r} have different "
            "vocabularies, so the tokens of one mean nothing to the other; use an "
            "expert that was trained from this base"
        )
    saved = recorder.restore()
    data = _Data() if saved is None else _unpack(saved, expert, problems)
    with progress_bar(
        len(problems), "sampling solutions", unit="question", done=data.sampled
    ) as progress:
        while data.sampled < len(problems):
            accuracy = _sample_some(expert, problems, data, settings, recorder)
            progress.update(data.sampled - progress.done, accuracy=accuracy)
    with progress_bar(
        len(problems), "labelling steps", unit="question", done=data.labelled
    ) as progress:
        while data.labelled < len(problems):
            good = _label_some(expert, problems, data, settings, recorder, orm)
            progress.update(data.labelled - progress.done, good_steps=good)
    student = add_tokens(base, [GOOD, BAD])
    seed = settings.finetune.seed + 1000 * settings.seed
    with set_aside(expert, base):
        return finetune(
            student,
            [conditioned_example(student, s, problems) for s in data.solutions],
            settings.finetune.model_copy(update={"seed": seed}),
            NestedRecorder(recorder, saved=saved, **_packed(data)),
            new_tokens=[token_id(student, name) for name in (GOOD, BAD)],
        )


# --- 1 and 2: sample and balance ---------------------------------------------------


@dataclass
class _Data:
    """How far the run has come before it learns: counts of questions, and the data."""

    sampled: int = 0
    labelled: int = 0
    rollouts: int = 0
    solutions: list[LabelledSolution] = field(default_factory=list)

    def count(self, right: bool) -> int:
        return sum(solution.right is right for solution in self.solutions)


def _sample_some(expert, problems, data, settings, recorder) -> float:
    """Sample the next questions, after the last one balance; returns the accuracy."""
    asked = problems[data.sampled : data.sampled + QUESTIONS_AT_ONCE]
    with recorder.clock("sampling"):
        rollouts = sample(
            expert,
            asked,
            k=settings.samples,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=1000 * settings.seed + SAMPLING_STREAM,
        )
    rewards = sparse_rewards(rollouts, asked)
    data.solutions += distinct_solutions(rollouts, rewards, problems)
    data.sampled += len(asked)
    data.rollouts += len(rollouts)
    if data.sampled == len(problems):
        data.solutions = balance_solutions(
            data.solutions, settings.positive_ratio, seed=settings.seed
        )
    accuracy = sum(rewards) / len(rewards)
    recorder.log(
        "sample",
        questions=data.sampled,
        rollouts=data.rollouts,
        accuracy=accuracy,
        truncated=sum(not r.finished for r in rollouts) / len(rollouts),
        right_solutions=data.count(True),
        wrong_solutions=data.count(False),
    )
    _save_if_due(recorder, data)
    return accuracy


def distinct_solutions(
    rollouts: Sequence[Rollout], rewards: Sequence[float], problems: Sequence[Problem]
) -> list[LabelledSolution]:
    """Finished rollouts, one for each question, outcome and sequence of operations."""
    index = {problem.id: i for i, problem in enumerate(problems)}
    seen, kept = set(), []
    for rollout, reward in zip(rollouts, rewards, strict=True):
        i, right = index[rollout.problem_id], reward >= 1.0
        key = (i, right, operation_key(rollout.text))
        if rollout.finished and key not in seen:
            seen.add(key)
            kept.append(LabelledSolution(i, rollout, right))
    return kept


def balance_solutions(
    solutions: Sequence[LabelledSolution], positive_ratio: float | None, *, seed: int
) -> list[LabelledSolution]:
    """As many as can be had at so many right solutions for a wrong one, in order.

    Which ones are dropped is drawn at random, whatever their question.

    Raises:
        ValueError: All are right, or all are wrong.
    """
    right = [i for i, solution in enumerate(solutions) if solution.right]
    wrong = [i for i, solution in enumerate(solutions) if not solution.right]
    if not right or not wrong:
        raise ValueError(
            f"{len(right)} right and {len(wrong)} wrong solutions: labels can be "
            "learned from both kinds only. Raise samples, temperature, max_new_tokens "
            "or the number of questions, or take another expert."
        )
    if positive_ratio is None:
        return list(solutions)
    rng = random.Random(seed)
    n_right = min(len(right), max(1, round(positive_ratio * len(wrong))))
    n_wrong = min(len(wrong), max(1, round(len(right) / positive_ratio)))
    kept = rng.sample(right, n_right) + rng.sample(wrong, n_wrong)
    return [solutions[i] for i in sorted(kept)]


# --- 3: label ----------------------------------------------------------------------


def _label_some(expert, problems, data, settings, recorder, orm) -> float:
    """Label the solutions of the next questions; returns the share of good steps."""
    end = min(len(problems), data.labelled + QUESTIONS_AT_ONCE)
    places = [
        i for i, s in enumerate(data.solutions) if data.labelled <= s.problem < end
    ]
    chosen = [data.solutions[i] for i in places]
    with recorder.clock("scoring"):
        labelled, used = label_steps(expert, chosen, problems, settings, orm=orm)
    for i, solution in zip(places, labelled, strict=True):
        data.solutions[i] = solution
    data.labelled = end
    data.rollouts += used
    labels = [good for solution in data.solutions for good in solution.good]
    good_steps = sum(labels) / max(1, len(labels))
    recorder.log(
        "label",
        questions=data.labelled,
        rollouts=data.rollouts,
        steps=len(labels),
        good_steps=good_steps,
    )
    _save_if_due(recorder, data)
    return good_steps


def label_steps(
    expert: Policy,
    solutions: Sequence[LabelledSolution],
    problems: Sequence[Problem],
    settings: RcrlSettings,
    *,
    orm: StepScorer | None = None,
) -> tuple[list[LabelledSolution], int]:
    """Give every step of every solution its label.

    Returns:
        The solutions with ``good`` filled in, and the number of rollouts it took.
    """
    used = 0
    # Where the steps end after which the expert could go on: all but the last
    ends = [
        [end for _, end in cut_steps(expert, s.rollout.tokens)[:-1]] for s in solutions
    ]
    if orm is not None:
        success = _scores_at(ends, solutions, orm)
    elif settings.k == 0:
        success = [
            [float(s.right)] * len(e) for s, e in zip(solutions, ends, strict=True)
        ]
    else:
        prefixes = [
            [(s.problem, s.rollout.tokens[:end]) for end in e]
            for s, e in zip(solutions, ends, strict=True)
        ]
        # Solutions of one question often begin alike: each prefix is tried once
        distinct = list(dict.fromkeys(p for each in prefixes for p in each))
        rates = prefix_success(expert, distinct, problems, settings)
        used = settings.k * len(distinct)
        success = [[rates[prefix] for prefix in each] for each in prefixes]
    labelled = []
    for solution, values in zip(solutions, success, strict=True):
        good = (*(value >= settings.threshold for value in values), solution.right)
        labelled.append(replace(solution, good=good))
    return labelled, used


Prefix = tuple[int, Tokens]  # index of the problem, and the response so far


def prefix_success(
    expert: Policy,
    prefixes: Sequence[Prefix],
    problems: Sequence[Problem],
    settings: RcrlSettings,
) -> dict[Prefix, float]:
    """The share of K continuations of each prefix that come to the right answer.

    Prefix and continuation together keep to ``max_new_tokens``, as a solution does, and
    are judged as one text. The random stream of a continuation follows from the prefix,
    so that a label does not depend on what else is labelled. Where the model has no
    room for what a short prefix may still say behind a long one, they are asked apart.
    """
    if not prefixes:
        return {}
    prompts = []
    for i, tokens in prefixes:
        start = tuple(expert.encode_prompt(format_prompt(problems[i])))
        stream = " after " + " ".join(map(str, tokens))
        prompts.append(Prompt(problems[i].id, start + tokens, stream))
    most = settings.max_new_tokens - min(len(tokens) for _, tokens in prefixes)
    longest = max(len(prompt.tokens) for prompt in prompts)
    positions = positions_of(expert.model)
    if positions is not None and longest + most > positions and len(prefixes) > 1:
        by_length = sorted(prefixes, key=lambda prefix: len(prefix[1]))
        half = len(by_length) // 2
        halves = by_length[:half], by_length[half:]
        one, other = (prefix_success(expert, h, problems, settings) for h in halves)
        return one | other
    rollouts = sample_prompts(
        expert,
        prompts,
        k=settings.k,
        temperature=settings.temperature,
        max_new_tokens=most,
        seed=1000 * settings.seed + LABELLING_STREAM,
    )
    rates = {}
    for n, (i, tokens) in enumerate(prefixes):
        room = settings.max_new_tokens - len(tokens)
        group = rollouts[n * settings.k : (n + 1) * settings.k]
        texts = expert.decode_batch([tokens + r.tokens[:room] for r in group])
        right = sum(is_correct(text, problems[i].answer) for text in texts)
        rates[i, tokens] = right / settings.k
    return rates


def _scores_at(ends, solutions, orm) -> list[list[float]]:
    """What the reward model says where the steps end."""
    scores = orm([solution.rollout for solution in solutions])
    lengths = [len(solution.rollout.tokens) for solution in solutions]
    if [len(each) for each in scores] != lengths:
        raise ValueError(
            "the orm must give one score a token of each solution: it gave "
            f"{[len(each) for each in scores][:3]} scores for the first solutions, of "
            f"{lengths[:3]} tokens"
        )
    return [[each[end - 1] for end in e] for each, e in zip(scores, ends, strict=True)]


# --- 4: lay out --------------------------------------------------------------------


def cut_steps(policy: Policy, tokens: Sequence[int]) -> list[Span]:
    """The steps of a response, as ``policy.labels`` meets them: ``[start, end)``.

    As ``mdp.step_spans``, but what is blank after the last newline (EOS alone, mostly)
    is a step of its own: whoever samples step by step cannot know that nothing follows.
    """
    pieces = policy.decode_batch([[token] for token in tokens])
    spans = step_spans(pieces)
    start, end = spans.pop()
    text = ""
    for t in range(start, end):
        text += pieces[t]
        if "\n" in pieces[t] and text.strip() and t + 1 < end:
            return [*spans, (start, t + 1), (t + 1, end)]
    return [*spans, (start, end)]


def conditioned_example(
    student: Policy, solution: LabelledSolution, problems: Sequence[Problem]
) -> Example:
    """The solution with each step's label before it, EOS at the end.

    A label is read like a prompt: it stands before its step and is not learned.
    """
    prompt = student.encode_prompt(format_prompt(problems[solution.problem]))
    ids = {True: token_id(student, GOOD), False: token_id(student, BAD)}
    tokens: list[int] = []
    labels: list[int] = []
    spans = cut_steps(student, solution.rollout.tokens)
    for (start, end), good in zip(spans, solution.good, strict=True):
        labels.append(len(tokens))
        tokens += [ids[good], *solution.rollout.tokens[start:end]]
    return Example(tuple(prompt), tuple(tokens), given=tuple(labels))


# --- Checkpoints -------------------------------------------------------------------


def _save_if_due(recorder: Recorder, data: _Data) -> None:
    if recorder.due():
        NestedRecorder(recorder, **_packed(data)).save({}, {"updates": 0})


def _packed(data: _Data) -> dict[str, Any]:
    """How far the run has come before it learns, as every checkpoint holds it."""
    rollouts = [solution.rollout for solution in data.solutions]
    logprobs = [rollout.logprobs for rollout in rollouts]
    tensors = {
        "data.problem": torch.tensor([s.problem for s in data.solutions]),
        "data.sample": torch.tensor([r.sample for r in rollouts]),
        **pack_lists("data.tokens", [r.tokens for r in rollouts]),
        **pack_lists("data.logprobs", logprobs, dtype=torch.float32),
    }
    state = {
        "sampled": data.sampled,
        "labelled": data.labelled,
        "rollouts": data.rollouts,
        "right": [solution.right for solution in data.solutions],
        "good": [list(solution.good) for solution in data.solutions],
    }
    return {"tensors": tensors, "state": state}


def _unpack(saved: Checkpoint, expert: Policy, problems) -> _Data:
    """Undo ``_packed``; prompts and texts are made anew from the tokens."""
    tokens = unpack_lists("data.tokens", saved.tensors)
    columns = zip(
        saved.tensors["data.problem"].tolist(),
        saved.tensors["data.sample"].tolist(),
        tokens,
        unpack_lists("data.logprobs", saved.tensors),
        expert.decode_batch(tokens),
        saved.state["right"],
        saved.state["good"],
        strict=True,
    )
    solutions = []
    for i, number, ids, logps, text, right, good in columns:
        prompt = tuple(expert.encode_prompt(format_prompt(problems[i])))
        rollout = Rollout(problems[i].id, number, prompt, ids, logps, text, True)
        solutions.append(LabelledSolution(i, rollout, right, tuple(good)))
    counts = (saved.state[name] for name in ("sampled", "labelled", "rollouts"))
    return _Data(*counts, solutions)

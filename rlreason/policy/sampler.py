"""Sampling answers: fast, exact, and independent of the batch.

``sample`` draws K answers to each problem from the full softmax at a temperature and
returns the tokens with their exact log-probabilities. Nothing is truncated (no top-k,
no top-p, no penalties), and the model's own ``generation_config`` is never read:
policy-gradient methods need the log-probabilities of the distribution that was
sampled, and silent truncation is the classic way of getting others.

How it goes: the work is a queue of requests, (problem, K samples), longest prompts
first. When there is room, some are admitted: each prompt is computed once, and the
first token of each of its samples is drawn from the result. From then on a forward pass
decodes one token of all samples in flight; how many these are follows from a byte
budget. On a CPU, where arithmetic is dear, samples that have drawn the same tokens so
far are one row of it, see ``cohort_engine``. On a GPU, where launching is, each sample
has a slot, and a step is one captured graph, see ``slot_engine``.

The t-th random number of a sample is a hash of (seed, problem id, sample index, t), so
batch size, budget and order of the problems do not change what is drawn, up to
rounding: matrix products of other shapes may differ in the last bits, which changes a
token only if its random number falls within about 1e-6 of a boundary.

``sample_prompts`` does the same for prompts given as tokens, for continuing half
solutions. ``prompt_groups`` can also put a token before each step, see ``labels``.
Sampling that takes hours is given a ``Keeper``, which holds on to what is finished.

Left out: beam search, truncated sampling; what is drawn after a text at which a prompt
stops is drawn, and dropped.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel

from rlreason.policy.budget import Costs
from rlreason.policy.cohort_engine import CohortEngine
from rlreason.policy.engine import Request
from rlreason.policy.forced import Forced
from rlreason.policy.load import Policy, positions_of, vocabulary_rows
from rlreason.policy.parallel import Group, joined_groups, my_share
from rlreason.policy.passes import check_model
from rlreason.policy.progress import progress_bar
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.slot_engine import SlotEngine
from rlreason.policy.streams import stream_key
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response, format_prompt

ENGINES = {"cuda": SlotEngine}  # by type of device; others decode as a CPU does
LOWEST_TEMPERATURE = 1e-6  # above 0; far above what overflows float32


@dataclass(frozen=True)
class Asked:
    """All that decides what is drawn.

    Attributes:
        policy: Who answers.
        prompts: What to.
        ks: How many samples of each prompt.
        temperature: As in ``sample``, like the next two.
        max_new_tokens: See there.
        seed: See there.
        forced: As in ``prompt_groups``.
    """

    policy: Policy
    prompts: Sequence[Prompt]
    ks: Sequence[int]
    temperature: float
    max_new_tokens: int
    seed: int
    forced: Forced | None


# Draws the groups of the prompts with these indices, in the order of finishing
Draw = Callable[[Sequence[int]], Iterator[Group]]
# Gives the groups of these indices too, some of them drawn, some that it has kept
Keeper = Callable[[Asked, Draw, Sequence[int]], Iterator[Group]]


def sample(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int | Sequence[int] = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    shots: Sequence[Problem] = (),
    byte_budget: int | None = None,
    progress: bool | None = None,
    keeper: Keeper | None = None,
) -> list[Rollout]:
    """Draw ``k`` answers to each problem.

    Args:
        policy: Who answers.
        problems: The questions. Two with the same id get the same samples.
        k: Samples a problem, or how many of each.
        temperature: Divides the logits. 0 is greedy decoding: the most likely token
            is taken, and ``logprobs`` are those of the distribution at temperature 1.
        max_new_tokens: An answer is cut after so many tokens, EOS included.
        seed: Of the random streams.
        shots: Solved problems that stand before each question in the prompt. An answer
            then also ends where it goes on with a question of its own.
        byte_budget: Memory for keys, values and logits of the samples in flight. By
            default 1 GiB on a CPU, and half of what is free on a GPU.
        progress: Show a bar; by default where somebody watches.
        keeper: Holds on to what is finished, as ``Recorder.keep_groups`` does.

    Returns:
        One problem's ``k`` rollouts stand together, problems in the given order. Use
        ``sample_groups`` for jobs whose results should not be held in memory at once.

    Raises:
        ValueError: If a setting is out of range, the sequence does not fit the model,
            or the budget does not hold one row.
    """
    groups = sample_groups(
        policy,
        problems,
        k=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        shots=shots,
        byte_budget=byte_budget,
        progress=progress,
        keeper=keeper,
    )
    return in_order(groups)


def sample_groups(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    shots: Sequence[Problem] = (),
    **settings: Any,
) -> Iterator[tuple[int, list[Rollout]]]:
    """Like ``sample``, but yields each problem as soon as its samples are finished.

    Yields:
        The index in ``problems`` and its ``k`` rollouts, in the order of finishing.
    """
    prompts = [prompt_of(policy, problem, shots) for problem in problems]
    yield from prompt_groups(policy, prompts, **settings)


def sample_prompts(
    policy: Policy, prompts: Sequence[Prompt], **settings: Any
) -> list[Rollout]:
    """Draw ``k`` continuations of each prompt given as tokens, e.g. of a half solution.

    Args:
        prompts: Where to go on from. What stands in a prompt is state and not action:
            it is in no rollout's ``tokens``.
        settings: What ``prompt_groups`` takes beside these.

    What is returned and what is raised are as in ``sample``.
    """
    return in_order(prompt_groups(policy, prompts, **settings))


def prompt_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    k: int | Sequence[int] = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    forced: Forced | None = None,
    byte_budget: int | None = None,
    progress: bool | None = None,
    keeper: Keeper | None = None,
) -> Iterator[tuple[int, list[Rollout]]]:
    """Like ``sample_prompts``, but yields each prompt as soon as its are finished.

    Of several processes each samples its share of the prompts, and all get all.

    Args:
        forced: What is put before each step that begins in a rollout. It is in
            ``tokens``, and ``max_new_tokens`` does not count it.

    The other arguments are as in ``sample``.

    Yields:
        The index in ``prompts`` and its ``k`` rollouts, in the order of finishing;
        those that a keeper has kept come first.
    """
    several = isinstance(k, Sequence) or getattr(k, "ndim", 0)
    ks = [operator.index(each) for each in (k if several else [k] * len(prompts))]
    asked = Asked(policy, prompts, ks, temperature, max_new_tokens, seed, forced)
    _check_settings(asked)
    own = my_share(sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)))
    draw = partial(draw_groups, asked, byte_budget=byte_budget, progress=progress)
    groups = keeper(asked, draw, own) if keeper else draw(own)
    yield from joined_groups(policy, prompts, groups)


def prompt_of(
    policy: Policy, problem: Problem, shots: Sequence[Problem] = ()
) -> Prompt:
    """A problem as it is asked.

    Raises:
        ValueError: It cannot be, by its name.
    """
    try:
        tokens = policy.encode_prompt(format_prompt(problem, shots))
    except ValueError as error:
        raise ValueError(
            f"The problem {problem.id!r} cannot be asked: {error}"
        ) from None
    return Prompt(problem.id, tuple(tokens), stop=end_of_response(shots))


def in_order(groups: Iterator[tuple[int, list[Rollout]]]) -> list[Rollout]:
    """All rollouts, those of group 0 first."""
    return [rollout for _, group in sorted(groups) for rollout in group]


def draw_groups(
    asked: Asked,
    chosen: Sequence[int],
    *,
    byte_budget: int | None,
    progress: bool | None,
) -> Iterator[Group]:
    """Draw the groups of the prompts with these indices, in the order of finishing."""
    if not chosen:
        return
    policy, forced, max_new_tokens = asked.policy, asked.forced, asked.max_new_tokens
    tokens = {i: list(asked.prompts[i].tokens) for i in chosen}
    _check_prompts(policy.model, list(tokens.values()), max_new_tokens)
    engine_of = ENGINES.get(policy.device.type, CohortEngine)
    limit = forced.longest([*tokens.values()]) if forced else max_new_tokens
    longest = max(map(len, tokens.values())) + limit - 1
    longest = min(longest, positions_of(policy.model) or longest)
    checked = check_model(policy, longest, engine_of.store)
    engine = engine_of(
        policy,
        costs=Costs.of(checked, limit),
        temperature=asked.temperature,
        limit=limit,
        byte_budget=byte_budget,
        forced=forced,
    )
    for index in chosen:  # the longest first
        prompt, numbers = asked.prompts[index], range(asked.ks[index])
        stream = prompt.problem_id + prompt.stream
        keys = [stream_key(asked.seed, stream, j) for j in numbers]
        engine.ask(Request(index, tuple(tokens[index]), numbers, keys))
    groups: dict[int, list[Rollout]] = {}
    total = sum(asked.ks[index] for index in chosen)
    with progress_bar(total, "sampling", unit="sample", show=progress) as bar:
        for answers in engine.run():
            bar.update(len(answers))
            texts = policy.decode_batch([policy.without_eos(a.tokens) for a in answers])
            for answer, text in zip(answers, texts, strict=True):
                prompt = asked.prompts[answer.problem]
                rollout = answer.rollout(prompt.problem_id, text)
                group = groups.setdefault(answer.problem, [])
                group.append(_stopped(policy, rollout, prompt.stop))
                if len(group) == asked.ks[answer.problem]:
                    group.sort(key=lambda rollout: rollout.sample)
                    yield answer.problem, groups.pop(answer.problem)


def _stopped(policy: Policy, rollout: Rollout, stop: str) -> Rollout:
    """The rollout up to the first token with which its text holds ``stop``."""
    if not stop or stop not in rollout.text:
        return rollout
    tokens = rollout.tokens

    def held(count: int) -> bool:
        return stop in policy.decode(tokens[:count])

    count = bisect_left(range(len(tokens)), True, key=held)
    return replace(
        rollout,
        tokens=rollout.tokens[:count],
        logprobs=rollout.logprobs[:count],
        text=policy.decode(rollout.tokens[:count]),
        finished=True,
    )


def _check_settings(asked: Asked) -> None:
    if len(asked.ks) != len(asked.prompts):
        raise ValueError(f"{len(asked.ks)} numbers k for {len(asked.prompts)} prompts.")
    if (k := min(asked.ks, default=1)) < 1:
        raise ValueError(f"k={k}: draw at least one sample a problem.")
    if not 0 <= asked.temperature < float("inf"):
        raise ValueError(f"temperature={asked.temperature}: give 0 (greedy) or more.")
    if 0 < asked.temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature={asked.temperature}: logits that are divided by so little "
            "are no numbers any more; give 0 (greedy)."
        )
    if not isinstance(asked.max_new_tokens, Integral) or asked.max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens={asked.max_new_tokens}: give a whole number, and allow at "
            "least one token."
        )


def _check_prompts(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
) -> None:
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ValueError("A prompt has no tokens, so there is nothing to condition on.")
    rows = vocabulary_rows(model)
    for token in (min(map(min, prompts)), max(map(max, prompts))):
        if not 0 <= token < rows:
            raise ValueError(
                f"A prompt has the token {token}, but the embedding of the model has "
                f"{rows} rows. Encode it with the model's own tokenizer."
            )
    room = positions_of(model)
    if room is not None and room <= longest:
        raise ValueError(
            f"A prompt has {longest} tokens, and the model reads {room}, answer "
            "included. Leave out what is longer, or use fewer shots."
        )
    if room is not None and room < longest + max_new_tokens:
        raise ValueError(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed "
            f"the {room} positions of the model. Lower max_new_tokens to at most "
            f"{room - longest}, or use fewer shots."
        )

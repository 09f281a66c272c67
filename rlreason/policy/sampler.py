"""Sampling answers: fast, exact, and independent of the batch.

``sample`` draws K answers to each problem from the full softmax at a temperature and
returns the tokens with their exact log-probabilities. Nothing is truncated (no top-k,
no top-p, no penalties), and the model's own ``generation_config`` is never read:
policy-gradient methods need the log-probabilities of the distribution that was
sampled, and silent truncation is the classic way of getting others.

How it goes: the work is a queue of requests, (problem, K samples), longest prompts
first. When there is room, requests are admitted together as a *cohort*: their prompts
are computed once, in one pass, and the first token of every sample is drawn from the
result. From then on each forward pass decodes one token of every row of all cohorts.
On a CPU a row is a distinct prefix: samples of a question that have drawn the same
tokens so far have the same keys, values and next distribution, which are computed once,
and each draws its own token from it by its own random number. A row splits when they
differ. On a GPU, which would have to wait for the answer to whether they do, each
sample has a row from the start. Samples that drew EOS leave, and new cohorts enter when
enough have left. How many are in flight follows from a byte budget, which holds even
if all of them come to differ.

The t-th random number of a sample is a hash of (seed, problem id, sample index, t), so
batch size, budget and order of the problems do not change what is drawn, up to
rounding: matrix products of other shapes may differ in the last bits, which changes a
token only if its random number falls within about 1e-6 of a boundary.

``sample_prompts`` does the same for prompts given as tokens, and can stop at other
tokens than EOS: for continuing half solutions and for sampling step by step.

Left out: beam search, stop strings, truncated sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlreason.policy.cohort import Answer, Cohort, Request
from rlreason.policy.load import Policy, vocabulary_rows
from rlreason.policy.parallel import joined_groups, my_share
from rlreason.policy.passes import (
    Checked,
    borrowed,
    check_model,
    next_logits,
    prompt_logits,
)
from rlreason.policy.progress import progress_bar, tell
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.streams import next_uniforms, stream_key
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass, bounds its activations
_REFILL_BELOW = 0.5  # admit a new cohort when fewer rows than this share are in flight


def sample(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    shots: Sequence[Problem] = (),
    byte_budget: int | None = None,
    progress: bool | None = None,
) -> list[Rollout]:
    """Draw ``k`` answers to each problem.

    Args:
        policy: Who answers.
        problems: The questions. Two with the same id get the same samples.
        k: Samples a problem.
        temperature: Divides the logits. 0 is greedy decoding: the most likely token
            is taken, and ``logprobs`` are those of the distribution at temperature 1.
        max_new_tokens: An answer is cut after so many tokens, EOS included.
        seed: Of the random streams.
        shots: Solved problems that stand before each question in the prompt.
        byte_budget: Memory for keys, values and logits of the samples in flight. By
            default 1 GiB on a CPU, and half of what is free on a GPU.
        progress: Show a bar; by default where somebody watches.

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
    )
    return _in_order(groups)


def sample_groups(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    shots: Sequence[Problem] = (),
    byte_budget: int | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[int, list[Rollout]]]:
    """Like ``sample``, but yields each problem as soon as its samples are finished.

    Yields:
        The index in ``problems`` and its ``k`` rollouts, in the order of finishing.
    """
    _check_settings(k, temperature, max_new_tokens)
    prompts = [_prompt_of(policy, problem, shots) for problem in problems]
    yield from _sample_groups(
        policy,
        prompts,
        k=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_ids=(),
        byte_budget=byte_budget,
        progress=progress,
    )


def sample_prompts(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    k: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    byte_budget: int | None = None,
    progress: bool | None = None,
) -> list[Rollout]:
    """Draw ``k`` continuations of each prompt given as tokens, e.g. of a half solution.

    Args:
        prompts: Where to go on from. What stands in a prompt is state and not action:
            it is in no rollout's ``tokens``.
        stop_ids: Tokens that end a rollout as EOS does, such as those with a newline to
            sample step by step; the last token says which one it was.

    The other arguments, what is returned and what is raised are as in ``sample``.
    """
    _check_settings(k, temperature, max_new_tokens)
    groups = _sample_groups(
        policy,
        prompts,
        k=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_ids=tuple(stop_ids),
        byte_budget=byte_budget,
        progress=progress,
    )
    return _in_order(groups)


def _prompt_of(policy: Policy, problem: Problem, shots: Sequence[Problem]) -> Prompt:
    try:
        tokens = policy.encode_prompt(format_prompt(problem, shots))
    except ValueError as error:
        raise ValueError(
            f"The problem {problem.id!r} cannot be asked: {error}"
        ) from None
    return Prompt(problem.id, tuple(tokens))


def _in_order(groups: Iterator[tuple[int, list[Rollout]]]) -> list[Rollout]:
    """All rollouts, those of group 0 first."""
    return [rollout for _, group in sorted(groups) for rollout in group]


def _sample_groups(
    policy: Policy, prompts: Sequence[Prompt], **options
) -> Iterator[tuple[int, list[Rollout]]]:
    """Of several processes each samples its share of the prompts, and all get all."""
    own = my_share(sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)))
    groups = _sample_own(policy, [prompts[i] for i in own], **options)
    yield from joined_groups(policy, prompts, ((own[i], group) for i, group in groups))


def _sample_own(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    k: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    stop_ids: tuple[int, ...],
    byte_budget: int | None,
    progress: bool | None,
) -> Iterator[tuple[int, list[Rollout]]]:
    tokens = [list(prompt.tokens) for prompt in prompts]
    if not prompts:
        return
    _check_prompts(policy.model, tokens, max_new_tokens)
    checked = check_model(policy, max(map(len, tokens)) + max_new_tokens - 1)
    engine = _Engine(
        policy,
        costs=Costs.of(checked, max_new_tokens),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        byte_budget=byte_budget,
        stop_ids=stop_ids,
    )
    for index in range(len(prompts)):  # the longest first
        stream = prompts[index].problem_id + prompts[index].stream
        keys = [stream_key(seed, stream, j) for j in range(k)]
        engine.ask(index, tokens[index], keys)
    partial: dict[int, list[Rollout]] = {}
    total = len(prompts) * k
    with progress_bar(total, "sampling", unit="sample", show=progress) as bar:
        for answers in engine.run():
            bar.update(len(answers))
            texts = policy.decode_batch([policy.without_eos(a.tokens) for a in answers])
            for answer, text in zip(answers, texts, strict=True):
                group = partial.setdefault(answer.problem, [])
                group.append(answer.rollout(prompts[answer.problem].problem_id, text))
                if len(group) == k:
                    group.sort(key=lambda rollout: rollout.sample)
                    yield answer.problem, partial.pop(answer.problem)


class _Engine:
    """Takes requests, keeps cohorts in flight, gives answers."""

    def __init__(
        self,
        policy: Policy,
        *,
        costs: Costs,
        temperature: float,
        max_new_tokens: int,
        byte_budget: int | None,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.model = policy.model
        self.ends, self.pad_id = (*policy.eos_ids, *stop_ids), policy.pad_id
        self.device = policy.device
        self.temperature = temperature
        self.limit = max_new_tokens
        self.costs = costs
        self.budget = byte_budget or _default_budget(policy.device)
        # Looking for finished samples, or for what samples have in common, makes a GPU
        # wait for its queue; a CPU has none.
        on_gpu = policy.device.type == "cuda"
        self.check_every, self.shared = (8, False) if on_gpu else (1, True)
        self.idle_share = 1 / 16 if on_gpu else 0.0  # finished, and not taken out yet
        self.queue: deque[Request] = deque()
        self.cohorts: list[Cohort] = []
        self.step_count = 0

    def ask(
        self, problem: int, prompt: Sequence[int], keys: list[int], first: int = 0
    ) -> None:
        """Queue one problem, in parts if its samples alone exceed the budget."""
        most = self.costs.rows_within(self.budget, len(prompt))
        for start in range(0, len(keys), most):
            part = keys[start : start + most]
            self.queue.append(Request(problem, tuple(prompt), first + start, part))

    def run(self) -> Iterator[list[Answer]]:
        """Decode until the queue is empty; yields cohort by cohort."""
        while self.queue or self.cohorts:
            finished: list[Cohort] = []
            # The model is given back before each yield: who takes the answers may use
            # it, or may never come back for more.
            with torch.inference_mode(), borrowed(self.model):
                try:
                    while not finished:
                        self.admit()
                        finished = self.retire()
                        self.decode()
                except torch.OutOfMemoryError:
                    self.halve()
            for cohort in finished:
                yield cohort.answers(self.ends)

    def halve(self) -> None:
        """Begin what is in flight again, in half of the memory.

        Raises:
            ValueError: That does not hold one row.
        """
        self.budget //= 2
        tell(f"out of memory: sampling goes on with {self.budget:,} bytes")
        again = [r for cohort in self.cohorts for r in cohort.requests] + [*self.queue]
        self.cohorts.clear()
        self.queue.clear()
        for request in again:
            self.ask(request.problem, request.prompt, request.keys, request.first)

    def admit(self) -> None:
        """Start a cohort if there is work and room for it."""
        free = self.budget - sum(self.costs.reserved(c) for c in self.cohorts)
        if not self.queue or (
            self.cohorts and free < (1 - _REFILL_BELOW) * self.budget
        ):
            return
        requests: list[Request] = []
        width = len(self.queue[0].prompt)  # the longest, since the queue is sorted
        while self.queue:
            request = self.queue[0]
            free -= self.costs.of_request(width, len(request.keys))
            if (requests or self.cohorts) and free < 0:
                break
            requests.append(self.queue.popleft())
        if not requests:  # the others must end first
            return
        cohort = Cohort(
            requests, limit=self.limit, shared=self.shared, device=self.device
        )
        self.cohorts.append(cohort)
        self.prefill(cohort)

    def prefill(self, cohort: Cohort) -> None:
        """Compute the prompts and draw every sample's first token."""
        store = cohort.store
        stride = max(1, PREFILL_TOKENS // store.width)
        parts = []
        for start in range(0, len(cohort.requests), stride):
            prompts = [r.prompt for r in cohort.requests[start : start + stride]]
            questions = slice(start, start + len(prompts))
            parts.append(
                prompt_logits(self.model, store, questions, prompts, pad_id=self.pad_id)
            )
        logits = torch.cat(parts).index_select(0, store.group)  # (R, V)
        self.draw(logits, [cohort])

    def decode(self) -> None:
        """One token of every row of every cohort that is not at the limit."""
        cohorts = [c for c in self.cohorts if c.drawn < self.limit]
        if not cohorts:
            return
        stores = [cohort.store for cohort in cohorts]
        ids = torch.cat([cohort.newest() for cohort in cohorts])
        positions = torch.cat([cohort.position for cohort in cohorts])
        logits = next_logits(self.model, stores, ids, positions)  # (R, V)
        for cohort in cohorts:
            cohort.position += 1
        self.draw(logits, cohorts)

    def draw(self, logits: Tensor, cohorts: list[Cohort]) -> None:
        """Draw each sample's next token from the logits of its row, (R, V)."""
        uniforms = torch.cat([next_uniforms(cohort.stream) for cohort in cohorts])
        starts = accumulate([cohort.rows for cohort in cohorts], initial=0)
        rows = torch.cat(
            [c.row + start for c, start in zip(cohorts, starts, strict=False)]
        )
        tokens, logprobs = draw_tokens(
            logits, uniforms, rows=rows, temperature=self.temperature
        )
        sizes = [cohort.samples for cohort in cohorts]
        for cohort, ids, logps in zip(
            cohorts, tokens.split(sizes), logprobs.split(sizes), strict=True
        ):
            cohort.record(ids, logps, self.ends)

    def retire(self) -> list[Cohort]:
        """Take out finished samples and split rows; returns cohorts that have ended."""
        self.step_count += 1
        at_limit = any(cohort.drawn == self.limit for cohort in self.cohorts)
        if self.step_count % self.check_every and not at_limit:
            return []
        finished, going = [], []
        for cohort in self.cohorts:
            done = int(cohort.done.sum())
            if cohort.drawn == self.limit or done == cohort.samples:
                finished.append(cohort)
                continue
            if done > self.idle_share * cohort.samples or cohort.splits():
                cohort.regroup()
            going.append(cohort)
        self.cohorts = going
        return finished


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw tokens from softmax(logits / temperature), all of the vocabulary.

    By inversion: the first token at which the cumulative probability exceeds the
    uniform number. A token of probability zero is never drawn.

    Args:
        logits: (R, V), any floating type; upcast to float32 before they are divided.
        uniforms: One for each token to draw, (S,), float64, in [0, 1).
        temperature: 0 takes the most likely token.
        rows: The row of the logits that each token is drawn from, (S,), int64; by
            default one from each.

    Returns:
        Tokens (S,), int64, and their log-probabilities (S,), float32; at temperature
        0 those of the distribution at temperature 1.
    """
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    probs = logits.softmax(-1)
    every = torch.arange(len(probs), device=probs.device)
    rows = every if rows is None else rows
    begins = rows * probs.shape[1]  # places in all rows as one line
    total = torch.zeros((), device=probs.device)
    if temperature == 0:
        tokens = logits.argmax(-1)[rows]
    else:
        # Row r climbs from 2r to 2r + 1, so that one search serves all; what float64
        # resolves there, 1e-12 in a thousand rows, is beyond the float32 of the logits.
        floor = 2.0 * every.double()
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1].clone()
        cumulative += floor[:, None]
        # Rounding can lift a number just below 1 to the total itself, which no entry
        # exceeds; the last token of positive probability is meant.
        below = torch.nextafter(cumulative[:, -1], floor)
        target = torch.minimum((floor[rows] + uniforms * total[rows]), below[rows])
        places = torch.searchsorted(cumulative.view(-1), target, right=True)
        tokens = (places - begins).clamp_(0, probs.shape[1] - 1)  # NaN is out of order
    # What is drawn is likely enough for the logarithm of float32 to be exact to 1e-6.
    # One row of NaN can lead the search for the others astray, so that all become NaN.
    logprobs = probs.view(-1)[begins + tokens].log() + 0 * total.sum().float()
    return tokens, logprobs


@dataclass(frozen=True)
class Costs:
    """What rows and prompts take of the budget, in bytes."""

    token: int  # keys and values of one token in all layers
    row: int  # a row with its own tokens and its share of the logits
    score: int  # attention of a row to one token, in the layer at work

    @classmethod
    def of(cls, model: Checked, max_new_tokens: int) -> Costs:
        # Logits as the model gives them, in float32, divided by the temperature, their
        # softmax, and its cumulative sum in float64.
        logits = model.logits * (4 + 4 + 4 + 4 + 8)
        records = 12 * max_new_tokens
        score = 16 * model.heads  # by question and by row, joined, and their softmax
        row = (model.token_bytes + score) * max_new_tokens + logits + records
        return cls(token=model.token_bytes, row=row, score=score)

    def of_request(self, width: int, rows: int) -> int:
        """One question with a prompt of ``width`` tokens."""
        return self.token * width + (self.row + self.score * width) * rows

    def reserved(self, cohort: Cohort) -> int:
        """What a cohort can come to take, when all of its samples differ."""
        store = cohort.store
        rows = max(store.slab_rows, cohort.samples)
        rows *= self.row + self.score * store.width
        return self.token * store.width * store.questions + rows

    def rows_within(self, budget: int, width: int) -> int:
        """Rows of one question that fit.

        Raises:
            ValueError: If there is none.
        """
        rows = (budget - self.token * width) // (self.row + self.score * width)
        if rows < 1:
            need = self.of_request(width, 1)
            raise ValueError(
                f"byte_budget={budget:,} does not hold one row, which needs {need:,} "
                "bytes. Raise byte_budget or lower max_new_tokens."
            )
        return rows


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch has set aside and does not use is taken only on paper
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return (free + cached) // 2
    return 2**30


def _check_settings(k: int, temperature: float, max_new_tokens: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}: draw at least one sample a problem.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: give 0 (greedy) or more.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: allow at least one token.")


def _check_prompts(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
) -> None:
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ValueError("A prompt has no tokens, so there is nothing to condition on.")
    rows = vocabulary_rows(model)
    if max(map(max, prompts)) >= rows:
        raise ValueError(
            f"A prompt has the token {max(map(max, prompts))}, but the embedding of "
            f"the model has {rows} rows. Encode it with the model's own tokenizer."
        )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and 0 < room < longest + max_new_tokens:
        raise ValueError(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed "
            f"the {room} positions of the model. Lower max_new_tokens to at most "
            f"{room - longest}, or use fewer shots."
        )

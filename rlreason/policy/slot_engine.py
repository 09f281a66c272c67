"""Decoding on a GPU: slots that are filled anew, and a step that is one graph.

Each sample has a slot: its keys and values, its last token, how many it has drawn and
what they were, all in tensors that stay where they are. A step takes nothing from the
host and gives it nothing: forward pass, draw, record, and whether a sample has ended,
in some hundreds of kernels that are captured once and replayed with one call. Every few
steps the host looks which samples have ended, takes them out and, when enough slots are
free, fills these with new ones, whose prompts are computed in a pass of their own.

Samples that have ended are computed until the host looks, and their results dropped.
When there is nothing left to fill slots with and few are in use, those move together,
and a smaller graph is captured.

Left out: slots of several lengths. Each has room for the longest answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlreason.policy.budget import REFILL_BELOW
from rlreason.policy.drawing import draw_tokens
from rlreason.policy.engine import Answer, Engine, Request
from rlreason.policy.forced import Forced, Forcing
from rlreason.policy.load import Policy
from rlreason.policy.memory import out_of_memory
from rlreason.policy.passes import NOT_FINITE, borrowed, next_logits, prompt_logits
from rlreason.policy.progress import tell
from rlreason.policy.slots import SlotStore
from rlreason.policy.streams import next_uniforms

LOOK_EVERY = 8  # steps from one look at the device to the next
_SPARE_PLACES = 3
WORTH_SHRINKING = 1024  # rows from which a smaller graph repays its capture


@dataclass(frozen=True, slots=True)
class Occupant:
    """The sample in a slot, and the place of its prompt."""

    problem: int
    sample: int
    prompt: tuple[int, ...]
    key: int
    place: int


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt, its place, and samples of it with their slots and random streams."""

    prompt: tuple[int, ...]
    place: int
    slots: list[int]
    keys: Sequence[int]


class SlotEngine(Engine):
    """Keeps slots filled."""

    store = SlotStore

    def __init__(self, policy: Policy, **settings) -> None:
        super().__init__(policy, **settings)
        self.occupants: dict[int, Occupant] = {}  # by slot
        self.slots: Slots | None = None

    def ask(self, request: Request) -> None:
        """Queue one problem."""
        self.queue.append(request)

    def run(self) -> Iterator[list[Answer]]:
        """Decode until the queue is empty; yields answers some at a time."""
        while self.queue or self.occupants:
            answers: list[Answer] = []
            # Given back before each yield, as whoever takes the answers may use it
            with torch.inference_mode(), borrowed(self.model, SlotStore):
                try:
                    while len(answers) <= self.patience() and (
                        self.queue or self.occupants
                    ):
                        self.admit()
                        for _ in range(min(LOOK_EVERY, self.limit - 1)):
                            self.slots.step()
                        answers += self.retire()
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.halve()
            yield answers

    def patience(self) -> int:
        """Answers that wait for more to come before they are given."""
        return 0 if self.slots is None else self.slots.rows // 4

    def give_up(self) -> list[Request]:
        """The samples in flight, those of a problem together."""
        groups: dict[int, list[Occupant]] = {}
        for occupant in self.occupants.values():
            groups.setdefault(occupant.problem, []).append(occupant)
        self.occupants.clear()
        self.slots = None
        requests = []
        for problem, group in groups.items():
            numbers, keys = [o.sample for o in group], [o.key for o in group]
            requests.append(Request(problem, group[0].prompt, numbers, keys))
        return requests

    def set_up(self) -> None:
        """As many slots and places as there is work for and memory.

        Raises:
            ValueError: The budget does not hold one row.
        """
        width = max(len(request.prompt) for request in self.queue)
        samples = sum(len(request.keys) for request in self.queue)
        most = max(len(request.keys) for request in self.queue)
        # Places for twice the questions that fill the slots and a few, as each waits
        # for its last sample, and one with many samples takes a place at each refill
        place = self.costs.token * width
        share = min(1.0, 2 / most)
        row = self.costs.of_request(width, 1) - place + int(share * place)
        self.costs.rows_within(self.budget, width)
        rows = max(1, min(samples, (self.budget - _SPARE_PLACES * place) // row))
        places = min(rows, 2 * -(-rows // most) + _SPARE_PLACES)
        self.slots = Slots(
            self.model,
            rows=rows,
            places=places,
            width=width,
            limit=self.limit,
            ends=self.ends,
            temperature=self.temperature,
            device=self.device,
            forced=self.forced,
        )
        self.free = list(range(rows))[::-1]
        self.places = list(range(places))[::-1]
        self.users: Counter[int] = Counter()  # samples in flight, by place

    def admit(self) -> None:
        """Fill free slots if there is work for them and enough are free."""
        if self.slots is None:
            self.set_up()
        used, rows = len(self.occupants), self.slots.rows
        if not self.queue:
            if used <= rows // 4 and rows >= WORTH_SHRINKING:
                self.shrink()
            return
        if used > REFILL_BELOW * rows:
            return
        parts: list[Part] = []
        while self.queue and self.free and self.places:
            request = self.queue.popleft()
            now, later = request.cut(len(self.free))
            if later is not None:
                self.queue.appendleft(later)
            own = [self.free.pop() for _ in now.keys]
            parts.append(Part(now.prompt, self.places.pop(), own, now.keys))
            self.enter(now, parts[-1])
        if not parts:  # the last samples of others hold all places
            return
        stride = max(1, self.prefill_tokens // max(len(part.prompt) for part in parts))
        for start in range(0, len(parts), stride):
            self.slots.fill(parts[start : start + stride], pad_id=self.pad_id)

    def enter(self, request: Request, part: Part) -> None:
        """Note whose the slots of a part are."""
        samples = zip(part.slots, request.numbers, request.keys, strict=True)
        for slot, number, key in samples:
            self.occupants[slot] = Occupant(
                request.problem, number, request.prompt, key, part.place
            )
        self.users[part.place] += len(part.slots)

    def retire(self) -> list[Answer]:
        """Take out the samples that have ended: the one look at the device."""
        going = self.slots.going.tolist()
        ended = [slot for slot in self.occupants if not going[slot]]
        if not ended:
            return []
        answers = []
        drawn = self.slots.results(ended)
        for slot, (tokens, logprobs) in zip(ended, drawn, strict=True):
            occupant = self.occupants.pop(slot)
            self.free.append(slot)
            answers.append(
                Answer(
                    problem=occupant.problem,
                    sample=occupant.sample,
                    prompt=occupant.prompt,
                    tokens=tokens,
                    logprobs=logprobs,
                    finished=tokens[-1] in self.ends,
                )
            )
            self.users[occupant.place] -= 1
            if not self.users[occupant.place]:
                self.places.append(occupant.place)
        return answers

    def shrink(self) -> None:
        """Move the samples in flight together."""
        kept = sorted(self.occupants)
        self.slots.keep(kept)
        self.occupants = {i: self.occupants[slot] for i, slot in enumerate(kept)}
        self.free = []


class Slots:
    """All that a step reads and writes, in tensors that stay where they are.

    R slots and G places for prompts of up to P tokens. The records of what was drawn
    have one column more than a sample has tokens, for what is drawn after its end.

    Attributes:
        going: Which slots hold a sample that has not ended, (R,), bool.
        captures: Whether a step becomes a graph, as there is a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        places: int,
        width: int,
        limit: int,
        ends: Sequence[int],
        temperature: float,
        device: torch.device,
        forced: Forced | None = None,
    ) -> None:
        self.model, self.limit, self.temperature = model, limit, temperature
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        pads = torch.full((places,), width - 1, device=device)
        self.store = SlotStore(
            pads, width, zeros.clone(), max_columns=max(limit - 1, 1)
        )
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.last, self.position, self.drawn, self.stream = (
            zeros.clone() for _ in range(4)
        )
        self.going = zeros.bool()
        self.forcing = forced and Forcing(forced, rows)
        self.tokens = zeros.new_zeros((rows, limit + 1))
        self.logprobs = torch.zeros((rows, limit + 1), device=device)
        self.every = torch.arange(rows, device=device)
        self.captures = device.type == "cuda"
        self.warm, self.graph = False, None

    @property
    def rows(self) -> int:
        """R."""
        return len(self.last)

    def step(self) -> None:
        """Advance: once operator by operator, then captured, then replayed."""
        if self.graph is not None or (self.warm and self.captures and self.capture()):
            self.graph.replay()
        else:
            self.advance()
            self.warm = True

    def capture(self) -> bool:
        """Make the graph; False, from now on, of a model that waits in its pass."""
        try:
            self.graph = captured(self.advance, self.last.device)
        except RuntimeError as error:
            cause = error.__context__ or error  # torch fails again as it ends a capture
            if out_of_memory(cause):
                raise cause from None
            said = " ".join(str(cause).split())[:100]
            name = type(self.model).__name__
            tell(f"a step of {name} is no graph, but goes on: {said}")
            self.captures = False
        return self.captures

    def fill(self, parts: Sequence[Part], *, pad_id: int) -> None:
        """Begin samples: compute g prompts, and draw the first token of S samples."""
        store, device = self.store, self.last.device
        prompts = [part.prompt for part in parts]
        sizes = [len(part.slots) for part in parts]
        at, lengths, number, rows, stream = (
            torch.tensor(numbers, device=device)
            for numbers in (
                [part.place for part in parts],
                [len(prompt) for prompt in prompts],
                sizes,
                [slot for part in parts for slot in part.slots],
                [key for part in parts for key in part.keys],
            )
        )
        store.pads[at] = store.width - lengths
        logits = prompt_logits(self.model, store, at, prompts, pad_id=pad_id)  # (g, V)
        questions = torch.arange(len(parts), device=device)
        which = questions.repeat_interleave(number, output_size=sum(sizes))  # (S,)
        store.group[rows] = at[which]
        store.length[rows] = 0
        self.position[rows] = lengths[which] - 1
        self.drawn[rows] = 0
        self.going[rows] = True
        if self.forcing:
            self.forcing.begin(rows, lengths[which])
        tokens, logprobs = draw_tokens(
            logits, next_uniforms(stream), rows=which, temperature=self.temperature
        )
        self.stream[rows] = stream
        self.record(rows, tokens, logprobs)

    def advance(self) -> None:
        """One more token of every sample; nothing in it waits for the device."""
        store = self.store
        logits = next_logits(self.model, store.decoding(), self.last, self.position)
        tokens, logprobs = draw_tokens(
            logits, next_uniforms(self.stream), temperature=self.temperature
        )
        self.record(self.every, tokens, logprobs)
        store.length *= self.going  # what has ended attends to nothing of its own

    def record(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Write down what some slots drew, (S,), or were given, and count it."""
        going, drawn = self.going[rows], self.drawn[rows]
        full = drawn + 1 >= self.limit
        if self.forcing:
            tokens, logprobs, done = self.forcing.put(rows, tokens, logprobs)
            full = full | done
        column = torch.where(going, drawn, self.limit)
        self.tokens[rows, column] = tokens
        self.logprobs[rows, column] = logprobs
        self.last[rows] = torch.where(going, tokens, self.last[rows])
        self.position[rows] += going
        self.drawn[rows] = drawn + going
        ended = (tokens[:, None] == self.ends).any(1) | full
        self.going[rows] = going & ~ended

    def results(
        self, slots: list[int]
    ) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
        """The tokens of some slots and their log-probabilities.

        Raises:
            ValueError: If the model's outputs are not finite numbers.
        """
        rows = torch.tensor(slots, device=self.last.device)
        counts = self.drawn[rows].tolist()
        tokens = self.tokens[rows].tolist()
        logprobs = self.logprobs[rows].tolist()
        for count, ids, logps in zip(counts, tokens, logprobs, strict=True):
            if not all(map(isfinite, logps[:count])):
                raise ValueError(NOT_FINITE)
            yield tuple(ids[:count]), tuple(logps[:count])

    def keep(self, slots: list[int]) -> None:
        """Forget all slots but some, which from now on are the first."""
        rows = torch.tensor(slots, device=self.last.device)
        self.store.keep(rows)
        for name in ("last", "position", "drawn", "stream", "going"):
            setattr(self, name, getattr(self, name)[rows])
        self.tokens, self.logprobs = self.tokens[rows], self.logprobs[rows]
        self.every = self.every[: len(rows)]
        if self.forcing:
            self.forcing.keep(rows)
        self.warm, self.graph = False, None


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """All kernels of a step, to be replayed. It has been run before, and is not now.

    On a stream of its own: the one that torch takes by default is of the first device,
    and of all graphs, one of which takes the workspace of the others with it.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    own = torch.cuda.Stream(device)
    try:
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            step()
    finally:
        torch.cuda.set_stream(before)  # torch stays on its own where a capture fails
    return graph

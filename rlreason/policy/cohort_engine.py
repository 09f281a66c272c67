"""Decoding on a CPU: cohorts in flight, a row for each distinct prefix.

When there is room, requests are admitted together as a *cohort*: their prompts are
computed once, in one pass, and the first token of every sample is drawn from the
result. From then on each forward pass decodes one token of every row of all cohorts.
Samples of a question that have drawn the same tokens so far have the same keys, values
and next distribution, which are computed once, and each draws its own token from it by
its own random number. A row splits when they differ. Samples that drew EOS leave, and
new cohorts enter when enough have left.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from rlreason.policy.budget import REFILL_BELOW
from rlreason.policy.cohort import Cohort
from rlreason.policy.drawing import draw_tokens
from rlreason.policy.engine import Answer, Engine, Request
from rlreason.policy.kv_cache import CohortStore, DecodeCache
from rlreason.policy.load import Policy
from rlreason.policy.memory import out_of_memory
from rlreason.policy.passes import borrowed, next_logits, prompt_logits
from rlreason.policy.streams import next_uniforms

STEPS = 16  # decoded before a model is given back, which is milliseconds of work


class CohortEngine(Engine):
    """Keeps cohorts in flight."""

    store = CohortStore

    def __init__(self, policy: Policy, **settings) -> None:
        super().__init__(policy, **settings)
        self.cohorts: list[Cohort] = []
        # Requests that wait to be yielded; they outlive an end of memory
        self.ended: list[tuple[Cohort, list[int]]] = []

    def ask(self, request: Request) -> None:
        """Queue one problem, in parts if its samples alone exceed the budget."""
        most = self.costs.rows_within(self.budget, len(request.prompt))
        while request is not None:
            part, request = request.cut(most)
            self.queue.append(part)

    def run(self) -> Iterator[list[Answer]]:
        """Decode until the queue is empty; yields requests as they finish."""
        while self.queue or self.cohorts:
            # The model is given back before each yield: who takes the answers may use
            # it, or may never come back for more.
            with torch.inference_mode(), borrowed(self.model, CohortStore):
                try:
                    for _ in range(STEPS):
                        self.admit()
                        self.retire()
                        if not self.cohorts and not self.queue:
                            break
                        self.decode()
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.halve()
            while self.ended:
                cohort, requests = self.ended.pop(0)
                yield cohort.answers(requests, self.ends)

    def give_up(self) -> list[Request]:
        """The requests of all cohorts that have not been answered, whole."""
        requests = [
            request
            for cohort in self.cohorts
            for i, request in enumerate(cohort.requests)
            if i not in cohort.answered
        ]
        self.cohorts.clear()
        return requests

    def admit(self) -> None:
        """Start a cohort if there is work and room for it."""
        free = self.budget - sum(self.reserved(c) for c in self.cohorts)
        if not self.queue or (self.cohorts and free < (1 - REFILL_BELOW) * self.budget):
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
            requests, limit=self.limit, device=self.device, forced=self.forced
        )
        self.cohorts.append(cohort)
        self.prefill(cohort)

    def reserved(self, cohort: Cohort) -> int:
        """What a cohort can come to take, when all of its samples differ."""
        store, costs = cohort.store, self.costs
        rows = max(store.slab_rows, cohort.samples)
        rows *= costs.row + costs.score * (store.opening + store.width)
        prompts = store.opening + store.width * store.questions
        return costs.token * prompts + rows

    def prefill(self, cohort: Cohort) -> None:
        """Compute the prompts and draw every sample's first token."""
        store = cohort.store
        stride = max(1, self.prefill_tokens // (store.opening + store.width))
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
        cache = DecodeCache([cohort.store for cohort in cohorts])
        ids = torch.cat([cohort.newest() for cohort in cohorts])
        positions = torch.cat([cohort.position for cohort in cohorts])
        logits = next_logits(self.model, cache, ids, positions)  # (R, V)
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

    def retire(self) -> None:
        """Take out finished samples and requests that have ended, and split rows."""
        going = []
        for cohort in self.cohorts:
            done = int(cohort.done.sum())
            over = cohort.drawn == self.limit or done == cohort.samples
            if (done or over) and (requests := cohort.leave()):
                self.ended.append((cohort, requests))
            if over:
                continue
            if done or cohort.splits():
                cohort.regroup()
            going.append(cohort)
        self.cohorts = going

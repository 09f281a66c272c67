"""What a recipe will take before it is run: memory by phase, tokens, hours.

The update and the scoring of each step are carried out on models without weights
(``policy.weightless``), so they take what the code takes, whatever the architecture;
sampling follows from the sampler's own costs. A model is measured at two small depths:
what it takes grows by the same amount with every layer.

Memory is that of one device, of several that hold weights and gradients each and share
masters and moments (ZeRO-1). Counted with the model that works are those that a step
holds beside it: the base, the start, the policy of the last round; on a GPU only where
they are not set aside.

Assumed, since only a run can tell: how long texts are, how many solutions expert
iteration keeps (``Work``), that a solution has four steps, and that reading a token
takes a third of learning from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rlreason.algorithms.batching import CPU_ROOM, GPU_SHARE, Example
from rlreason.algorithms.experience import Experience
from rlreason.algorithms.finetune import FinetuneSettings, accumulate, nll
from rlreason.algorithms.optim import HALF
from rlreason.algorithms.ppo import Learner
from rlreason.algorithms.reward_modelling import (
    LabelledExample,
    OrmSettings,
    classification_loss,
)
from rlreason.policy.budget import PREFILL_TOKENS, Costs
from rlreason.policy.layout import micro_batches
from rlreason.policy.load import BUNDLED
from rlreason.policy.lora import trainable_weights, with_lora
from rlreason.policy.passes import Checked
from rlreason.policy.rollout import Rollout
from rlreason.policy.value import score
from rlreason.policy.weightless import (
    LiveBytes,
    WeightlessPolicy,
    bytes_of,
    config_of,
    weightless,
    with_depth,
)
from rlreason.rewards.orm import OutcomeRewardModel
from rlreason.runs.recipes import Recipe
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

CPU_BUDGET = 2**30  # bytes of the rows in flight; on a GPU, half of what is free
# Lost of what comes and goes, activations above all. Of small tensors, which glibc
# keeps on its heap, 0.9 was seen; of large ones, which it gives back at once, 0.05
SLACK = 0.2
STEPS_OF_A_SOLUTION = 4
CHARACTERS = 3.0  # of a token, mean
# Problems to train on and to test by, characters of a prompt and of a solution
KNOWN = {"gsm8k": (7217, 1319, 240.7, 287.7), "svamp": (600, 300, 170.0, 36.7)}


@dataclass(frozen=True)
class Machine:
    """Where it shall run.

    Attributes:
        gpus: How many work on one job; 0 for a CPU.
        memory: Bytes of each.
    """

    gpus: int
    memory: float

    @property
    def ranks(self) -> int:
        """Processes."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes:
        solved: Problems whose solutions SFT learns.
        asked: Questions of training.
        judged: Problems of the test split.
        prompt: Tokens of a prompt, mean, without examples.
        response: Tokens of a response, mean.
        kept: Solutions a question that a round of expert iteration learns from.
    """

    solved: int
    asked: int
    judged: int
    prompt: int
    response: int
    kept: int = 4

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        """Of a recipe's task: responses as long as its reference solutions.

        GSM8K and SVAMP are known; their files need not be here.
        """
        if known := KNOWN.get(recipe.task.name):
            train, test, prompt, response = known
            return cls(
                solved=min(train, recipe.task.solutions or train),
                asked=min(train, recipe.task.questions or train),
                judged=min(test, recipe.evaluation.sampled_problems or test),
                prompt=round(prompt / CHARACTERS),
                response=round(response / CHARACTERS),
            )
        asked = recipe.questions()
        prompt = sum(len(format_prompt(p)) for p in asked) / len(asked)
        response = sum(len(p.solution) for p in asked) / len(asked)
        return cls(
            solved=len(recipe.solved_problems()),
            asked=len(asked),
            judged=len(recipe.task.load("test", recipe.evaluation.sampled_problems)),
            prompt=round(prompt / CHARACTERS),
            response=round(response / CHARACTERS),
        )

    @property
    def whole(self) -> int:
        """Tokens of a prompt with its response."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Need:
    """What a step takes; bytes are the peaks of one device, 0 where it has no phase.

    Attributes:
        load: Models as they are when its work begins.
        sampling: Peak while it samples, and how many responses are in flight then.
        scoring: Peak while it scores what was sampled.
        update: Peak while it learns.
        sampled: Tokens drawn, in all.
        scored: Tokens read without learning, each with its whole prompt, in all.
        trained: Tokens learned from, each epoch's, likewise.
    """

    load: int
    sampling: tuple[int, int] = (0, 0)
    scoring: int = 0
    update: int = 0
    sampled: int = 0
    scored: int = 0
    trained: int = 0

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.load, self.sampling[0], self.scoring, self.update)

    def hours(self, machine: Machine, rates: tuple[float, float]) -> float:
        """At so many tokens a second sampled and trained by one device."""
        seconds = self.sampled / rates[0] + (self.trained + self.scored / 3) / rates[1]
        return seconds / machine.ranks / 3600


# --- Steps ---------------------------------------------------------------------------


def estimate(
    recipe: Recipe, machine: Machine, work: Work, steps: Sequence[str] = ()
) -> dict[str, Need]:
    """What steps of a recipe take, for one seed: all of them, or those that are named.

    Args:
        recipe: Of a profile. Its policy need not be there, see ``config_of``.
        machine: Where.
        work: How much.
        steps: Of ``STEPS``.

    Raises:
        PolicyError: The policy's configuration is not at hand.
    """
    models = Models(recipe, machine, work)
    return {name: STEPS[name](models, recipe, work) for name in steps or STEPS}


def _sft(models: Models, recipe: Recipe, work: Work) -> Need:
    return Need(
        models.weights,
        update=models.fine_tuning(recipe.sft),
        trained=work.solved * work.whole * recipe.sft.epochs,
    )


def _expert_iteration(models: Models, recipe: Recipe, work: Work) -> Need:
    """Base, start and the last policy wait while a student learns."""
    settings, from_base = recipe.expert_iteration, recipe.start == "base"
    rounds = (recipe.rounds_from_base if from_base else None) or settings.rounds
    first_k = (recipe.first_k_from_base if from_base else None) or settings.k
    first = models.weights * (1 if from_base else 2)
    held = first + models.weights * (rounds > 1)
    learned = work.asked * min(settings.k, work.kept) * work.whole
    return Need(
        first,
        sampling=models.sampling(held, work.asked, settings.k),
        update=models.waiting(held) + models.fine_tuning(settings.finetune),
        sampled=(first_k + (rounds - 1) * settings.k) * work.asked * work.response,
        trained=rounds * learned * settings.finetune.epochs,
    )


def _orm(models: Models, recipe: Recipe, work: Work) -> Need:
    """The base waits, then whoever sampled; balancing leaves half of the samples."""
    settings, one = recipe.orm, models.weights
    held = models.waiting(one) + one
    samples = work.asked * settings.k
    return Need(
        2 * one,
        sampling=models.sampling(held, work.asked, settings.k),
        update=models.waiting(2 * one) + models.reward_model(),
        sampled=samples * work.response,
        trained=samples // 2 * work.whole * settings.epochs,
    )


def _ppo(models: Models, recipe: Recipe, work: Work) -> Need:
    """Base and start wait, a reward model works; the rest is the learner's."""
    settings, from_base = recipe.ppo, recipe.start == "base"
    started = models.weights * (1 if from_base else 2)
    rewarding = models.weights * recipe.reward.learned
    held = models.waiting(started) + rewarding
    idle, scoring, update = models.ppo(rewarding)
    phases = (recipe.ppo_phases_from_base if from_base else None) or settings.phases
    responses = phases * settings.rollouts
    return Need(
        started + rewarding,
        sampling=models.sampling(
            held + idle,
            settings.rollouts // settings.n,
            settings.n,
            shots=recipe.shots if from_base else 0,
        ),
        scoring=held + scoring,
        update=held + update,
        sampled=responses * work.response,
        scored=responses * work.whole * (2 if settings.measures_kl else 1),
        trained=responses * work.whole * settings.epochs,
    )


def _rcrl(models: Models, recipe: Recipe, work: Work) -> Need:
    """To label a step takes half a response, K times; then expert and base wait."""
    settings, held = recipe.rcrl, 2 * models.weights
    solutions = work.asked * settings.samples
    labels = solutions * (STEPS_OF_A_SOLUTION - 1) * settings.k / 2
    return Need(
        held,
        sampling=models.sampling(held, work.asked, settings.samples),
        update=models.waiting(held) + models.fine_tuning(settings.finetune),
        sampled=round((solutions + labels) * work.response),
        trained=solutions * work.whole * settings.finetune.epochs,
    )


def _evaluation(models: Models, recipe: Recipe, work: Work) -> Need:
    """Of one policy: K samples a problem, and the greedy answer."""
    k = recipe.evaluation.k
    return Need(
        models.weights,
        sampling=models.sampling(models.weights, work.judged, k),
        sampled=work.judged * (k + 1) * work.response,
    )


STEPS: dict[str, Callable[[Models, Recipe, Work], Need]] = {
    "sft": _sft,
    "expert-iteration": _expert_iteration,
    "orm": _orm,
    "ppo": _ppo,
    "rcrl": _rcrl,
    "evaluation": _evaluation,
}


# --- Where it does not fit -----------------------------------------------------------

# Where the settings of each step's update stand in a recipe
_UPDATES = {
    "sft": "sft",
    "expert-iteration": "expert_iteration.finetune",
    "orm": "orm",
    "ppo": "ppo",
    "rcrl": "rcrl.finetune",
}


def remedy(
    step: str, recipe: Recipe, machine: Machine, work: Work
) -> tuple[dict[str, Any], int] | None:
    """The least change with which a step fits: settings, and a number of GPUs.

    In this order, each beside the ones before: fewer tokens at once, activations
    computed again, the reference on the CPU, adapters, twice as many GPUs up to 64.

    Returns:
        None where nothing of it is enough.
    """
    changes: dict[str, Any] = {}

    def fits(gpus: int) -> bool:
        there = Machine(gpus, machine.memory)
        need = estimate(recipe.changed(changes), there, work, [step])[step]
        return need.peak <= machine.memory

    for path, value in _savings(step, recipe):
        changes[path] = value
        if fits(machine.gpus):
            return changes, machine.gpus
    gpus = 2 * machine.gpus
    while 0 < gpus <= 64:
        if fits(gpus):
            return changes, gpus
        gpus *= 2
    return None


def _savings(step: str, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    if step not in _UPDATES:
        return
    part = _UPDATES[step]
    settings = recipe
    for name in part.split("."):
        settings = getattr(settings, name)
    tokens = settings.micro_tokens or 0  # as many as fit
    while tokens > 1024:
        tokens //= 2
        yield f"{part}.micro_tokens", tokens
    if step == "ppo":
        yield "ppo.gradient_checkpointing", True
        if settings.lora is None and settings.measures_kl:
            yield "ppo.kl.reference", "swap"
    if step != "orm" and settings.lora is None:
        yield f"{part}.lora", {}


# --- Models --------------------------------------------------------------------------


class Models:
    """Bytes of the models of a recipe at work on one device of a machine."""

    def __init__(self, recipe: Recipe, machine: Machine, work: Work) -> None:
        self.recipe, self.machine, self.work = recipe, machine, work
        self.config = config_of(recipe.policy)
        small = not machine.gpus or recipe.policy in BUNDLED
        self.dtype = torch.float32 if small else torch.bfloat16
        policy = weightless(self.config, self.dtype)
        self.parameters = sum(w.numel() for w in policy.model.parameters())
        self.weights = bytes_of(policy.model.parameters())
        config = self.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        numbers = 2 * config.num_hidden_layers * key_heads * width
        self.checked = Checked(
            crossed=0,
            token_bytes=numbers * self.dtype.itemsize,
            heads=heads,
            logits=config.vocab_size,
        )

    def waiting(self, held: int) -> int:
        """Bytes of models that wait: a GPU's wait in the memory of the CPU."""
        return 0 if self.machine.gpus else held

    def sampling(
        self, held: int, questions: int, k: int, *, shots: int = 0
    ) -> tuple[int, int]:
        """Peak while k responses to each question are sampled, and rows in flight.

        Args:
            held: Bytes of models in memory.
            questions: Asked, on all devices together.
            k: Responses to each.
            shots: Solved examples in every prompt.
        """
        width = self.work.prompt * (1 + shots) + self.work.response * shots
        costs = Costs.of(self.checked, self.recipe.max_new_tokens)
        group = costs.of_request(width, k)
        free = max(0, self.machine.memory - held)
        budget = free / 2 if self.machine.gpus else CPU_BUDGET
        groups = min(budget / group, -(-questions // self.machine.ranks))
        together = min(PREFILL_TOKENS // width, int(groups))
        (prefill,) = self.by_depth(partial(prefill_cost, width=width, rows=together))
        most = max(groups * group, costs.token * width * groups + prefill)
        return held + int(most), max(1, int(groups * k))

    def fine_tuning(self, settings: FinetuneSettings) -> int:
        """Peak of an update of all weights, or of adapters."""

        def learns(policy: WeightlessPolicy) -> tuple[nn.Module, Callable]:
            if settings.lora is not None:
                policy = with_lora(policy, **settings.lora.model_dump())
            return policy.model, partial(nll, policy)

        return self._update(settings, learns, Example)

    def reward_model(self) -> int:
        """Peak of an update of the reward model."""
        settings: OrmSettings = self.recipe.orm

        def learns(policy: WeightlessPolicy) -> tuple[nn.Module, Callable]:
            orm = OutcomeRewardModel(policy, likelihood=settings.likelihood)
            return orm.network, partial(classification_loss, orm)

        example = partial(LabelledExample, problem_id="", right=True)
        return self._update(settings, learns, example)

    def _update(
        self, settings: FinetuneSettings, learns: Callable, example: Callable
    ) -> int:
        size = self.work.whole
        share = -(-settings.batch_size // self.machine.ranks)
        one = example(*self._texts())
        tokens = settings.micro_tokens or self._tokens_that_fit(learns, one)
        # Two micro-batches: in the second one there are gradients already
        count = min(share, 2 * max(1, tokens // size))
        batch = [example(*self._texts(i)) for i in range(count)]

        def measure(policy: WeightlessPolicy) -> tuple[int, ...]:
            with _made():
                model, loss = learns(policy)
            state = _optimiser(model, self.machine.ranks)
            with LiveBytes() as live:
                live.hold(model.parameters())
                start = live.now
                accumulate(loss, batch, 1, max_tokens=tokens)
            peak = with_slack(start, live.peak)
            return peak + state.kept, live.now + state.stepping

        return max(self.by_depth(measure))

    def _tokens_that_fit(
        self, learns: Callable, example: Example, beside: int = 0
    ) -> int:
        """Tokens of a micro-batch where it is measured, as ``tokens_that_fit`` does.

        Those of one example at least: where they do not fit, its peak is to tell.

        Args:
            beside: Bytes of other models on the device.
        """

        def measure(policy: WeightlessPolicy) -> tuple[int, int]:
            with _made():
                model, loss = learns(policy)
            masters = _optimiser(model, self.machine.ranks).masters
            with LiveBytes() as live:
                live.hold(model.parameters())
                start = live.now
                summed = loss([example])
                kept = live.now - start
            del summed
            return start + masters, kept

        held, kept = self.by_depth(measure)
        free = GPU_SHARE * max(0, self.machine.memory - held - beside)
        room = free if self.machine.gpus else CPU_ROOM
        return max(len(example), int(room * len(example) / kept))

    def ppo(self, beside: int = 0) -> tuple[int, int, int]:
        """Of a learner: itself with its optimiser, the peaks of scoring and update.

        Args:
            beside: Bytes of other models on the device, which are not among them.
        """
        settings = self.recipe.ppo
        problem = Problem("", "", "", "")

        def learns(policy: WeightlessPolicy) -> tuple[nn.Module, Callable]:
            learner = Learner(policy, [problem], settings)
            return learner.policy.model, learner.kept_by

        tokens = settings.micro_tokens or self._tokens_that_fit(
            learns, Example((1,), self._texts()[1]), beside
        )
        share = -(-settings.batch_size // self.machine.ranks)
        # Of as many questions, which is what mini-batches may come to
        texts = [self._texts(i) for i in range(share)]
        at_once, *more = micro_batches(
            texts, max_tokens=tokens, size=lambda text: sum(map(len, text))
        )
        chosen = at_once + (more[0] if more else [])
        rollouts = [
            Rollout("", 0, *text, (0.0,) * len(text[1]), "", True) for text in chosen
        ]
        if settings.kl.reference == "swap":  # then its weights are on the CPU
            kl = settings.kl.model_copy(update={"coef": 0.0})
            settings = settings.model_copy(update={"kl": kl, "max_kl": None})

        def measure(policy: WeightlessPolicy) -> tuple[int, ...]:
            with _made():
                learner = Learner(policy, [problem], settings)
            learner.micro_tokens = tokens
            models = [learner.policy.model]
            models += [m for m in (learner.value_function,) if m is not None]
            if learner.reference is not None and learner.reference.copy is not None:
                models.append(learner.reference.copy.model)
            state = _optimiser(nn.ModuleList(models), self.machine.ranks)
            learner.optimizer = torch.optim.SGD(learner.trained[0])  # counted above
            zeros = torch.zeros((len(chosen), self.work.response), device="meta")
            experience = Experience(
                tuple(rollouts), zeros.bool(), *(zeros,) * 3, zeros[:, 0], *(zeros,) * 4
            )
            with LiveBytes() as live:
                live.hold(w for m in models for w in m.parameters())
                start = live.now
                live.peak = start
                with torch.no_grad():
                    score(
                        learner.policy,
                        *zip(*at_once, strict=True),
                        value_function=learner.value_function,
                        entropy=False,
                        chunk=settings.logit_rows,
                    )
                scoring, live.peak = live.peak, start
                learner.accumulate(experience, list(range(len(chosen))))
            sizes = start, with_slack(start, scoring), with_slack(start, live.peak)
            return *(n + state.kept for n in sizes), live.now + state.stepping

        idle, scoring, backward, step = self.by_depth(measure)
        return idle, scoring, max(backward, step)

    def _texts(self, question: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt like no other and a response, of the lengths that are assumed."""
        return (question, *(1,) * (self.work.prompt - 1)), (1,) * self.work.response

    def by_depth(self, measure: Callable[[WeightlessPolicy], tuple]) -> list[int]:
        """Measure two shallow models, and go on along the line to the whole depth."""
        depth = self.config.get_text_config().num_hidden_layers
        value = self.recipe.ppo.gae and self.recipe.ppo.gae.value
        low = value.layers if value and value.kind == "branch" else 2
        if depth <= 2 * low:
            return list(measure(weightless(self.config, self.dtype)))
        first, second = (
            measure(weightless(with_depth(self.config, layers), self.dtype))
            for layers in (low, 2 * low)
        )
        return [
            a + (b - a) * (depth - low) // low
            for a, b in zip(first, second, strict=True)
        ]


@contextmanager
def _made() -> Iterator[None]:
    """While models are made of a policy: what is copied is not counted with them."""
    with LiveBytes(), torch.device("meta"):
        yield


@dataclass(frozen=True)
class _State:
    """What an optimiser keeps on a device, and has besides while it steps."""

    masters: int
    kept: int
    stepping: int


def _optimiser(model: nn.Module, ranks: int) -> _State:
    """AdamW of a model's trainable weights, shared by the ranks: bytes of each."""
    trained = trainable_weights(model)
    half = sum(w.numel() for w in trained if w.dtype in HALF)
    kept = 8 * sum(w.numel() for w in trained) + 4 * half  # moments, masters
    gradients = 4 * half  # in float32
    return _State(4 * half // ranks, kept // ranks, (kept + gradients) // ranks)


def with_slack(held: int, peak: int) -> int:
    """A peak with what an allocator loses between blocks that come and go."""
    return held + round((peak - held) * (1 + SLACK))


def prefill_cost(policy: WeightlessPolicy, *, width: int, rows: int) -> tuple[int]:
    """What a pass over prompts takes besides weights, keys and values."""
    ids = torch.ones((max(1, rows), width), dtype=torch.int64, device="meta")
    with LiveBytes() as live, torch.no_grad():
        live.hold(policy.model.parameters())  # else views of them count as new
        start = live.now
        policy.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return (live.peak - start,)

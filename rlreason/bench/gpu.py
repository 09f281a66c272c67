"""``make gpu-check``: how near a GPU comes to what is asked of it.

Speed in minutes and without a network: weights are random, or those of a folder, and
prompts are made up. Each line of the table is measured twice, and the first time warms
up. A line that fails, or for which no time is left, says so and leaves the others.

The *share of the card's arithmetic* is the floating-point operations that the update
needs, a second, over those of a large matrix product in bfloat16 on the same card. Each
token counts twice the weights that it meets forward, twice backward for activations,
and twice for gradients of weights where these are trained (not under LoRA), and causal
attention; the output layer counts for response tokens alone. Nothing that is computed
twice counts twice, and padding counts nothing.

At a small ``size`` everything shrinks, models too, so that a CPU goes through it in
seconds: that says that it runs, and nothing about speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.ppo import ppo
from rlreason.policy.load import Policy, load_policy, make_policy, vocabulary_rows
from rlreason.policy.lora import LoraSettings
from rlreason.policy.sampler import sample
from rlreason.runs.environment import environment
from rlreason.runs.profiles import load_recipe
from rlreason.tasks import load_problems


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    feed_forward: int
    vocabulary: int

    def scaled(self, size: float) -> Shape:
        """Smaller in width; with at least the layers of PPO's value branch."""
        if size == 1:
            return self
        heads = max(2, round(self.heads * size))
        return replace(
            self,
            hidden=16 * heads,
            layers=max(4, round(self.layers * size)),
            heads=heads,
            key_heads=heads,
            feed_forward=32 * heads,
            vocabulary=2048,  # the tokenizer's, at least
        )


SMALL = Shape("135M", 576, 30, 9, 3, 1536, 49152)  # SmolLM2-135M
LARGE = Shape("7B", 4096, 32, 32, 32, 11008, 32000)  # Llama-2 7B
RATE, SHARE, SECONDS = "tokens/s", "% of the card's arithmetic", "s"


@dataclass(frozen=True)
class Line:
    """A line of the table: what is asked, and what was found.

    Attributes:
        target: At least, or for seconds at most.
        measured: None where it was not.
        note: Why it was not, or why it says nothing about the target.
    """

    what: str
    target: float
    unit: str
    measured: float | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        if self.measured is None or self.note:
            return False
        if self.unit == SECONDS:
            return self.measured <= self.target
        return self.measured >= self.target


@dataclass(frozen=True)
class Check:
    """Where it is measured, and at which size.

    Attributes:
        model: Folder of the small model; None: random weights.
        size: 1 on a GPU; less shrinks models and work.
    """

    device: torch.device
    model: str | None = None
    size: float = 1.0

    def count(self, number: int, multiple: int = 1) -> int:
        """A number of rows, tokens or examples at this size."""
        return max(1, round(number * self.size / multiple)) * multiple

    def policy(self, shape: Shape) -> Policy:
        """The small model, or one with random weights in bfloat16."""
        if shape.name == SMALL.name and self.model is not None:
            return load_policy(self.model, device=self.device, dtype="bfloat16")
        sizes = shape.scaled(self.size)
        config = LlamaConfig(
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_heads,
            intermediate_size=sizes.feed_forward,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=shape is SMALL,
        )
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return make_policy(model, load_policy("nano").tokenizer, name=shape.name)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of the second time."""
        for _ in range(2):
            self.finish()
            start = time.perf_counter()
            work()
            self.finish()
        return time.perf_counter() - start

    def finish(self) -> None:
        """Wait for what the GPU has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- What is measured -----------------------------------------------------------------


def decoding(check: Check, policy: Policy, *, rows: int, tokens: int, k: int) -> float:
    """Sampled tokens a second, prompts included in the time."""
    problems = load_problems("gsm-mini", "test", limit=check.count(rows // k))
    length, drawn = check.count(tokens, 4), []

    def work() -> None:
        rollouts = sample(
            policy, problems, k=k, max_new_tokens=length, seed=0, progress=False
        )
        drawn.append(sum(len(rollout.tokens) for rollout in rollouts))

    seconds = check.timed(work)
    return drawn[-1] / seconds


def fine_tuning(check: Check, policy: Policy, *, updates: int, lora: bool) -> float:
    """Percent of the card's arithmetic that SFT uses; examples as long as GSM8K's."""
    peak = matrix_products(check)
    adapters = LoraSettings(rank=16, alpha=16.0, targets="all-linear") if lora else None
    batch = check.count(64)
    examples = made_up_examples(policy, batch * updates, length=check.count(110, 8))
    settings = FinetuneSettings(epochs=1, batch_size=batch, lora=adapters)
    seconds = check.timed(partial(finetune, policy, examples, settings))
    return 100 * operations(policy, examples, trained=not lora) / seconds / peak


def ppo_phase(check: Check, policy: Policy) -> float:
    """Seconds of a phase of the profile smol; the longest, where no answer ends."""
    recipe, ends = load_recipe("smol"), []
    settings = recipe.ppo.model_copy(
        update={
            "phases": 2,
            "rollouts": check.count(recipe.ppo.rollouts, recipe.ppo.n),
            "max_new_tokens": check.count(recipe.max_new_tokens, 4),
        }
    )

    def note(phase: int, policy: Policy) -> dict:
        check.finish()
        ends.append(time.perf_counter())
        return {}

    ppo(policy, load_problems("gsm-mini", limit=512), settings, on_phase=note)
    return ends[1] - ends[0]


def matrix_products(check: Check) -> float:
    """Floating-point operations a second of a large product in bfloat16."""
    width = check.count(8192, 64)
    a = torch.randn(width, width, device=check.device, dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(20):
            a @ a

    return 20 * 2 * width**3 / check.timed(work)


def made_up_examples(policy: Policy, count: int, *, length: int) -> list[Example]:
    """Examples of random tokens; prompt and response have 1/2 to 3/2 of the length."""
    generator = torch.Generator().manual_seed(0)
    span, rows = (length // 2, 3 * length // 2 + 1), vocabulary_rows(policy.model)

    def tokens() -> tuple[int, ...]:
        long = int(torch.randint(*span, (), generator=generator))
        return tuple(torch.randint(3, rows, (long,), generator=generator).tolist())

    return [Example(tokens(), tokens()) for _ in range(count)]


def operations(policy: Policy, examples: Sequence[Example], *, trained: bool) -> float:
    """Floating-point operations that updates on all examples need; see the module."""
    config = policy.model.config
    head = vocabulary_rows(policy.model) * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    named = policy.model.named_parameters()
    every = sum(weight.numel() for name, weight in named if "lora_" not in name)
    lengths = [len(example) for example in examples]
    answered = sum(len(example.tokens) for example in examples)
    met = (every - embeddings) * sum(lengths) + head * answered
    # Scores and sums of values with half of the other tokens: twice L^2 / 2 each
    squares = sum(length**2 for length in lengths)
    attention = config.num_hidden_layers * config.hidden_size * squares
    passes = 3 if trained else 2
    return passes * 2 * met + 3 * 2 * attention


Measure = Callable[[Check, Policy], float]
TARGETS: tuple[tuple[Shape, str, float, str, Measure], ...] = (
    *(
        (SMALL, f"135M, sampling, {rows:,} rows", target, RATE,
         partial(decoding, rows=rows, tokens=128, k=k))
        for rows, k, target in ((64, 8, 20e3), (512, 8, 100e3), (6144, 96, 250e3))
    ),
    (SMALL, "135M, SFT", 35, SHARE,
     partial(fine_tuning, updates=12, lora=False)),
    (SMALL, "135M, a phase of PPO as in smol", 6, SECONDS, ppo_phase),
    (LARGE, "7B, sampling, 1 row", 150, RATE,
     partial(decoding, rows=1, tokens=64, k=1)),
    (LARGE, "7B, sampling, 512 rows", 16e3, RATE,
     partial(decoding, rows=512, tokens=64, k=8)),
    (LARGE, "7B, SFT with LoRA", 45, SHARE,
     partial(fine_tuning, updates=2, lora=True)),
)  # fmt: skip


def check_gpu(
    *,
    model: str | None = None,
    size: float = 1.0,
    minutes: float = 9.0,
    report: Callable[[str], object] = print,
) -> list[Line]:
    """Measure all of ``TARGETS``, in their order.

    Args:
        model: Folder of a policy of about 135M weights; None: random weights.
        size: Below 1: smaller models and less work.
        minutes: After which nothing more is begun.
        report: Told each line as it comes.

    Raises:
        PolicyError: There is no such model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check, lines = Check(device, model, size), []
    if model is not None:
        check.policy(SMALL)  # in every line it would only be a note
    judged = "" if device.type == "cuda" and size == 1 else "not judged"
    until = time.monotonic() + 60 * minutes
    for shape, what, target, unit, measure in TARGETS:
        line = Line(what, target, unit, note="no time was left")
        if time.monotonic() < until:
            try:
                found = measure(check, check.policy(shape))
                line = replace(line, measured=found, note=judged)
            except Exception as fault:
                line = replace(line, note=f"{type(fault).__name__}: {fault}"[:200])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report(row_of(line))
        lines.append(line)
    return lines


# --- The table ------------------------------------------------------------------------


def row_of(line: Line) -> str:
    """A line of the Markdown table."""
    bound = "at most" if line.unit == SECONDS else "at least"
    target = f"{bound} {line.target:,.6g} {line.unit}"
    found = "" if line.measured is None else f"{line.measured:,.1f}"
    verdict = line.note or ("met" if line.met else "missed")
    return f"| {line.what} | {target} | {found} | {verdict} |"


def table(lines: Sequence[Line], *, size: float) -> str:
    """The table as Markdown, under what it was measured on."""
    here = environment()
    versions = ", ".join(f"{n} {v}" for n, v in here["packages"].items() if v)
    heads = [
        f"Measured on {here['device']} at {here['started']}, commit "
        f"{here['commit'] or 'unknown'}; {versions}.",
        "",
        "| measure | target on an H100 | measured | verdict |",
        "|---|---|--:|---|",
    ]
    if not torch.cuda.is_available() or size != 1:
        said = "" if torch.cuda.is_available() else "This is no GPU. "
        heads[1:1] = ["", f"{said}Size {size:g}: it runs, and the numbers say no more."]
    return "\n".join([*heads, *map(row_of, lines)]) + "\n"


def write_check(lines: Sequence[Line], folder: Path, *, size: float) -> None:
    """Write gpu-check.md and gpu-check.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu-check.md").write_text(table(lines, size=size), encoding="utf-8")
    content = {
        "gpu": torch.cuda.is_available(),
        "size": size,
        "environment": environment(),
        "lines": [asdict(line) | {"met": line.met} for line in lines],
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / "gpu-check.json").write_text(text, encoding="utf-8")

"""``rlreason bench sample``: the sampler beside transformers' ``generate``.

Same model, same prompts, same temperature, full softmax, same threads, in turns; the
first turn warms up and does not count. What is measured is *useful* tokens a second:
tokens up to and with EOS, since what ``generate`` computes for a row that has finished
is thrown away.

``generate`` is given its best chance: prompts sorted by length, so that little is
padding, and as many rows in a call as it is fastest with, which is tried out first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlreason.policy.load import Policy, load_policy
from rlreason.policy.sampler import sample
from rlreason.runs.profiles import load_recipe
from rlreason.runs.steps import train_sft
from rlreason.tasks import load_problems
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

GENERATE_ROWS = (64, 128, 256, 512)  # about how many in a call are tried


def run_sample_benchmark(
    policy: Policy | str | None = None,
    *,
    questions: int = 64,
    samples: Sequence[int] = (8, 96),
    max_new_tokens: int = 128,
    repeats: int = 3,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure both, for each number of samples a question.

    Args:
        policy: As in ``load_policy``, or a policy. None is nano after the SFT of the
            profile ``tiny``, which is trained if there is no such run yet.
        questions: gsm-mini test problems.
        samples: Values of K.
        max_new_tokens: Of both.
        repeats: Turns that count.
        report: Told what is being done.

    Returns:
        For each K a row: ``k``, ``questions``, ``mean_tokens`` of an answer, ``ours``
        and ``generate`` (median useful tokens a second), ``ratio`` (median over turns
        of the ratio in a turn), ``lowest`` and ``highest`` ratio, ``generate_rows``,
        ``threads``, ``device``.
    """
    if policy is None:
        policy = train_sft(load_recipe("tiny")).policy
    elif isinstance(policy, str):
        policy = load_policy(policy)
    problems = load_problems("gsm-mini", "test", limit=questions)
    settings = {"temperature": 1.0, "max_new_tokens": max_new_tokens}
    rows = []
    for k in samples:
        best = _best_rows(policy, problems, k=k, **settings)
        report(f"K={k}: {best} rows in a call of generate")
        turns = []
        for turn in range(repeats + 1):
            both = {"k": k, "seed": turn, **settings}
            ours = _useful_rate(_lengths_ours, policy, problems, **both)
            theirs = _useful_rate(
                _lengths_generate, policy, problems, rows=best, **both
            )
            turns.append((*ours, theirs[0]))
            report(
                f"K={k}, {f'turn {turn}' if turn else 'warm-up'}: {ours[0]:,.0f} and "
                f"{theirs[0]:,.0f} useful tokens a second"
            )
        rows.append(
            {"k": k, "questions": len(problems)}
            | _summary(turns[1:])
            | {
                "generate_rows": best,
                "threads": torch.get_num_threads(),
                "device": str(policy.device),
            }
        )
    return rows


def format_sample_benchmark(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    lines = ["   K  tokens  sample tok/s  generate tok/s  ratio (lowest to highest)"]
    for row in rows:
        lines.append(
            f"{row['k']:>4}  {row['mean_tokens']:>6.1f}  {row['ours']:>12,.0f}  "
            f"{row['generate']:>14,.0f}  {row['ratio']:.1f} "
            f"({row['lowest']:.1f} to {row['highest']:.1f})"
        )
    return "\n".join(lines)


def _useful_rate(
    sampler: Callable[..., Iterable[int]], *args, **options
) -> tuple[float, float]:
    """Time a sampler that gives the useful length of each sample.

    Returns:
        Useful tokens a second, and the mean length.
    """
    start = time.perf_counter()
    counted = list(sampler(*args, **options))
    seconds = time.perf_counter() - start
    return sum(counted) / seconds, sum(counted) / len(counted)


def _summary(turns: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    ratios = [ours / theirs for ours, _, theirs in turns]
    return {
        "mean_tokens": median(length for _, length, _ in turns),
        "ours": median(ours for ours, _, _ in turns),
        "generate": median(theirs for _, _, theirs in turns),
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def _lengths_ours(
    policy: Policy, problems: Sequence[Problem], *, k: int, seed: int, **settings
) -> list[int]:
    rollouts = sample(policy, problems, k=k, seed=seed, progress=False, **settings)
    return [len(rollout.tokens) for rollout in rollouts]


def _lengths_generate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    k: int,
    seed: int,
    rows: int,
    temperature: float,
    max_new_tokens: int,
) -> Iterable[int]:
    """Useful lengths from ``generate``, ``rows`` rows in a call."""
    prompts = [policy.encode_prompt(format_prompt(p)) for p in problems]
    prompts.sort(key=len)
    stride = max(1, rows // k)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), stride):
            ids, mask = _pad_left(prompts[start : start + stride], policy)
            output = policy.model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_return_sequences=k,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(policy.eos_ids),
                pad_token_id=policy.pad_id,
            )[:, ids.shape[1] :]  # (B, T)
            ends = torch.isin(output, output.new_tensor(policy.eos_ids))
            first = ends.int().argmax(1) + 1
            yield from torch.where(ends.any(1), first, output.shape[1]).tolist()


def _pad_left(prompts: Sequence[list[int]], policy: Policy) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = [[policy.pad_id] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return (
        torch.tensor(ids, device=policy.device),
        torch.tensor(mask, device=policy.device),
    )


def _best_rows(
    policy: Policy, problems: Sequence[Problem], *, k: int, **settings
) -> int:
    """The number of rows in a call with which ``generate`` is fastest."""
    few = problems[: max(1, max(GENERATE_ROWS) // k)]
    tried = sorted({max(1, rows // k) * k for rows in GENERATE_ROWS})  # whole questions
    options = {"k": k, "seed": 0, **settings}
    for _ in _lengths_generate(policy, few[:1], rows=k, **options):
        pass  # the first call of all is slower than it need be
    rates = {
        rows: _useful_rate(_lengths_generate, policy, few, rows=rows, **options)[0]
        for rows in tried
    }
    return max(rates, key=rates.get)

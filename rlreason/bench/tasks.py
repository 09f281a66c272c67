"""``rlreason bench tasks``: how fast gsm-mini makes problems, on one core."""

from __future__ import annotations

import time
from itertools import islice
from statistics import median

from rlreason.tasks.gsm_mini import make_problems


def bench_tasks(
    *, problems: int = 20_000, repeats: int = 5
) -> dict[str, tuple[float, float, float]]:
    """Problems a second by split: median, lowest and highest of the repeats."""
    rates: dict[str, tuple[float, float, float]] = {}
    for split in ("train", "test"):
        seen = []
        for seed in range(repeats):
            start = time.perf_counter()
            for _ in islice(make_problems(split, seed=seed), problems):
                pass
            seen.append(problems / (time.perf_counter() - start))
        rates[split] = median(seen), min(seen), max(seen)
    return rates

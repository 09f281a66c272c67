"""How long a job may take, and a grid of them, by what earlier ones took.

By runs of the same settings and another seed where there are any, else by those of the
same step and base whose settings differ least, which is said; a step that has not been
run here is judged by the rows that are recorded of its profile. What is like nothing is
unknown.

Left out: that one machine is faster than another, and that a run is longer than one of
other settings by so many phases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlreason.execution.jobs import Job
from rlreason.experiments.rows import Row, read_rows, rows_path
from rlreason.publishing.notebooks import Record
from rlreason.runs.environment import runs_root
from rlreason.runs.files import read_json
from rlreason.runs.plans import Plan, read_plan_file
from rlreason.settings import identity, settings_hash

OTHERS = "as with other settings"


@dataclass(frozen=True)
class Expected:
    """Seconds that a job may take.

    Attributes:
        by: What they are of, where that is not the same with another seed.
    """

    seconds: float
    by: str = ""

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s" + (f", {self.by}" if self.by else "")


def expected_of_step(plan: Plan, profile: str) -> Expected | None:
    """Of a run; None where nothing is known of its like."""
    mine, near = _facts(plan), {}
    for path in runs_root().glob(f"{plan.step}-*"):
        status = path / "status.json"
        if status.is_file():
            known = _run_in(path, status.stat().st_mtime_ns)
            if known and known[0]["contents.policy"] == mine["contents.policy"]:
                apart = len(mine.items() ^ known[0].items())
                near.setdefault(apart, []).append(known[1])
    if near:
        return Expected(fmean(near[min(near)]), OTHERS if min(near) else "")
    return _recorded(plan, rows_path(profile))


@lru_cache(maxsize=4096)
def _run_in(path: Path, changed: int) -> tuple[dict[str, str], float] | None:
    """What decided a run that is done, and its seconds; read again if it changes."""
    try:
        plan = read_plan_file(path / "settings.json")
    except ValueError:  # of other settings than there are now
        return None
    status = read_json(path / "status.json")
    if status.get("status") != "done" or not _is_number(status.get("seconds")):
        return None
    return _facts(plan), status["seconds"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _facts(plan: Plan) -> dict[str, str]:
    """All that decides a run but its seed, by dotted path."""
    facts = dict(_leaves(json.loads(identity(plan))))
    return {path: v for path, v in facts.items() if path.split(".")[-1] != "seed"}


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value)


def _recorded(plan: Plan, path: Path) -> Expected | None:
    """By the recorded run and its other seeds, or by those of its step and start."""
    if path.is_file():
        rows = _rows(path, path.stat().st_mtime_ns)
        size, start = Path(plan.policy).name, _start_of(plan)
        alike = {r.plan: r for r in rows if (r.step, r.size) == (plan.step, size)}
        if same := alike.get(settings_hash(plan)):
            took = [r.spent.seconds for r in alike.values() if r.arm == same.arm]
            return Expected(median(took), "as recorded")
        if took := [r.spent.seconds for r in alike.values() if r.start == start]:
            return Expected(median(took), "as recorded of other settings")
    return None


@lru_cache(maxsize=8)
def _rows(path: Path, changed: int) -> list[Row]:
    return read_rows(path)


def _start_of(plan: Plan) -> str:
    """As in ``Row.start``."""
    if "start" in type(plan).model_fields:
        return plan.start.step if plan.start else "base"
    return _start_of(plan.expert) if hasattr(plan, "expert") else ""


def expected_of_notebook(
    records: Iterable[Record | None], profile: str, parameters: Mapping[str, Any]
) -> Expected | None:
    """Of a notebook with some parameters, by the records of its executions."""
    known = [record for record in records if record and _is_number(record.seconds)]
    asked = (profile, _but_seed(parameters))
    same = [r.seconds for r in known if (r.profile, _but_seed(r.parameters)) == asked]
    if same:
        return Expected(fmean(same))
    return Expected(fmean(r.seconds for r in known), OTHERS) if known else None


def _but_seed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in parameters.items() if n not in ("seed", "profile")}


def least_seconds(
    jobs: Sequence[Job], seconds: Mapping[str, float], *, cores: int, gpus: int
) -> float:
    """What jobs take at least on a machine, or all at once where it has no end.

    No job begins before those that it needs, and no core or GPU does two at a time.

    Args:
        seconds: Of each by its name; those that are not known count for nothing.
        cores, gpus: Of the machine; 0: as many as are wanted.
    """
    known = {job.name: job for job in jobs}

    @cache
    def end(name: str) -> float:
        needs = [end(need) for need in known[name].needs if need in known]
        return seconds.get(name, 0.0) + max(needs, default=0.0)

    bounds = [end(name) for name in known]
    for have, wanted in ((cores, "cores"), (gpus, "gpus")):
        busy = sum(
            min(getattr(job, wanted), have) * seconds.get(job.name, 0.0) for job in jobs
        )
        bounds += [busy / have] if have else []
    return max(bounds, default=0.0)

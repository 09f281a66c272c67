"""How far each effect that a test decides by is from the bound that it must exceed.

What trains in a test ends elsewhere on another processor, and with another seed. So a
learning test states its effect as a function of the seed, and the bound, once:

    @effect(above=0.3)
    def gain_of_sft(seed: int) -> float:
        return accuracy(sft(..., seed=seed)) - accuracy(start)

    @pytest.mark.learning
    def test_sft_raises_the_accuracy():
        gain_of_sft.check()  # seed 0

``python tests/margins.py [NAME ...]`` measures all effects, or those whose name has one
of the given words in it, over five seeds and the arithmetic that PyTorch offers on this
machine, each variant in a process of its own. The margin is the mean less the bound,
the spread the largest value less the smallest of all seeds and variants; a margin under
twice the spread calls for an easier toy, never for a looser bound.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

SEEDS = range(5)
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Effect:
    """What a test decides by: ``measure(seed)`` must be above a bound."""

    name: str
    measure: Callable[[int], float]
    above: float

    def check(self, seed: int = 0) -> None:
        """Fail where the effect is not above its bound."""
        found = self.measure(seed)
        assert found > self.above, f"{self.name}: {found:.3g}, not above {self.above:g}"


EFFECTS: dict[str, Effect] = {}


def effect(*, above: float, name: str = "") -> Callable[..., Effect]:
    """Register a function of the seed; ``name`` is needed for partials and lambdas."""

    def register(measure: Callable[[int], float]) -> Effect:
        made = Effect(name or measure.__name__, measure, above)
        assert made.name not in EFFECTS, f"two effects are called {made.name!r}"
        EFFECTS[made.name] = made
        return made

    return register


def variants() -> dict[str, dict[str, str]]:
    """Environments that make this machine count as others do, by name."""
    kinds = {
        kind: {"ATEN_CPU_CAPABILITY": kind} for kind in ("default", "avx2", "avx512")
    }
    # Matrix products as on processors that are not Intel's
    kinds["compatible"] = {"MKL_CBWR": "COMPATIBLE"}
    found = {}
    for (kind, environment), threads in product(kinds.items(), "12"):
        if kind == capability(environment) or kind == "compatible":
            found[f"{kind}/{threads}"] = {**environment, "OMP_NUM_THREADS": threads}
    return found


def capability(environment: dict[str, str]) -> str:
    """What PyTorch makes of an environment: it takes no more than there is."""
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    command = [sys.executable, "-c", ask]
    done = subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True
    )
    return done.stdout.decode().strip()


def measured(names: list[str], environment: dict[str, str]) -> dict[str, list[float]]:
    """The effects at all seeds, in a process with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"HF_HUB_OFFLINE": "1", "RLREASON_RUNS": folder, "RLREASON_QUIET": "1"}
        own["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads on a busy machine
        own["PYTHONWARNINGS"] = "ignore"  # of the wrong versions, which are meant to
        done = subprocess.run(
            [sys.executable, __file__, "--measure", *names],
            env={**os.environ, **own, **environment},
            check=True,
            stdout=subprocess.PIPE,
        )
    return json.loads(done.stdout.splitlines()[-1])


def load(words: list[str]) -> list[Effect]:
    """The effects of all test modules whose name has one of the words in it."""
    for path in sorted(TESTS.glob("test_*.py")):
        if "from margins import" in path.read_text():
            importlib.import_module(path.stem)
    return [
        found
        for name, found in EFFECTS.items()
        if not words or any(word in name for word in words)
    ]


def main(words: list[str]) -> None:
    if words[:1] == ["--measure"]:
        found = {e.name: [float(e.measure(s)) for s in SEEDS] for e in load(words[1:])}
        print(json.dumps(found))
        return
    effects = load(words)
    runs = {}
    for variant, environment in variants().items():
        runs[variant] = measured([e.name for e in effects], environment)
        print(f"{variant} done", file=sys.stderr, flush=True)
    print(f"{len(SEEDS)} seeds; arithmetic / threads: {', '.join(runs)}")
    columns = ("bound", "mean", "worst", "spread", "margin/spread")
    print(f"{'effect':<52}" + "".join(f"{column:>14}" for column in columns))
    for e in effects:
        values = [value for run in runs.values() for value in run[e.name]]
        spread = max(values) - min(values)
        ratio = (mean(values) - e.above) / spread if spread else float("inf")
        numbers = (e.above, mean(values), min(values), spread, ratio)
        print(f"{e.name:<52}" + "".join(f"{number:>14.3g}" for number in numbers))


if __name__ == "__main__":
    # As the module that the test modules register at, and not a second one beside it
    importlib.import_module("margins").main(sys.argv[1:])

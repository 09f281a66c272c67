"""``make gpu-check`` at 1% on a CPU: every line is gone through, and none is judged."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_policy
from torch.utils.flop_counter import FlopCounterMode

from rlreason import cli
from rlreason.algorithms.batching import Example
from rlreason.bench import gpu


def run(folder, *arguments: str) -> dict:
    cli.main(["bench", "gpu", "--out", str(folder), *arguments])
    return json.loads((folder / "gpu-check.json").read_text())


def test_on_a_cpu_everything_runs_and_it_says_that_it_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = run(tmp_path, "--size", "0.01")
    assert (told["gpu"], told["size"]) == (False, 0.01)
    assert len(told["lines"]) == len(gpu.TARGETS) == 8
    for line in told["lines"]:
        assert line["measured"] > 0, line
        assert (line["note"], line["met"]) == ("not judged", False)
    table = (tmp_path / "gpu-check.md").read_text()
    assert "This is no GPU. Size 0.01" in table
    for target in ("20,000", "100,000", "250,000", "16,000", "at most 6 s"):
        assert target in table


def test_a_line_that_fails_or_comes_too_late_leaves_the_others(monkeypatch):
    def broken(check, policy):
        raise RuntimeError("out of memory")

    targets = [(gpu.SMALL, name, 1.0, "s", broken) for name in "ab"]
    monkeypatch.setattr(gpu, "TARGETS", targets)
    lines = gpu.check_gpu(size=0.01, report=lambda line: None)
    assert [line.note for line in lines] == ["RuntimeError: out of memory"] * 2
    late = gpu.check_gpu(size=0.01, minutes=0.0, report=lambda line: None)
    assert [(line.note, line.met) for line in late] == [("no time was left", False)] * 2


def test_a_model_that_is_not_there_is_told_before_anything_is_measured(
    tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--model", str(tmp_path / "nix"))
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("rlreason: There is no folder")
    assert (told.err.count("\n"), told.out) == (1, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("unit", "measured", "met"),
    [("s", 5.0, True), ("s", 7.0, False), ("x", 5.0, False), ("x", 6.0, True)],
)
def test_seconds_are_to_be_few_and_anything_else_much(unit, measured, met):
    assert gpu.Line("a", 6.0, unit, measured).met is met


def test_operations_are_those_that_torch_counts():
    """Without what is computed for prompts by the output layer, and half of attention,
    which is causal."""
    policy = tiny_policy()
    (length,), head = (40,), 32 * 260
    examples = [Example(tuple(range(3, 3 + length)), tuple(range(3, 3 + length)))]
    ids = torch.tensor([[*examples[0].prompt_tokens, *examples[0].tokens]])
    policy.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        policy.model(ids).logits.sum().backward()
    ours = gpu.operations(policy, examples, trained=True)
    attention = 3 * 2 * 2 * 32 * (2 * length) ** 2  # the masked half of two layers
    known = counter.get_total_flops() - 3 * 2 * head * length - attention
    assert ours == pytest.approx(known, rel=0.02)
    assert ours != pytest.approx(counter.get_total_flops(), rel=0.2)  # wrong: all of it
    frozen = gpu.operations(policy, examples, trained=False)
    assert frozen == pytest.approx(ours * 2 / 3, rel=0.1)

"""Run folders: a killed run that goes on equals an undisturbed one, to the bit.

Run as a program, this file is the run that gets killed: it forks a process for every
point in ``KILL_POINTS`` and lets each die there by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import forked
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from rlreason.algorithms.recorder import Recorder, pack_lists, unpack_lists
from rlreason.runs import folder as module
from rlreason.runs.folder import RunFolder, RunFolderError
from rlreason.settings import Settings, setting

STEPS = 12
SAVE_EVERY_STEPS = 3


class ToySettings(Settings):
    seed: int = 0
    steps: int = STEPS


def train_toy(settings: ToySettings, recorder: Recorder, at_step=lambda step: None):
    """Fit a line to random points with Adam: weights, moments and generator to keep."""
    generator = torch.Generator().manual_seed(settings.seed)
    weights = torch.randn(3, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.1)
    first = 0
    if (checkpoint := recorder.restore()) is not None:
        first = checkpoint.state["step"]
        generator.set_state(checkpoint.tensors["generator"])
        weights.data.copy_(checkpoint.tensors["weights"])
        optimizer.load_state_dict(
            {
                "state": {
                    0: {
                        name: checkpoint.tensors[name]
                        for name in ("step", "exp_avg", "exp_avg_sq")
                    }
                },
                "param_groups": optimizer.state_dict()["param_groups"],
            }
        )
    for step in range(first, settings.steps):
        x = torch.randn(8, 3, generator=generator)  # (B, features)
        loss = ((x @ weights - x.sum(1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.log("step", step=step, loss=loss)
        at_step(step)
        if (step + 1) % SAVE_EVERY_STEPS == 0:
            tensors = {"weights": weights, "generator": generator.get_state()}
            tensors |= optimizer.state_dict()["state"][0]
            recorder.save(tensors, {"step": step + 1})
    return weights.detach()


def run_toy(root: Path, **hooks) -> RunFolder:
    with RunFolder("toy", ToySettings(), root=root) as run:
        if not run.done:
            train_toy(ToySettings(), run, **hooks)
    return run


# Points at which the run is killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(name: str, *, call: int) -> None:
    """Let the ``call``-th call of a method of Path end the process instead."""
    whole, calls = getattr(Path, name), iter(range(call))

    def method(*args, **kwargs):
        return whole(*args, **kwargs) if next(calls, None) is not None else die()

    setattr(Path, name, method)


def kill_at_step(root: Path, fatal: int) -> None:
    run_toy(root, at_step=lambda step: die() if step == fatal else None)


def kill_between_draft_and_rename(root: Path) -> None:
    die_before("rename", call=1)
    run_toy(root)


def kill_within_the_draft(root: Path) -> None:
    whole, calls = module.save_file, iter(range(1))

    def save_half(tensors, path):
        if next(calls, None) is None:
            Path(path).write_bytes(b"half a fi")
            die()
        whole(tensors, path)

    module.save_file = save_half
    run_toy(root)


def kill_within_a_row(root: Path) -> None:
    def tear(step: int) -> None:
        if step == 7:
            with next(root.glob("*/metrics.jsonl")).open("ab") as file:
                file.write(b'{"step": 7, "lo')
            die()

    run_toy(root, at_step=tear)


def kill_after_the_last_save(root: Path) -> None:
    RunFolder.close_logs = lambda self: die()
    run_toy(root)


KILL_POINTS = {
    "first-step": lambda root: kill_at_step(root, 0),
    "before-the-first-save": lambda root: kill_at_step(root, 2),
    "after-a-save": lambda root: kill_at_step(root, 6),
    "between-draft-and-rename": kill_between_draft_and_rename,
    "within-the-draft": kill_within_the_draft,
    "within-a-row": kill_within_a_row,
    "after-the-last-save": kill_after_the_last_save,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with one killed run for every point, ``<point>/toy-<hash>/``."""
    root = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    forked.run([__file__, root], environment)
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    return run_toy(tmp_path_factory.mktemp("undisturbed"))


def checkpoint_bytes(run: RunFolder) -> dict[str, bytes]:
    files = [
        folder / name
        for folder in run.complete_checkpoints()
        for name in ("weights.safetensors", "state.json")
    ]
    return {str(file.relative_to(run.path)): file.read_bytes() for file in files}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_p47_p48_a_killed_run_that_goes_on_equals_an_undisturbed_one_to_the_bit(
    point, killed, undisturbed
):
    dead = RunFolder("toy", ToySettings(), root=killed / point)
    assert dead.status["status"] == "running"  # it had no chance to say otherwise
    run = run_toy(killed / point)
    assert run.done
    for name in ("metrics.jsonl", "settings.json"):
        assert (run.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    assert checkpoint_bytes(run) == checkpoint_bytes(undisturbed)
    assert len(run.timing) == len(run.metrics) == STEPS
    assert not list(run.path.rglob("*.partial"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_run_goes_on_from_its_checkpoint_and_not_from_the_start(killed):
    # Without this, starting over would pass the test above
    root = killed / "resume-count"
    run = RunFolder("toy", ToySettings(), root=root)
    assert run.restore().state == {"step": 6}
    steps = []
    run_toy(root, at_step=steps.append)
    assert steps == list(range(6, STEPS))


def test_two_runs_with_one_seed_are_equal_to_the_bit(tmp_path, undisturbed):
    run = run_toy(tmp_path)
    assert checkpoint_bytes(run) == checkpoint_bytes(undisturbed)
    name = "metrics.jsonl"
    assert (run.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


def test_a_run_without_its_generator_would_not_be_equal(tmp_path, undisturbed):
    # The wrong version: a checkpoint that forgets a part changes what follows
    class Forgetful(RunFolder):
        def restore(self):
            checkpoint = super().restore()
            if checkpoint is not None:
                fresh = torch.Generator().manual_seed(0).get_state()
                checkpoint.tensors["generator"] = fresh
            return checkpoint

    def stop(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, at_step=stop)
    with Forgetful("toy", ToySettings(), root=tmp_path) as run:
        train_toy(ToySettings(), run)
    assert run.metrics[:6] == undisturbed.metrics[:6]
    assert run.metrics[6:] != undisturbed.metrics[6:]


def test_a_run_that_is_done_is_not_run_twice(tmp_path):
    first = run_toy(tmp_path)
    written = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    steps = []
    again = run_toy(tmp_path, at_step=steps.append)
    assert steps == []
    assert {p: p.stat().st_mtime_ns for p in again.path.rglob("*")} == written
    with again, pytest.raises(RunFolderError, match="not after the run is done"):
        again.log("update", loss=1.0)


def test_settings_and_kind_name_the_folder(tmp_path):
    same = RunFolder("sft", ToySettings(), root=tmp_path)
    assert same.path == RunFolder("sft", ToySettings(seed=0), root=tmp_path).path
    assert same.path.name.startswith("sft-")
    assert same.path != RunFolder("ppo", ToySettings(), root=tmp_path).path
    assert same.path != RunFolder("sft", ToySettings(seed=1), root=tmp_path).path


def test_a_failed_run_says_so_and_goes_on(tmp_path, undisturbed):
    def fail(step: int) -> None:
        if step == 4:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        run_toy(tmp_path, at_step=fail)
    run = RunFolder("toy", ToySettings(), root=tmp_path)
    assert run.status["status"] == "failed"
    assert run.status["error"] == "RuntimeError: the disk is full"
    assert run_toy(tmp_path).metrics == undisturbed.metrics


def both_at_once(root: Path, monkeypatch, **hooks) -> tuple[RunFolder, list[str]]:
    """Write a run while a second writer waits for it; returns that one and its words.

    What interrupts the first writer goes no further.
    """
    told, waits = [], Event()
    monkeypatch.setattr(module, "tell", lambda line: (told.append(line), waits.set()))
    with ThreadPoolExecutor(1) as pool:
        with (
            suppress(KeyboardInterrupt),
            RunFolder("toy", ToySettings(), root=root) as first,
        ):
            second = pool.submit(run_toy, root)
            second.add_done_callback(lambda _: waits.set())  # did not wait: it failed
            waits.wait()
            train_toy(ToySettings(), first, **hooks)
        return second.result(), told


def test_a_second_writer_waits_for_the_first_and_loads_what_it_made(
    tmp_path, undisturbed, monkeypatch
):
    second, told = both_at_once(tmp_path, monkeypatch)
    assert told == [
        f"waiting for process {os.getpid()}, which is writing {second.path}"
    ]
    assert second.done
    assert second.metrics == undisturbed.metrics
    sessions = json.loads((second.path / "environment.json").read_text())
    assert len(sessions) == 1  # nothing was trained twice


def test_a_second_writer_goes_on_where_the_first_was_stopped(
    tmp_path, undisturbed, monkeypatch
):
    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    second, told = both_at_once(tmp_path, monkeypatch, at_step=stop)
    assert len(told) == 1
    assert second.done
    assert second.metrics == undisturbed.metrics
    weights = undisturbed.restore().tensors["weights"]
    assert torch.equal(second.restore().tensors["weights"], weights)


def test_only_the_newest_checkpoints_stay(tmp_path):
    with RunFolder("toy", ToySettings(), root=tmp_path, keep=1) as run:
        train_toy(ToySettings(), run)
    assert [p.name for p in run.complete_checkpoints()] == ["000004"]


def test_metrics_hold_numbers_and_no_clock(undisturbed):
    assert set(undisturbed.metrics[0]) == {"kind", "step", "loss"}
    assert set(undisturbed.timing[0]) == {"seconds"}


def test_what_json_cannot_hold_is_null_or_refused(tmp_path):
    with RunFolder("toy", ToySettings(), root=tmp_path) as run:
        run.log(
            "odd", nan=float("nan"), inf=torch.tensor(float("inf")), whole=3, name="a"
        )
        with pytest.raises(TypeError, match="metric 'rows' is a list"):
            run.log("odd", rows=[1, 2])
    assert run.metrics == [
        {"kind": "odd", "nan": None, "inf": None, "whole": 3, "name": "a"}
    ]


def test_tied_tensors_and_views_are_saved(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    with RunFolder("toy", ToySettings(), root=tmp_path) as run:
        run.save({"a": base, "tied": base, "view": base.T}, {"pair": (1, 2)})
    checkpoint = run.restore()
    assert torch.equal(checkpoint.tensors["tied"], base)
    assert torch.equal(checkpoint.tensors["view"], base.T)
    assert checkpoint.state == {"pair": [1, 2]}


def test_settings_changed_by_hand_are_noticed(tmp_path):
    run = run_toy(tmp_path)
    (run.path / "settings.json").write_text('{"seed":7,"steps":12}\n')
    with pytest.raises(RunFolderError, match="changed by hand"):
        run_toy(tmp_path)


class NewInner(Settings):
    rate: float = setting(0.5, "", source="ours")


class OldInner(NewInner):
    memory: int = setting(1, "", source="ours", neutral=1)


class New(Settings):
    inner: NewInner = setting(NewInner, "", source="ours")


class Old(Settings):
    inner: OldInner = setting(OldInner, "", source="ours")


def test_a_run_outlives_a_setting_that_did_nothing_to_it(tmp_path):
    with RunFolder("toy", Old(), root=tmp_path) as run:
        run.save({"a": torch.ones(2)}, {})
    again = RunFolder("toy", New(), root=tmp_path)
    assert again.path == run.path
    with again:
        assert torch.equal(again.restore().tensors["a"], torch.ones(2))
    # Where it did something, the run was another one
    changed = Old(inner=OldInner(memory=2))
    assert RunFolder("toy", changed, root=tmp_path).path != run.path


def test_results_of_another_version_of_the_source_bring_a_warning(tmp_path):
    run = run_toy(tmp_path)
    sessions = json.loads((run.path / "environment.json").read_text())
    sessions[0]["source"] = "0" * 12
    (run.path / "environment.json").write_text(json.dumps(sessions))
    with pytest.warns(UserWarning, match="another version of the source"):
        run_toy(tmp_path)


def test_the_environment_of_every_session_is_written(tmp_path):
    session = json.loads((run_toy(tmp_path).path / "environment.json").read_text())[0]
    # A build is named by the module alone: 2.13.0+cu130
    assert torch.__version__.startswith(session["packages"]["torch"])
    assert {"commit", "device", "threads", "started", "source"} <= set(session)


def test_nothing_in_a_run_folder_is_a_pickle(undisturbed):
    suffixes = {p.suffix for p in undisturbed.path.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ""}
    assert (undisturbed.path / "lock").read_bytes() == b""


def test_an_algorithm_runs_bare_and_gives_the_same_weights(undisturbed):
    bare = train_toy(ToySettings(), Recorder())
    assert torch.equal(bare, undisturbed.restore().tensors["weights"])


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=4), max_size=5))
def test_lists_come_back_as_they_were_packed(lists):
    tensors = pack_lists("data", lists)
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    assert unpack_lists("data", tensors) == [tuple(each) for each in lists]


def test_log_probabilities_come_back_to_the_bit():
    rows = [torch.randn(n).log_softmax(0).tolist() for n in (3, 0, 1)]
    tensors = pack_lists("data", rows, dtype=torch.float32)
    assert unpack_lists("data", tensors) == [tuple(row) for row in rows]


# Locks and clocks


class Clock:
    """Time that passes when told so, in place of ``time`` of run folders."""

    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def is_free(run: RunFolder) -> bool:
    """Whether nobody holds a run's lock; asks without waiting."""
    lock = FileLock(run.path / "lock")
    with lock.acquire(timeout=0):
        return lock.is_locked


def stop_after_a_checkpoint(root: Path) -> None:
    with suppress(KeyboardInterrupt), RunFolder("toy", ToySettings(), root=root) as run:
        run.log("update", loss=1.0)
        run.save({"a": torch.ones(2)}, {})
        raise KeyboardInterrupt


def test_a_run_that_cannot_begin_gives_its_lock_back(tmp_path):
    stop_after_a_checkpoint(tmp_path)
    tries = [RunFolder("toy", ToySettings(), root=tmp_path) for _ in range(2)]
    (tries[0].path / "metrics.jsonl").write_bytes(b"")
    for run in tries:  # all alive: a lock that nobody refers to is free by itself
        with pytest.raises(RunFolderError, match="it was changed by hand"), run:
            pytest.fail("it began")
        assert is_free(run)
    # Of use once more when it is mended
    (tries[0].path / "metrics.jsonl").write_bytes(b'{"kind": "update", "loss": 1.0}\n')
    with tries[0] as run:
        assert run.metrics == [{"kind": "update", "loss": 1.0}]
        with pytest.raises(TimeoutError):
            is_free(run)
    assert run.done


@pytest.mark.parametrize("also_within", [False, True])
def test_an_error_at_the_end_gives_the_lock_back(also_within, tmp_path, monkeypatch):
    run = RunFolder("toy", ToySettings(), root=tmp_path)

    def full(_) -> None:
        raise OSError("no space left")

    def use() -> None:
        with run:
            run.log("update", loss=1.0)
            if also_within:
                raise KeyboardInterrupt

    whole = RunFolder.close_logs
    monkeypatch.setattr(RunFolder, "close_logs", full)
    with pytest.raises(OSError, match="no space left"):
        use()
    assert is_free(run)
    assert not run.done
    monkeypatch.setattr(RunFolder, "close_logs", whole)
    run.close_logs()
    with RunFolder("toy", ToySettings(), root=tmp_path) as again:
        assert again.metrics == []  # there was no checkpoint
    assert again.done


@pytest.mark.parametrize(
    ("save_every", "took", "wait"), [(30, 7, 140), (30, 1, 30), (0, 7, 0)]
)
def test_saving_costs_a_twentieth_of_the_time_at_most(
    save_every, took, wait, tmp_path, clock, monkeypatch
):
    write = module.save_file
    monkeypatch.setattr(
        module, "save_file", lambda *given: (clock.work(took), write(*given))
    )
    with RunFolder("toy", ToySettings(), root=tmp_path, save_every=save_every) as run:
        for _ in range(2):
            run.save({"a": torch.ones(2)}, {})
            for passed in (0, wait - 1, wait, wait + 1):
                clock.work(passed)
                assert run.due() is (passed >= wait)
                clock.work(-passed)
    assert run.status["seconds"] == 2 * took


def test_damage_is_told_in_one_line_with_its_remedy(tmp_path):
    stop_after_a_checkpoint(tmp_path)
    run = RunFolder("toy", ToySettings(), root=tmp_path)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(RunFolderError, match=r"is damaged.*delete"):
        _ = run.metrics
    for weights in run.path.glob("checkpoints/*/weights.safetensors"):
        weights.unlink()
    with pytest.raises(RunFolderError, match=r"is damaged.*delete"):
        run.restore()


if __name__ == "__main__":
    points = {**KILL_POINTS, "resume-count": lambda root: kill_at_step(root, 7)}
    for name, kill in points.items():
        child = os.fork()
        if child == 0:
            kill(Path(sys.argv[1]) / name)
            os._exit(0)
        _, outcome = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(outcome) != -signal.SIGKILL:
            sys.exit(f"{name}: was to be killed, but ended with {outcome}")

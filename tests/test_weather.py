"""Bad weather: what fails around a run costs it time, and never what it has.

What is tested elsewhere: kills at chosen points of each algorithm (test_finetune,
test_train, test_run_folder), jobs whose process vanishes (test_execution), inputs that
change between plan and run (test_steps), NaN in loss, gradient, weights and logits
(test_recorder, test_ppo, test_sampler), damaged data (test_loaders, test_misuse).
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from kills import SMALL, WRONG, left
from test_notebook_runner import write_notebook
from test_rows import ROW
from toys import (
    TOY_PROBLEMS,
    toy_policy,
    toy_profile,
    toy_recipe,
    weights,
    written,
)

from rlreason import cli
from rlreason.algorithms import finetune
from rlreason.algorithms import ppo as ppo_module
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.ppo import BaselineSettings, PpoSettings
from rlreason.algorithms.recorder import MemoryRecorder
from rlreason.algorithms.sft import sft
from rlreason.commands.options import CELL_LIMIT
from rlreason.experiments.rows import RecordError, read_rows, write_rows
from rlreason.policy import cohort_engine, sampler
from rlreason.policy.memory import within_memory
from rlreason.policy.sampler import sample
from rlreason.publishing.book import Shelf
from rlreason.publishing.grid import read_grid
from rlreason.publishing.notebooks import (
    NotebookError,
    read_notebook,
    read_record,
    run_notebook,
)
from rlreason.runs import folder as module
from rlreason.runs.folder import HASHES, PARTS, RunFolder, RunFolderError
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.runs.stopping import EXIT_CODE, Stop, Stopped, heeding
from rlreason.settings import Settings, SettingsError


class Rows(Settings):
    """Settings of a run that counts."""

    rows: int = 9


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


# Kills and full disks


@pytest.fixture(scope="module")
def report() -> dict:
    """What ``kills.py`` finds: at each write, and at some random moments."""
    command = [Path(__file__).with_name("kills.py")]
    command += ["--writes", "--kills", str(SMALL), "--only", "ppo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(forked.run(command, environment))


@forks
@pytest.mark.parametrize("fails", ["dies", "fills"])
def test_a_run_that_fails_at_any_write_goes_on_as_if_nothing_had_been(fails, report):
    assert report[fails]["writes"] > 60
    assert report[fails]["wrong"] == []


@forks
@pytest.mark.parametrize("wrong", WRONG)
def test_run_folders_that_are_wrong_would_be_found_out_so(wrong, report):
    assert len(report[wrong]) == 1


@forks
def test_on_a_disk_that_takes_nothing_a_done_run_is_loaded_and_no_other_begun(report):
    told = report["read-only"]
    assert told["done"] == "fine, with 0 writes"
    assert "RLREASON_RUNS" in told["new"]
    assert "Read-only file system" in told["new"]
    assert told["begun"] == "OSError: [Errno 30] Read-only file system"


@forks
def test_kills_at_random_moments_lose_double_and_spoil_nothing(report):
    found = report["random"]
    assert found["kills"] >= SMALL
    assert (found["lost"], found["doubled"], found["wrong"]) == (0, 0, 0)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more into a file, as a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_system_really_refuses_is_told_with_its_remedy(tmp_path):
    def run(root: Path) -> None:
        with RunFolder("big", Rows(), root=root) as run:
            if run.restore() is None:
                run.log("step", loss=1.0)
                run.save({"a": torch.ones(9)}, {})
            run.log("step", loss=0.5)
            run.save({"a": torch.ones(30_000)}, {})

    run(tmp_path / "undisturbed")
    # The library that writes tensors has an error of its own, which is no OSError
    with files_of_at_most(50_000), pytest.raises(RunFolderError) as caught:
        run(tmp_path / "full")
    assert "000002 cannot be written" in str(caught.value)
    assert "make room" in str(caught.value)
    (big,) = (tmp_path / "full").iterdir()
    assert [path.name for path in (big / "checkpoints").iterdir()] == ["000001"]
    run(tmp_path / "full")
    assert left(tmp_path / "full") == left(tmp_path / "undisturbed")


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError("No space left on device")

    def fails() -> None:
        with RunFolder("toy", Rows(), root=tmp_path):
            monkeypatch.setattr(module, "write_json", full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()


def test_rows_stay_whole_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows([ROW], path)
    write = Path.write_bytes

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space"):
            write_rows([ROW.model_copy(update={"seed": 1})], path)
    assert read_rows(path) == [ROW]
    write_rows([ROW.model_copy(update={"seed": 1})], path)
    assert [row.seed for row in read_rows(path)] == [0, 1]


# SIGTERM


@pytest.fixture(autouse=True)
def plain_sigterm():
    """SIGTERM as a program has it, whatever a test of this process did to it before."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def ask_to_end(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def counting(root: Path, at: dict[int, Callable[[], None]], save_every: float) -> list:
    """Log nine rows, a checkpoint where it is due; do something at some of them."""
    with RunFolder("count", Rows(), root=root, save_every=save_every) as run:
        if run.done:
            return run.metrics
        saved = run.restore()
        for row in range(saved.state["rows"] if saved else 0, 9):
            at.get(row, lambda: None)()
            run.log("row", row=row)
            if run.due():
                run.save({"a": torch.full((2,), float(row))}, {"rows": row + 1})
        run.save({"a": torch.full((2,), 9.0)}, {"rows": 9})
    return run.metrics


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_asked_to_end_a_run_takes_a_checkpoint_first_and_goes_on_from_it(
    tmp_path, capsys
):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        counting(tmp_path, {4: ask_to_end}, save_every=1e9)
    assert ended.value.code == EXIT_CODE == 143
    assert "asked to end" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    (path,) = tmp_path.iterdir()
    status = json.loads((path / "status.json").read_text())
    assert status["error"] == "Stopped: asked to end by SIGTERM"
    rows = []
    note = {row: lambda row=row: rows.append(row) for row in range(9)}
    found = counting(tmp_path, note, save_every=1e9)
    assert rows == [5, 6, 7, 8]  # a kill would have cost all of them
    assert [row["row"] for row in found] == list(range(9))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_the_second_request_is_not_waited_for_and_the_last_moment_counts(tmp_path):
    def twice() -> None:
        ask_to_end()
        ask_to_end()
        pytest.fail("it went on")

    with pytest.raises(Stopped):
        counting(tmp_path / "twice", {4: twice}, save_every=1e9)
    (path,) = (tmp_path / "twice").iterdir()
    assert not (path / "checkpoints").exists()
    with pytest.raises(Stopped), RunFolder("toy", Rows(), root=tmp_path / "end") as run:
        ask_to_end()  # after the last checkpoint: it is done, and nothing else begins
    assert run.done


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_a_signal_that_somebody_handles_is_left_to_them_and_blocks_share_one():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with heeding() as stop:
            ask_to_end()
        assert heard == [1]
        assert not stop.asked
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with heeding() as outer, heeding() as inner:
            ask_to_end()
            assert inner is outer
            assert isinstance(inner, Stop)
            assert inner.asked
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_the_command_line_ends_with_143_and_the_same_command_goes_on(
    tmp_path, monkeypatch, runs
):
    command = ["train", "sft", "--profile", str(toy_profile(tmp_path))]
    log, rows = RunFolder.log, []

    def asks(self, kind, **metrics):
        log(self, kind, **metrics)
        rows.append(metrics["update"])
        if rows == [0, 1]:
            ask_to_end()

    monkeypatch.setattr(RunFolder, "log", asks)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 143
    cli.main(command)
    assert rows == list(range(len(rows)))  # no update was made again
    files = written(runs)
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "undisturbed"))
    cli.main(command)
    assert written(tmp_path / "undisturbed") == files


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
@pytest.mark.parametrize("step", ["expert-iteration", "orm"])
def test_a_round_that_is_longer_than_a_job_comes_to_its_end_in_several(
    step, tmp_path, monkeypatch, runs
):
    """A job is asked to end at the second question it samples, killed at the third."""
    plan = plan_of(step, toy_recipe(tmp_path))
    draw, drawn = sampler.draw_groups, []

    def in_a_job(asked, chosen, **options):
        for number, (i, group) in enumerate(draw(asked, chosen, **options), start=1):
            if asked.temperature:  # what is validated is greedy
                drawn.append((asked.seed, asked.prompts[i]))
                {2: ask_to_end, 3: killed}.get(number, int)()
            yield i, group

    def killed() -> None:
        raise KeyboardInterrupt

    jobs = 0
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "draw_groups", in_a_job)
        while not folder_of(plan).done and jobs < 12:
            jobs += 1
            with suppress(Stopped, KeyboardInterrupt):
                obtain(plan)
    assert len(drawn) == len(set(drawn))  # nothing was drawn twice
    assert jobs == len(drawn) // 2 + 1  # the last one only learns
    files = written(runs)
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "undisturbed"))
    obtain(plan)
    assert written(tmp_path / "undisturbed") == files


# Damage


def stopped_line(root: Path) -> Path:
    """A run of 9 rows that was killed after row 6, with checkpoints after 3 and 6."""

    def stop() -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "due", lambda run: len(run.metrics) % 3 == 0)
        counting(root, {7: stop}, save_every=0)
    (path,) = root.iterdir()
    return path


def flip(path: Path) -> None:
    """Change one bit: of a tensor's last number, where the file holds tensors."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("part", [*PARTS, HASHES])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_gone_on_from(
    part, damage, tmp_path
):
    path = stopped_line(tmp_path / "damaged")
    if (part, damage) == (HASHES, Path.unlink):
        return  # of a version that kept none
    damage(path / "checkpoints" / "000002" / part)
    rows = []
    note = {row: lambda row=row: rows.append(row) for row in range(9)}
    with pytest.warns(UserWarning, match=r"000002 is damaged .* before it, 000001"):
        counting(tmp_path / "damaged", note, save_every=1e9)
    assert rows == list(range(3, 9))
    counting(tmp_path / "undisturbed", {}, save_every=1e9)
    files = written(tmp_path / "damaged")
    assert files == written(tmp_path / "undisturbed")


def test_a_checkpoint_without_hashes_is_of_an_older_version_and_is_trusted(tmp_path):
    path = stopped_line(tmp_path)
    (path / "checkpoints" / "000002" / HASHES).unlink()
    with warnings.catch_warnings(action="error"):
        counting(tmp_path, {}, save_every=1e9)
    # The wrong version, for all: a bit that changed would not be noticed
    flip(path / "checkpoints" / "000003" / "weights.safetensors")
    with pytest.raises(RunFolderError, match="damaged"):
        RunFolder("count", Rows(), root=tmp_path).restore()
    (path / "checkpoints" / "000003" / HASHES).unlink()
    weights = RunFolder("count", Rows(), root=tmp_path).restore().tensors["a"]
    assert weights.tolist() != [9.0, 9.0]


def test_where_all_are_damaged_or_the_run_is_done_the_remedy_is_told(tmp_path):
    path = stopped_line(tmp_path / "all")
    for part in path.glob("checkpoints/*/state.json"):
        flip(part)
    with pytest.raises(RunFolderError, match=r"000001 is damaged|000002 is damaged"):
        counting(tmp_path / "all", {}, save_every=1e9)
    assert len(list((path / "checkpoints").iterdir())) == 2  # nothing is thrown away

    path = stopped_line(tmp_path / "done")
    counting(tmp_path / "done", {}, save_every=1e9)
    flip(path / "checkpoints" / "000003" / "weights.safetensors")
    run = RunFolder("count", Rows(), root=tmp_path / "done")
    with pytest.raises(RunFolderError, match=r"delete .*status.json to go on") as told:
        run.restore()
    assert "\n" not in str(told.value)
    (path / "status.json").unlink()
    with pytest.warns(UserWarning, match="000003 is damaged"):
        counting(tmp_path / "done", {}, save_every=1e9)
    assert run.restore().tensors["a"].tolist() == [9.0, 9.0]


# Other versions, changed data


def test_a_run_of_a_newer_version_is_refused_by_name(tmp_path):
    path = stopped_line(tmp_path)
    sessions = json.loads((path / "environment.json").read_text())
    for version in ("0.0.9", "0.1.0"):
        sessions[0]["packages"]["rlreason"] = version
        (path / "environment.json").write_text(json.dumps(sessions))
        counting(tmp_path, {}, save_every=1e9)
    for version in ("0.1.1", "0.10.0", "1.0.0rc1"):
        sessions[0]["packages"]["rlreason"] = version
        (path / "environment.json").write_text(json.dumps(sessions))
        with pytest.raises(RunFolderError, match=rf"{version}, .*update rlreason"):
            counting(tmp_path, {}, save_every=1e9)


def test_rows_of_a_newer_version_are_refused_by_name_and_records_made_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows([ROW], path)
    path.write_text(path.read_text().replace('{"arm"', '{"energy":3,"arm"', 1))
    with pytest.raises(RecordError, match=r"line 1: Row: energy: .*update this one"):
        read_rows(path)
    (tmp_path / "ch.json").write_text('{"notebook": "ch", "energy": 3}')
    assert read_record("ch", tmp_path) is None


def test_data_that_changes_while_a_run_is_made_is_noticed_before_it_is_done(
    tmp_path, monkeypatch
):
    recipe = toy_recipe(tmp_path)
    file = tmp_path / "toy" / "validation.jsonl"
    problems, log = file.read_text(), RunFolder.log

    def changes(self, kind, **metrics):
        log(self, kind, **metrics)
        file.write_text(problems[: problems.rindex("{")])

    plan = plan_of("sft", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", changes)
        with pytest.raises(SettingsError, match="the task no longer holds"):
            obtain(plan)
    assert not folder_of(plan).done
    with pytest.raises(SettingsError, match="the task no longer holds"):
        obtain(plan)
    assert plan_of("sft", recipe) != plan  # what it holds now makes another run
    file.write_text(problems)
    assert obtain(plan).run.done


# Notebooks that hang


def test_a_cell_that_does_not_end_is_given_up_and_told_with_its_number(tmp_path):
    hangs = "import threading\nprint('begun')\nthreading.Event().wait()"
    path = write_notebook(tmp_path, "ch", "# Prose", "1", hangs, "2")
    with pytest.raises(NotebookError) as caught:
        run_notebook(read_notebook(path), folder=tmp_path / "out", cell_limit=2)
    told = str(caught.value)
    assert "ch: code cell 2 did not end in 2 s; raise --cell-limit" in told
    assert "\n" not in told
    (kept,) = (tmp_path / "out").iterdir()
    assert str(kept) in told
    assert "begun" in kept.read_text()


def test_book_and_batch_hand_the_limit_on_and_commands_have_one(tmp_path):
    path, grid = write_notebook(tmp_path, "ch", "1"), tmp_path / "grid.yaml"
    grid.write_text("profile: smoke\nruns: [{notebooks: [ch.ipynb]}]")
    (item,) = read_grid(grid, tmp_path / "out", cell_limit=77)
    jobs = [item.job]
    there = SimpleNamespace(run=lambda given: jobs.extend(given) or {})
    shelf = Shelf("smoke", tmp_path / "run", 2, print, there, cell_limit=77)
    shelf.execute([read_notebook(path)], {"ch": "digest"})
    assert len(jobs) == 2
    for job in jobs:
        assert job.command[job.command.index("--cell-limit") + 1] == "77"
    for name in ("run", "book", "batch"):
        (limit,) = [p for p in cli.app.commands[name].params if p.name == "cell_limit"]
        assert limit.default == CELL_LIMIT >= 3600


# Clocks


class Clock:
    """Time as a system gives it whose clock was set back and that was started anew."""

    def __init__(self, wall: float, since_start: float) -> None:
        self.wall, self.since_start = wall, since_start

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        self.since_start += 1
        return self.since_start


def test_a_clock_that_is_set_back_changes_no_order_and_makes_no_negative_time(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "time", Clock(2e9, 9e6))
    path = stopped_line(tmp_path / "back")
    first, second = sorted((path / "checkpoints").iterdir())
    for file in [first, *first.iterdir()]:
        os.utime(file, (2e9, 2e9))
    # The wrong version: by the clock, the first is the newest
    assert max(first, second, key=lambda p: p.stat().st_mtime) == first
    monkeypatch.setattr(module, "time", Clock(1e9, 3.0))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    rows = []
    note = {row: lambda row=row: rows.append(row) for row in range(9)}
    counting(tmp_path / "back", note, save_every=1e9)
    assert rows == [6, 7, 8]
    run = RunFolder("count", Rows(), root=tmp_path / "back")
    seconds = [row["seconds"] for row in run.timing]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= run.status["seconds"] < 1000
    counting(tmp_path / "undisturbed", {}, save_every=1e9)
    assert written(tmp_path / "back") == written(tmp_path / "undisturbed")


# Out of memory


class Memory:
    """Stands before a function that holds no more than so many tokens at once."""

    def __init__(self, whole: Callable, size: Callable, room: int) -> None:
        self.whole, self.size, self.room = whole, size, room
        self.refused = 0

    def __call__(self, *args, **options):
        found = self.whole(*args, **options)  # what it has done is there already
        if self.size(*args) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found


def test_sampling_goes_on_in_half_of_the_memory_and_draws_the_same(monkeypatch, capsys):
    policy, options = toy_policy(), {"k": 6, "max_new_tokens": 24, "seed": 3}
    expected = sample(policy, TOY_PROBLEMS, **options)
    step = cohort_engine.next_logits
    memory = Memory(step, lambda model, cache, ids, *_: len(ids), 9)
    monkeypatch.setattr(cohort_engine, "next_logits", memory)
    found = sample(policy, TOY_PROBLEMS, byte_budget=2**19, **options)
    assert memory.refused > 0
    said = capsys.readouterr().err.count("out of memory: sampling goes on with")
    assert said == memory.refused
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert [(r.problem_id, r.sample) for r in found] == [
        (r.problem_id, r.sample) for r in expected
    ]
    memory.room = 0
    with pytest.raises(ValueError, match="does not hold one row"):
        sample(policy, TOY_PROBLEMS, **options)


def tokens_of(policy, batch) -> int:
    return sum(map(len, batch))


def test_an_update_goes_on_with_fewer_tokens_at_once_and_is_the_same(
    monkeypatch, capsys
):
    settings = FinetuneSettings(epochs=2, batch_size=6, lr=1e-3, micro_tokens=10_000)
    expected = sft(toy_policy(), TOY_PROBLEMS, settings)
    memory = Memory(finetune.nll, tokens_of, 80)
    monkeypatch.setattr(finetune, "nll", memory)
    found = sft(toy_policy(), TOY_PROBLEMS, settings)
    assert memory.refused > 0
    told = capsys.readouterr().err
    assert told.count("out of memory with 10,000 tokens at once: now") == 1
    one, other = weights(found), weights(expected)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)
    memory.room = 1
    with pytest.raises(ValueError, match="one example at once"):
        sft(toy_policy(), TOY_PROBLEMS, settings)


def test_gradients_of_an_attempt_that_failed_are_taken_back():
    """The wrong version: a backward pass that failed half way is counted twice."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def work(max_tokens: int) -> float:
        weight.sum().backward()
        if max_tokens > 3:
            raise torch.OutOfMemoryError
        return 0.5

    assert within_memory(work, 8, undo=optimizer.zero_grad) == (0.5, 2)
    assert weight.grad.item() == 1
    optimizer.zero_grad()
    within_memory(work, 8, undo=lambda: None)
    assert weight.grad.item() == 3


def test_ppo_goes_on_with_fewer_tokens_at_once(monkeypatch, capsys):
    settings = PpoSettings(
        phases=1,
        rollouts=8,
        n=2,
        max_new_tokens=24,
        batch_size=8,
        lora=None,
        micro_tokens=10_000,
        credit=BaselineSettings(kind="reinforce"),
    )
    expected, rows = MemoryRecorder(), MemoryRecorder()
    one = ppo_module.ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=expected)
    loss = ppo_module.policy_loss
    memory = Memory(loss, lambda logprobs, *_: logprobs.shape[0], 3)
    monkeypatch.setattr(ppo_module, "policy_loss", memory)
    other = ppo_module.ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=rows)
    assert memory.refused > 0
    assert capsys.readouterr().err.count("tokens at once: now") == 1
    norms = [each.rows[0]["grad_norm"] for each in (expected, rows)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    one, other = weights(one), weights(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)

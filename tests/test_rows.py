"""Raw rows: written whole, read strictly, of a plan, taken over from elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from toys import toy_profile, toy_recipe

from rlreason import cli
from rlreason.execution import executors, local, recording
from rlreason.execution.jobs import Outcome
from rlreason.experiments import rows as store
from rlreason.experiments.measures import Context, identity
from rlreason.experiments.rows import (
    RecordError,
    Row,
    Spent,
    read_rows,
    rows_path,
    write_rows,
)
from rlreason.policy.load import PolicyError
from rlreason.runs.environment import project_root
from rlreason.runs.folder import RunFolder
from rlreason.runs.profiles import load_recipe
from rlreason.tasks.loaders import DataError

ROW = Row(
    arm="ppo",
    size="nano",
    seed=0,
    measure="greedy",
    step="ppo",
    start="sft",
    plan="abc0",
    how="abc1",
    task="gsm-mini",
    split="test",
    spent=Spent(seconds=61.2, rollouts=4096, tokens=300_000),
    needed=Spent(seconds=9.0, rollouts=0, tokens=0),
    measuring=2.5,
    commit="536e28836b08fed9174a4f54496c9b8b286d1124",
    device="a CPU",
    date="2026-11-23",
    values={"right": "0110"},
)


def of(**fields) -> Row:
    return ROW.model_copy(update=fields)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows" / "rows.jsonl"


def test_the_lock_lies_beside_the_rows_whatever_folder_of_runs(path, monkeypatch):
    """It lay among the runs: recorders with different ones lost each other's rows."""
    held = []
    monkeypatch.setattr(
        store, "FileLock", lambda lock: held.append(lock) or contextlib.nullcontext()
    )
    for folder in ("one", "two"):
        monkeypatch.setenv("RLREASON_RUNS", str(path.parent / folder))
        write_rows([ROW], path)
    assert [lock.parent for lock in held] == [path.parent] * 2


def test_rows_are_read_as_written_one_a_line(path):
    assert read_rows(path) == []
    rows = [of(seed=1), ROW, of(measure="curve", values={"rows": [{"kl": 0.25}]})]
    write_rows(rows, path)
    assert read_rows(path) == sorted(rows, key=lambda row: row.key)
    assert len(path.read_bytes().split(b"\n")) == 4
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [".rows.lock", "rows.jsonl"]  # no draft
    assert rows_path("tiny").is_relative_to(project_root())


def test_a_row_takes_the_place_of_the_one_of_the_same_run_and_measure(path):
    write_rows([ROW, of(seed=1)], path)
    write_rows([of(plan="new")], path)
    assert [(row.seed, row.plan) for row in read_rows(path)] == [
        (0, "new"),
        (1, "abc0"),
    ]


def test_writers_at_once_lose_nothing(path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: write_rows([of(seed=seed)], path), range(24)))
    assert [row.seed for row in read_rows(path)] == [*range(24)]


@pytest.mark.parametrize(
    "values", [{"right": float("nan")}, {"right": {1}}], ids=["nan", "set"]
)
def test_what_cannot_be_written_leaves_the_old_file(path, values):
    write_rows([ROW], path)
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        write_rows([of(seed=1, values=values)], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"seed":1', '"seed":"1"', "line 2: Row: seed"),
        ('"seed":1', '"seed":-1', "line 2: Row: seed"),
        ('"arm":"ppo",', "", "line 1: Row: arm"),
        ('"how"', '"hew"', "line 1: Row: "),
        ('"rollouts":4096', '"rollouts":0.5', "line 1: Row: spent.rollouts"),
        ('{"right":"0110"}', '"0110"', "line 1: Row: values"),
        ('"0110"}}\n', '"0110"', "line 1: Row: Invalid JSON"),
        ("a CPU", "\udcff", "'utf-8' codec can't decode"),
        ('"seed":1', '"seed":0', "two rows of ppo nano 0 greedy"),
    ],
)
def test_a_damaged_file_is_one_error_that_says_where(old, new, fault, path):
    write_rows([ROW, of(seed=1)], path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(RecordError) as error:
        read_rows(path)
    assert str(path) in str(error.value)
    assert fault in str(error.value)
    assert str(error.value).endswith("`rlreason record` anew")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    with pytest.raises(RecordError):  # nor is it written over
        write_rows([ROW], path)


def test_what_runs_took_adds_up_and_is_unknown_where_a_part_is():
    a, b = (Spent(seconds=1.5, rollouts=2, tokens=t) for t in (10, None))
    assert a + a == Spent(seconds=3.0, rollouts=4, tokens=20)
    assert (a + b).tokens is None


# Of which plan


def test_a_row_is_current_as_long_as_the_recipe_makes_its_plan(tmp_path):
    recipe = toy_recipe(tmp_path, seeds=3)

    def now(measure="greedy", **changes):
        context = Context(recipe.changed(changes))
        return identity(
            context, context.subject("rloo", context.recipe.policy, 0), measure
        )

    # In how many pieces, where, and what others do is all the same
    for same in (
        {"sft.micro_tokens": 77},
        {"orm.lr": 0.5},
        {"seeds": 2},
        {"ppo.credit": {"kind": "grpo"}},  # which the arm changes anyway
        {"evaluation.validation_problems": 6},
    ):
        plan = now(**same)[-1] if "evaluation" in str(same) else now(**same)
        assert plan in (now(), now()[-1]), same
    for other in ({"ppo.lr": 2e-3}, {"sft.epochs": 9}, {"evaluation.problems": 2}):
        assert now(**other) != now(), other
    # The reward model that chooses matters where it does, and nowhere else
    assert now("samples", **{"orm.lr": 0.5}) != now("samples")
    assert now("samples")[-2] == now()[-2]


# The command


def test_rows_are_made_elsewhere_resumed_and_taken_over(
    tmp_path, monkeypatch, capsys, path
):
    results = tmp_path / "results"
    monkeypatch.setattr(store, "results_folder", lambda name: results)
    profile = toy_profile(tmp_path, seeds=1)

    def run(*arguments: str) -> list[str]:
        code = 0
        try:
            cli.main(["record", *arguments, "--profile", str(profile)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return [str(code), *out.splitlines(), *err.splitlines()[-1:]]

    out = ("--out", str(path.parent))
    alone = ("rloo", "--size", "base", "--seed", "0")
    said = run(*alone, "--here", *out)
    assert said[:3] == [
        "0",
        "rloo  0 of 2 rows recorded",
        "runs to train: 2; to measure: 1",
    ]
    rows = read_rows(path)
    assert [(row.arm, row.measure) for row in rows] == [
        ("rloo", "curve"),
        ("rloo", "greedy"),
    ]
    assert len(rows[1].values["right"]) == 6
    assert [r["phase"] for r in rows[0].values["rows"]] == [1, 2, 3, 4]
    assert rows[0].spent.rollouts == 32
    assert rows[0].spent.tokens > 32
    assert not results.exists()
    for wrong in (("--size", "bass"), ("--seed", "7")):
        code, said = run("rloo", *wrong, "--list", *out)
        assert code == "2"
        assert f"no run of {wrong[1]}; there are those of " in said
    # What is there is not made again; what lacks one row is
    assert run(*alone, "--here", *out)[1:3] == [
        "rloo  2 of 2 rows recorded",
        "runs to train: 0; to measure: 0",
    ]
    assert run(*alone, "--list", *out)[3].startswith("2 rows of 1 runs took 0.0 hours")
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    assert run(*alone, "--list", *out)[1] == "rloo  1 of 2 rows recorded"
    like = rows[0].model_copy(update={"arm": "grpo", "measuring": 7200.0})
    write_rows([like], path)  # the same measure of another arm says how long it takes
    said = run(*alone, "--list", *out)
    assert said[4].startswith("about 2.0 hours are left, of one core or GPU; 2.0 where")
    # Of several that are alike the mean, and the quickest
    write_rows([like.model_copy(update={"seed": 1, "measuring": 3600.0})], path)
    said = run(*alone, "--list", *out)
    assert said[4].startswith("about 1.5 hours are left, of one core or GPU; 1.0 where")
    assert "3.0 hours of measuring, of one core or GPU; 2.0 hours in all" in said[3]
    path.write_text(path.read_text().splitlines(keepends=True)[-1])
    run(*alone, "--here", *out)
    assert [row.values for row in read_rows(path)] == [row.values for row in rows]
    rows = read_rows(path)
    # Those of the plans here are taken over, others are refused by name
    write_rows([rows[0].model_copy(update={"seed": 7})], path)
    code, fault = run("--from", str(path.parent))
    assert code == "2"
    assert "1 of 3 rows" in fault
    assert "(rloo base 7 curve)" in fault
    assert read_rows(results / "rows.jsonl") == rows
    stale = [row.model_copy(update={"plan": "other"}) for row in rows]
    path.unlink()
    write_rows(stale, path)
    assert "2 of 2 rows" in run("--from", str(path.parent))[-1]
    assert run("--from", str(tmp_path))[0] == "2"
    assert "no experiment 'sftt' (did you mean 'sft'" in run("sftt")[-1]


@pytest.fixture
def record(tmp_path, monkeypatch, capsys):
    """``rlreason record`` of the toy: exit code, and the lines that it writes."""
    monkeypatch.setattr(store, "results_folder", lambda name: tmp_path / "results")
    profile = toy_profile(tmp_path, seeds=1)

    def run(*arguments: str) -> tuple[int, list[str]]:
        code = 0
        try:
            cli.main(["record", *arguments, "--profile", str(profile)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, [*out.splitlines(), *err.splitlines()]

    return run


def test_a_recording_in_stages_makes_the_rows_of_one_at_a_stretch(
    tmp_path, monkeypatch, record
):
    def rows_of(folder):
        return [(row.identity, row.values) for row in read_rows(folder / "rows.jsonl")]

    work = ("ppo", "--here", "--measure", "greedy", "--minutes", "60", "--out")
    assert record(*work, str(tmp_path / "whole"))[0] == 0
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / "other runs"))
    logged, log, stages = 0, RunFolder.log, 0

    def limited(self, kind, **metrics):  # time is up in the middle of every run
        nonlocal logged
        logged += 1
        if logged % 4 == 0:
            raise recording.TimeIsUpError
        log(self, kind, **metrics)

    monkeypatch.setattr(RunFolder, "log", limited)
    monkeypatch.setattr(RunFolder, "due", lambda self: True)
    while True:
        code, said = record(*work, str(tmp_path / "staged"))
        if code != 3:
            break
        stages += 1
        assert "stopped after 60 minutes; the same command goes on" in said
    assert code == 0
    assert stages > 1
    assert rows_of(tmp_path / "staged") == rows_of(tmp_path / "whole") != []


def test_a_measurement_that_time_is_too_short_for_is_not_begun(
    tmp_path, monkeypatch, record
):
    out = ("--measure", "greedy", "--here", "--out", str(tmp_path))
    assert record("sft", *out)[0] == 0
    file = tmp_path / "rows.jsonl"
    (row,) = read_rows(file)
    write_rows([row.model_copy(update={"measuring": 7200.0})], file)
    begun = []
    monkeypatch.setattr(recording, "measure", lambda *_: begun.append(1) or [])
    assert record("ppo", *out, "--minutes", "60")[0] == 3
    assert begun == []
    assert record("ppo", *out, "--minutes", "180")[0] == 0
    assert begun == [1]


def test_a_failure_leaves_the_others_their_turn(tmp_path, monkeypatch, record):
    whole = recording.measure

    def failing(context, subject, measures):
        if subject.arm.name == "sft":
            raise RuntimeError("out of memory")
        return whole(context, subject, measures)

    monkeypatch.setattr(recording, "measure", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        record("rloo", "--here", "--measure", "greedy", "--out", str(tmp_path))
    assert [row.arm for row in read_rows(tmp_path / "rows.jsonl")] == ["rloo"]


def test_time_that_is_up_ends_what_no_handler_of_errors_catches():
    before = signal.getsignal(signal.SIGALRM)

    def work():
        with recording.time_limit(0.001):
            while True:
                with contextlib.suppress(Exception):
                    sum(range(1000))

    with pytest.raises(recording.TimeIsUpError):
        work()
    assert signal.getsignal(signal.SIGALRM) == before
    with recording.time_limit(None) as until:
        assert until == float("inf")


def archive(path, members: dict[str, bytes], **changes):
    """A .tgz; ``changes`` are of each member's header."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in changes.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_rows_come_from_an_archive_and_nothing_else_does(tmp_path, record):
    assert (
        record("sft", "--measure", "greedy", "--here", "--out", str(tmp_path))[0] == 0
    )
    content = (tmp_path / "rows.jsonl").read_bytes()
    good = archive(tmp_path / "good.tgz", {"rows.jsonl": content, "log.txt": b"log"})
    assert record("--from", str(good))[0] == 0
    results = tmp_path / "results"
    assert (results / "rows.jsonl").read_bytes() == content
    names = sorted(path.name for path in results.iterdir())
    assert names == [".rows.lock", "rows.jsonl"]
    plan = read_rows(tmp_path / "rows.jsonl")[0].plan.encode()
    stale = {"rows.jsonl": content.replace(plan, b"0" * len(plan))}
    code, said = record("--from", str(archive(tmp_path / "stale.tgz", stale)))
    assert (code, "1 of 1 rows" in said[-1], "refused" in said[-1]) == (2, True, True)
    rows = {"rows.jsonl": content}
    (tmp_path / "cut.tgz").write_bytes(good.read_bytes()[:-30])
    for bad in (
        archive(tmp_path / "up.tgz", {"../rows.jsonl": content}),
        archive(tmp_path / "root.tgz", {"/tmp/rows.jsonl": content}),
        archive(tmp_path / "deep.tgz", {"results/rows.jsonl": content}),
        archive(
            tmp_path / "link.tgz", rows, type=tarfile.SYMTYPE, linkname="/etc/hosts"
        ),
        archive(tmp_path / "many.tgz", {f"{i}": b"" for i in range(9)} | rows),
        archive(tmp_path / "none.tgz", {"log.txt": b""}),
        tmp_path / "cut.tgz",
        tmp_path / "rows.jsonl",
    ):
        code, said = record("--from", str(bad))
        assert code == 2, bad
        assert bad.name in said[-1]
    assert (results / "rows.jsonl").read_bytes() == content


def test_a_job_a_run_and_one_a_measured_subject_each_after_what_it_needs(
    tmp_path, monkeypatch, path
):
    jobs, said = [], []

    class Executor(local.LocalExecutor):
        def run(self, given):
            jobs.extend(given)
            found = {job.name: Outcome(job.name, "done", "", 60.0) for job in given}
            for outcome in found.values():
                self.finished(outcome)
            return found

    monkeypatch.setattr(executors, "LocalExecutor", Executor)
    profile = toy_profile(tmp_path, seeds=2)
    recorder = recording.recorder(
        str(profile), out=path.parent, measures=["greedy", "samples"]
    )
    recorder.carry_out(recorder.work(["ppo"]), cores=2, report=said.append)
    names = [job.name for job in jobs]
    place = {name: i for i, name in enumerate(names)}
    assert len(place) == len(names)
    for job in jobs:
        assert all(place[need] < place[job.name] for need in job.needs)
    # SFT of both seeds, PPO of both, the reward models that choose, and 4 measured
    kinds = Counter(name.split("-")[0].rstrip("01") for name in names)
    trained = ("sft", "ppo", "orm", "expert", "sft base seed ", "ppo base seed ")
    assert kinds == dict.fromkeys(trained, 2)
    measuring = next(job for job in jobs if job.name == "ppo base seed 1")
    told = " ".join(measuring.command)
    assert "record ppo --size base --seed 1 --here" in told
    assert f"--profile {profile} --out {path.parent}" in told
    assert told.endswith("--measure greedy --measure samples")
    with pytest.raises(RecordError, match="no measure 'greed'; there are greedy, "):
        recording.recorder(str(profile), measures=["greed"])
    assert len(measuring.needs) == 4
    assert said[0].endswith(": done, 60 s; about 6 min left")  # 11 left on 2 cores
    assert said[-1].startswith("12/12 ")


def test_the_time_left_is_of_the_kinds_of_work_that_are_left():
    said = []
    kinds = {"a": "sft", "b": "sft", "c": "ppo"}
    progress = recording.Progress(kinds, 1, said.append)
    assert progress.time_left() is None
    progress.finished(Outcome("a", "done", "", 30.0))
    assert progress.time_left() == 60.0  # of PPO nothing is known but this
    progress.finished(Outcome("c", "done", "", 3600.0))
    assert progress.time_left() == 30.0
    progress.finished(Outcome("b", "failed", "", 1.0))
    assert progress.time_left() == 0.0


# What the repository holds


@pytest.mark.parametrize("profile", ["smoke", "tiny", "smol", "paper"])
def test_what_is_recorded_is_of_the_plans_as_they_are(profile):
    rows = read_rows(rows_path(profile))
    if not rows:
        return
    seeds = 1 + max(row.seed for row in rows)
    context = Context(load_recipe(profile, {"seeds": seeds}))
    paths = {
        s.rpartition("/")[2]: s for s in (*context.recipe.sizes, context.recipe.policy)
    }
    for row in rows:
        subject = context.subject(row.arm, paths[row.size], row.seed)
        try:
            found = identity(context, subject, row.measure)
        except (DataError, PolicyError):
            continue  # the base or the data are not here, so no plan has a name
        assert row.identity == found, row.key
    assert json.dumps([row.values for row in rows], allow_nan=False)

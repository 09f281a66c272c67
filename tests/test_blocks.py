"""Blocks: a sampling that is stopped goes on with what it lacks, and takes only that.

``test_weather`` has whole runs that are stopped in each of their samplings,
``test_parallel`` several processes, ``kills.py`` kills at each write.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run_folder import Clock
from test_weather import cut, flip
from tiny_models import PROBLEMS, tiny_policy

from rlreason.policy.forced import Forced
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import in_order, prompt_groups, prompt_of
from rlreason.runs import blocks
from rlreason.runs import folder as module
from rlreason.runs.folder import RunFolder, RunFolderError
from rlreason.settings import Settings

OPTIONS = {"k": [2, 1, 3, 2], "temperature": 0.9, "max_new_tokens": 8, "seed": 4}


class Sampled(Settings):
    """Settings of a run that samples."""

    rounds: int = 1


def sampling(root: Path, **options) -> RunFolder:
    return RunFolder("sampled", Sampled(), root=root, **{"save_every": 0} | options)


def sample_in(
    run: RunFolder,
    *,
    after: Callable[[int], None] = lambda count: None,
    policy: Policy | None = None,
    prompts: list | None = None,
    **changes,
) -> tuple[list[int], list[Rollout]]:
    """Which prompts are drawn, and all rollouts; ``after`` each that is drawn."""
    drawn = []

    def keeper(asked, draw, own):
        def noted(chosen):
            for i, group in draw(chosen):
                drawn.append(i)
                yield i, group
                after(len(drawn))

        return run.keep_groups(asked, noted, own)

    policy = policy or tiny_policy()
    prompts = prompts or [prompt_of(policy, problem) for problem in PROBLEMS]
    groups = prompt_groups(policy, prompts, keeper=keeper, **OPTIONS | changes)
    return drawn, in_order(groups)


def stop_after(groups: int) -> Callable[[int], None]:
    def stop(count: int) -> None:
        if count == groups:
            raise KeyboardInterrupt

    return stop


def stopped(root: Path, groups: int = 2, **given) -> list[Path]:
    """The blocks of a sampling that was stopped after so many groups."""
    with pytest.raises(KeyboardInterrupt), sampling(root) as run:
        sample_in(run, after=stop_after(groups), **given)
    return sorted(root.glob("*/rollouts/*/*.safetensors"))


def alike(one: list[Rollout], other: list[Rollout]) -> bool:
    """Whether they are the same, log-probabilities up to rounding."""
    return [replace(r, logprobs=()) for r in one] == [
        replace(r, logprobs=()) for r in other
    ] and all(
        a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_a_stopped_sampling_goes_on_with_what_it_lacks(groups, tmp_path):
    assert len(stopped(tmp_path, groups)) == groups
    with sampling(tmp_path / "undisturbed") as run:
        _, expected = sample_in(run)
    with sampling(tmp_path) as run:
        drawn, found = sample_in(run)
        assert len(drawn) == 4 - groups
        assert alike(found, expected)
        again, found = sample_in(run)  # all is kept, to the bit and with its text
        assert again == []
        assert alike(found, expected)


def changed_weights() -> Policy:
    policy = tiny_policy()
    with torch.no_grad():
        next(policy.model.parameters())[0, 0] += 1e-6
    return policy


POLICY = tiny_policy()
PROMPTS = [prompt_of(POLICY, problem) for problem in PROBLEMS]


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": changed_weights()},
        {"k": [2, 1, 3, 3]},
        {"temperature": 0.8},
        {"max_new_tokens": 7},
        {"seed": 5},
        {"forced": Forced.of(POLICY, 50, 8)},
        {"prompts": [replace(PROMPTS[0], stream="other"), *PROMPTS[1:]]},
        {"prompts": [replace(PROMPTS[0], stop="\n"), *PROMPTS[1:]]},
        {"prompts": PROMPTS[::-1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_was_drawn_otherwise_is_never_taken(changes, tmp_path):
    stopped(tmp_path, 3)
    with sampling(tmp_path) as run:
        drawn, _ = sample_in(run, **changes)
    assert sorted(drawn) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_block_is_told_and_drawn_again(damage, tmp_path):
    first, _ = stopped(tmp_path)
    damage(first)
    first.with_name("half.safetensors.partial").write_bytes(b"half")  # of a kill
    with sampling(tmp_path / "undisturbed") as run:
        _, expected = sample_in(run)
    with sampling(tmp_path) as run:
        with pytest.warns(UserWarning, match="is damaged: what it held is sampled"):
            drawn, found = sample_in(run)
        assert len(drawn) == 3
        assert alike(found, expected)


def test_what_is_kept_goes_when_a_checkpoint_holds_what_came_of_it(tmp_path):
    (block, _) = stopped(tmp_path)
    kept = block.parents[1]
    with sampling(tmp_path) as run:
        sample_in(run)
        assert kept.is_dir()
        run.save({"a": torch.ones(2)}, {})
        assert not kept.exists()
        kept.mkdir()  # a kill may come between the two
    assert run.done
    assert not kept.exists()


def test_what_is_over_soon_is_not_written_and_no_weights_are_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "weights_digest", None)
    with sampling(tmp_path, save_every=30) as run:
        sample_in(run)
        assert not (run.path / "rollouts").exists()


def test_blocks_come_by_the_clock_and_their_seconds_are_the_runs(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    def work(count: int) -> None:
        clock.work(20)  # a block is due at every second group
        if count == 3:
            raise KeyboardInterrupt

    write = module.save_file
    monkeypatch.setattr(
        module, "save_file", lambda *given: (clock.work(100), write(*given))
    )
    with suppress(KeyboardInterrupt), sampling(tmp_path, save_every=30) as run:
        # It took long, which puts off the next checkpoint, but no block
        run.save({"a": torch.ones(2)}, {})
        sample_in(run, after=work)
    assert len(list(run.path.glob("rollouts/*/*.safetensors"))) == 1
    with sampling(tmp_path, save_every=30) as run:
        drawn, _ = sample_in(run)
    assert len(drawn) == 1
    # The checkpoint's bookmark was taken before it was written
    assert run.status["seconds"] == 40


def test_a_block_that_cannot_be_written_is_told_with_its_remedy(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blocks, "write_atomically", full)
    run = sampling(tmp_path)
    with pytest.raises(RunFolderError, match=r"No space left.*make room"), run:
        sample_in(run)

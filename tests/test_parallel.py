"""Several processes compute what one does, each a share of it.

Two processes (gloo, on the CPU) run this file as a program, and the test beside them
does the same alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import side_by_side
from tiny_models import PROBLEMS, tiny_policy
from toys import (
    RECIPE,
    TOY_PROBLEMS,
    UPDATE,
    examples_of,
    toy_recipe,
    toy_solutions,
)

from rlreason.algorithms.batching import Example, response_token_count
from rlreason.algorithms.finetune import (
    FinetuneSettings,
    accumulate_gradients,
    finetune,
    new_adamw,
    nll,
)
from rlreason.algorithms.optim import load_optimizer_tensors, optimizer_tensors
from rlreason.algorithms.ppo import Learner, PpoSettings
from rlreason.algorithms.recorder import MemoryRecorder
from rlreason.algorithms.sharded import owners
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.lora import LoraSettings
from rlreason.policy.parallel import (
    connected,
    gathered,
    my_share,
    rank,
    ranks,
    sum_gradients,
    summed,
    wait,
)
from rlreason.policy.rollout import Prompt
from rlreason.policy.sampler import sample, sample_prompts
from rlreason.rewards.orm import OutcomeRewardModel, score_tokens
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs.folder import RunFolder
from rlreason.runs.plans import obtain, plan_of
from rlreason.runs.shared import SharedRun
from rlreason.settings import Settings

SHORT = FinetuneSettings(
    epochs=2, batch_size=7, lr=1e-4, lr_floor=1e-5, micro_tokens=60
)
PPO = PpoSettings(
    phases=2,
    rollouts=12,
    n=2,
    epochs=2,
    batch_size=5,  # the second process has fewer rows of it
    lr=1e-5,
    lr_floor=1e-5,
    max_new_tokens=24,
    micro_tokens=150,
    lora=None,
    credit={
        "kind": "gae",
        "value": {"kind": "branch", "layers": 1},
        "value_epochs": 1,
    },
)


def examples(policy: Policy) -> list[Example]:
    """Ten, of which a half of a batch has many more tokens than the other half."""
    found = [
        example
        for problem in TOY_PROBLEMS
        for example in examples_of(policy, problem, toy_solutions(2)[:2])
    ][:10]
    return [replace(e, tokens=e.tokens[: 3 + 4 * i]) for i, e in enumerate(found)]


def numbers(tensors) -> list[float]:
    return torch.cat([t.detach().float().flatten() for t in tensors]).tolist()


# --- What both do: each returns JSON --------------------------------------------------


def sampling() -> Any:
    policy = tiny_policy()
    rollouts = sample(policy, PROBLEMS[:3], k=3, max_new_tokens=12, seed=1)
    # Fewer prompts than processes
    rollouts += sample_prompts(
        policy, [Prompt("p", (1, 50, 60))], k=2, max_new_tokens=5
    )
    return [[r.problem_id, r.sample, r.tokens, r.text, r.logprobs] for r in rollouts]


def gradients() -> Any:
    policy = tiny_policy()
    loss = accumulate_gradients(policy, examples(policy)[:7], 60)
    sum_gradients(policy.model.parameters())
    return [loss, *numbers(w.grad for w in policy.model.parameters())]


def mean_of_means() -> Any:
    """Wrong: each process divides by its own tokens, and the mean is taken of that."""
    policy = tiny_policy()
    share = my_share(examples(policy)[:7])
    (nll(policy, share) / response_token_count(share)).backward()
    sum_gradients(policy.model.parameters())
    return numbers(w.grad / ranks() for w in policy.model.parameters())


def gradient_on_one_process() -> Any:
    """A weight without a gradient anywhere has none; one with it somewhere has it."""
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    if rank() == 0:
        weights[0].grad = torch.ones(3)
    sum_gradients(weights)
    return [None if w.grad is None else w.grad.tolist() for w in weights]


def fine_tuning(**changes: Any) -> Any:
    recorder = MemoryRecorder()
    settings = SHORT.model_copy(update=changes)
    policy = tiny_policy()
    policy = finetune(policy, examples(policy), settings, recorder)
    losses = [[row["loss"], row["grad_norm"]] for row in recorder.rows]
    return {
        "losses": losses,
        "weights": numbers(policy.model.state_dict().values()),
    }


def adapters() -> Any:
    return fine_tuning(lora=LoraSettings(rank=4, alpha=8.0))


def going_on() -> Any:
    """Two updates, the optimiser put aside and taken up by another, two more."""
    policy = tiny_policy()
    policy.model.bfloat16()
    batch, weights = examples(policy), list(policy.model.parameters())
    optimizer = new_adamw(weights, SHORT)
    own = sum(t.numel() for n, t in optimizer_tensors_of(optimizer).items())
    for part in (batch[:5], batch[5:], batch[:5], batch[5:]):
        accumulate_gradients(policy, part, 60)
        sum_gradients(weights)
        optimizer.step()
        optimizer.zero_grad()
        kept = optimizer_tensors(optimizer, "adamw")
        sent = {n: [str(t.dtype), t.tolist()] for n, t in kept.items()}
        tensors = {
            name: torch.tensor(
                values, dtype=getattr(torch, kind.removeprefix("torch."))
            )
            for name, (kind, values) in gathered(sent)[0].items()
        }
        optimizer = new_adamw(weights, SHORT)
        load_optimizer_tensors(optimizer, "adamw", tensors)
    return {
        "own": own,
        "names": sorted(tensors),
        "moments": numbers(tensors[n] for n in sorted(tensors)),
        "weights": numbers(weights),
    }


def optimizer_tensors_of(optimizer) -> dict[str, torch.Tensor]:
    """Of this process alone."""
    return optimizer_tensors(getattr(optimizer, "local", optimizer), "adamw")


def phases() -> Any:
    start = load_policy(Path(os.environ["TOY"]) / "base")
    learner = Learner(start, TOY_PROBLEMS, PPO)
    found = []
    for phase in range(2):
        rollouts = learner.ask(phase)
        experience = learner.score(rollouts)
        rewards = sparse_token_rewards(rollouts, TOY_PROBLEMS)
        experience = learner.credit(learner.pay(experience, rewards))
        metrics = learner.learn(experience, phase)
        found.append(
            {
                "tokens": [r.tokens for r in rollouts],
                "scores": numbers(
                    (experience.logprobs, experience.ref_logprobs, experience.values)
                ),
                "metrics": metrics,
            }
        )
    return found


def reward_model() -> Any:
    policy = tiny_policy()
    orm = OutcomeRewardModel(policy, likelihood=True)
    rollouts = sample(policy, PROBLEMS, k=2, max_new_tokens=8)
    return score_tokens(orm, rollouts + rollouts[:1], micro_tokens=40)


def runs() -> Any:
    """Whole runs on disk, from SFT on; expert iteration and RCRL learn adapters."""
    update = {**UPDATE, "lora": {"rank": 4, "alpha": 8.0}}
    recipe = toy_recipe(
        Path(os.environ["TOY"]),
        expert_iteration={"k": 2, "rounds": 2, "finetune": update},
        ppo={**RECIPE["ppo"], "phases": 2},
        rcrl={"samples": 3, "k": 2, "finetune": update},
    )
    found = {}
    for step in ("ppo", "rcrl"):
        trained = obtain(plan_of(step, recipe))
        state = trained.policy.model.state_dict()
        found[step] = [trained.run.metrics, numbers(state.values())]
    return found


class Sampled(Settings):
    """Settings of a run that samples."""

    seed: int = 1


def kept(root: Path | None = None) -> Any:
    """Sample, be stopped before a checkpoint, and again; what is drawn, and what comes.

    Args:
        root: Where others have done so before.
    """
    kind, policy, found = RunFolder if ranks() == 1 else SharedRun, tiny_policy(), []
    given = {"root": root or Path(os.environ["RLREASON_RUNS"]), "save_every": 0}
    for _ in range(2):
        drawn = []
        with suppress(KeyboardInterrupt), kind("sampled", Sampled(), **given) as run:

            def keeper(asked, draw, own, run=run, drawn=drawn):
                return run.keep_groups(
                    asked, lambda chosen: draw(drawn.extend(chosen) or chosen), own
                )

            rollouts = sample(
                policy, PROBLEMS, k=[2, 1, 3, 2], max_new_tokens=9, keeper=keeper
            )
            raise KeyboardInterrupt
        wait()
        found.append([sorted(drawn), [[r.problem_id, r.tokens] for r in rollouts]])
    return found


def sums() -> Any:
    return [
        summed({"a": 1.0, f"rank {rank()}": 2.0}),
        len(set(map(str, gathered(rank())))),
    ]


CASES: tuple[Callable[[], Any], ...] = (
    *(sampling, gradients, mean_of_means, gradient_on_one_process, fine_tuning),
    *(adapters, going_on, phases, reward_model, runs, kept, sums),
)


def work() -> dict[str, Any]:
    return json.loads(json.dumps({case.__name__: case() for case in CASES}))


# --- Beside each other ---------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY", str(toy))
        patch.setenv("RLREASON_RUNS", str(tmp_path_factory.mktemp("runs")))
        return work()


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> Path:
    """The folder of runs of the two processes."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def together(toy, shared_runs) -> list[dict[str, Any]]:
    """What each of two processes came to."""
    folders = {"TOY": str(toy), "RLREASON_RUNS": str(shared_runs)}
    return [json.loads(out) for out in side_by_side([__file__], **folders)]


def close(one: Any, other: Any, *, atol: float = 1e-6) -> bool:
    """Alike in all places, numbers up to ``atol`` of 1 or of their size."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            close(one[name], other[name], atol=atol) for name in one
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(
            close(a, b, atol=atol) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= atol * max(1.0, abs(one))
    return one == other


@pytest.mark.parametrize(
    "case", ["sampling", "gradients", "fine_tuning", "adapters", "reward_model"]
)
def test_two_processes_come_to_what_one_does(case, alone, together):
    for each in together:
        assert close(each[case], alone[case])


def test_phases_of_ppo_come_to_the_same(alone, together):
    for each in together:
        for phase, (found, expected) in enumerate(
            zip(each["phases"], alone["phases"], strict=True)
        ):
            assert found["tokens"] == expected["tokens"]
            # Adam makes full steps of gradients that are nothing but rounding
            atol = 1e-5 if phase else 1e-6
            assert close(found["metrics"], expected["metrics"], atol=atol)
            assert close(found["scores"], expected["scores"], atol=atol)


def test_sampled_tokens_are_equal(alone, together):
    for each in together:
        for one, other in zip(each["sampling"], alone["sampling"], strict=True):
            assert one[:4] == other[:4]


def test_wrong_a_mean_of_means_is_another_gradient(alone, together):
    right = torch.tensor(alone["gradients"][1:])
    wrong = torch.tensor(together[0]["mean_of_means"])
    assert (wrong - right).norm() > 0.05 * right.norm()
    found = torch.tensor(together[0]["gradients"][1:])
    assert (found - right).norm() < 1e-6 * right.norm()
    # Of one process the two are the same, so that no test on one would tell
    assert close(alone["mean_of_means"], alone["gradients"][1:])


def test_a_weight_that_learns_on_no_process_is_left_alone(together):
    for each in together:
        assert each["gradient_on_one_process"] == [[1.0, 1.0, 1.0], None]


def test_each_process_has_a_share_of_masters_and_moments(alone, together):
    found = [each["going_on"] for each in together]
    whole = alone["going_on"]["own"]
    assert sum(each["own"] for each in found) == whole
    assert max(each["own"] for each in found) < 0.6 * whole
    assert owners([4, 4, 9, 1], 2) == [1, 1, 0, 1]


def test_a_checkpoint_is_whole_and_is_taken_up_by_any_number_of_processes(
    alone, together
):
    one, (first, second) = alone["going_on"], [each["going_on"] for each in together]
    assert first["names"] == one["names"]
    assert first["weights"] == second["weights"]
    # Sums of gradients in half precision depend on their order
    for name in ("moments", "weights"):
        gap = torch.tensor(first[name]) - torch.tensor(one[name])
        assert gap.norm() < 0.01 * torch.tensor(one[name]).norm()


def test_one_folder_is_written_and_all_go_on_from_it(alone, together):
    assert together[0]["runs"] == together[1]["runs"]
    for step in ("ppo", "rcrl"):
        rows, weights = together[0]["runs"][step]
        expected, alone_weights = alone["runs"][step]
        assert close(rows, expected, atol=1e-3)
        assert close(weights, alone_weights, atol=1e-3)


def test_what_each_process_sampled_is_kept_and_found_by_any_number_of_them(
    alone, together, shared_runs
):
    first, second = zip(*(each["kept"] for each in together), strict=True)
    assert sorted(first[0][0] + first[1][0]) == [0, 1, 2, 3]
    assert first[0][0]
    assert first[1][0]
    expected = alone["kept"][0][1]
    for drawn, rollouts in second:
        assert drawn == []
        assert rollouts == expected
    for drawn, rollouts in json.loads(json.dumps(kept(shared_runs))):
        assert drawn == []
        assert rollouts == expected


def test_numbers_are_summed_by_name(together):
    for each in together:
        assert each["sums"] == [{"a": 2.0, "rank 0": 2.0, "rank 1": 2.0}, 2]


def test_alone_nothing_is_exchanged(alone):
    assert alone["sums"] == [{"a": 1.0, "rank 0": 2.0}, 1]
    assert my_share([1, 2, 3]) == [1, 2, 3]


if __name__ == "__main__":
    with connected():
        found = work()
    print(json.dumps(found))

"""The one graph of runs: a plan says all that decides a run, and can carry it out.

A ``Plan`` is made from a recipe and a seed by a step (``rlreason.runs.steps`` has one a
class), holds the plans of the runs that it starts from, and is a file: ``obtain(plan)``
gives what it trains, here, on another machine, or from the disk where it is done.

    plan = plan_of("ppo", recipe, seed=0)
    trained = obtain(plan)      # trains SFT first, if that is not done

A run folder is named after the plan's identity: what its data and base model hold, and
every setting that is neither placement nor neutral (see ``rlreason.settings``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, BeforeValidator, SerializeAsAny
from torch import Tensor

from rlreason.evaluation.evaluate import answer_groups, evaluate
from rlreason.policy.load import (
    Policy,
    lasting_name,
    load_policy,
    locate,
    positions_of,
)
from rlreason.policy.parallel import agreed, ranks
from rlreason.policy.sampler import prompt_of
from rlreason.policy.weights import load_model_tensors, model_tensors
from rlreason.rewards.orm import OutcomeRewardModel
from rlreason.runs.contents import Contents, policy_digest, reward_digest, task_digest
from rlreason.runs.folder import RunFolder, RunFolderError, read_settings
from rlreason.runs.recipes import Recipe, TaskSettings
from rlreason.runs.shared import SharedRun
from rlreason.settings import (
    Settings,
    SettingsError,
    load_settings,
    ours,
    settings_hash,
    unknown_key_message,
)
from rlreason.tasks import loaders
from rlreason.tasks.problem import Problem

# Settings that there are no more, at the value at which they did nothing: runs of
# before have them in their settings.json
GONE = {"max_per_question": None, "truncation_penalty": 0.0, "value_warmup": 0}


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Attributes:
        run: Its folder: plan, metrics, checkpoints.
    """

    run: RunFolder

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind: ``update``, ``round``, ``phase``, ``held_out``."""
        return [row for row in self.run.metrics if row["kind"] == kind]

    @property
    def seconds(self) -> float:
        """Seconds of work that the run took, over all its sessions."""
        return self.run.status["seconds"]


@dataclass(frozen=True)
class Trained(Finished):
    """A trained policy with what its run wrote down.

    Attributes:
        policy: The policy of the last update.
    """

    policy: Policy

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The metrics of each round of expert iteration."""
        return self.rows("round")

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The metrics of each phase of PPO."""
        return self.rows("phase")

    @property
    def updates(self) -> list[dict[str, Any]]:
        """The metrics of each optimiser step."""
        return self.rows("update")

    @property
    def throughput(self) -> list[dict[str, float]]:
        """Response tokens a second in each stage of each phase of PPO.

        ``sampling`` draws them, ``scoring`` reads each twice (policy, reference),
        ``learning`` once an epoch: all are of the same tokens.
        """
        pairs = zip(self.run.metrics, self.run.timing, strict=True)
        return [
            {
                stage: row["response_tokens"] / seconds
                for stage, seconds in timing.items()
                if stage in ("sampling", "scoring", "learning") and seconds
            }
            for row, timing in pairs
            if row["kind"] == "phase"
        ]


@dataclass(frozen=True)
class TrainedRewardModel(Finished):
    """A reward model with what its run wrote down.

    Attributes:
        orm: The model.
    """

    orm: OutcomeRewardModel

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The metrics on questions that were held out, one row an epoch."""
        return self.rows("held_out")


def _lasting_task(task: TaskSettings) -> TaskSettings:
    return task.model_copy(update={"name": loaders.lasting_name(task.name)})


class Plan(Settings):
    """All that decides a run. A subclass is a step: what it needs, makes, and reads.

    A job may begin in another folder, so a plan's paths are absolute, which is no part
    of its identity.

    To add one: a subclass with a ``step`` of its own, ``of`` and ``make``, given to
    ``register``.
    """

    step: str
    policy: Annotated[str, AfterValidator(lasting_name)] = ours(
        ..., "The base, as in load_policy.", placement=True
    )
    task: Annotated[TaskSettings, AfterValidator(_lasting_task)]
    contents: Contents

    about: ClassVar[str] = ""  # one line for the command line
    part: ClassVar[str] = ""  # the recipe's field that holds its algorithm's settings
    starts: ClassVar[bool] = True  # whether others start from its policy: base-shaped

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> Plan:
        """Take from a recipe what decides this step, and nothing else."""
        raise NotImplementedError

    @property
    def needs(self) -> dict[str, Plan]:
        """The runs that this one starts from, by the names under which it uses them."""
        return {}

    @property
    def reads(self) -> Contents:
        """Digests of what its inputs hold now."""
        return contents_of(self.policy, self.task)

    def check(self) -> None:
        """Refuse to be carried out with other inputs than those that it names.

        Raises:
            SettingsError: An input has changed since the plan was made.
        """
        now = self.reads
        for name in type(now).model_fields:
            if getattr(now, name) != getattr(self.contents, name):
                raise SettingsError(
                    f"the {name} no longer holds what this plan of {self.step} was "
                    f"made for; make the plan again, or bring the {name} back"
                )

    def make(self, base: Policy, needed: Mapping[str, Any], run: RunFolder) -> Any:
        """Train; ``needed`` holds what came of ``needs``. Returns a policy, or a model.

        The base is the caller's to change.
        """
        raise NotImplementedError

    def load(self, run: RunFolder) -> Finished:
        """Read what the run left."""
        return Trained(run, with_weights(load_policy(self.policy), weights_of(run)))

    @staticmethod
    def lines(row: Mapping[str, Any]) -> str:
        """A row of metrics for the terminal; empty for those that are not shown."""
        return ""


_STEPS: dict[str, type[Plan]] = {}


def register(cls: type[Plan]) -> type[Plan]:
    """Make a step known by its name: to plans in files, and to the command line."""
    _STEPS[cls.model_fields["step"].default] = cls
    return cls


def steps() -> dict[str, type[Plan]]:
    """All steps by name."""
    import rlreason.runs.steps  # noqa: F401  (registers the library's own)

    _load_those_of_packages()
    return dict(_STEPS)


@cache  # looking through all installed packages takes as long as a plan
def _load_those_of_packages() -> None:
    """A package's own, also in the processes that train seeds."""
    for module in entry_points(group="rlreason.steps"):
        module.load()


def step_named(name: str) -> type[Plan]:
    """The step of a name.

    Raises:
        SettingsError: There is none; says which there are.
    """
    known = steps()
    if name not in known:
        raise SettingsError(unknown_key_message("steps", [name], list(known)))
    return known[name]


def plan_of(step: str, recipe: Recipe, seed: int = 0) -> Plan:
    """The plan of a step for a recipe and a seed."""
    return step_named(step).of(recipe, seed)


def without_effect(
    names: Iterable[str],
    make: Callable[[Mapping[str, Any]], Recipe],
    choices: Iterable[Mapping[str, Any]],
) -> list[str]:
    """The changes of a recipe that change it, and no plan of these steps.

    Args:
        names: Of the steps.
        make: The recipe with changes, dotted path to value.
        choices: Changes that are made together; what matters in one of them does.
    """
    names = list(names)
    return idle_changes(lambda r: [plan_of(n, r) for n in names], make, choices)


def idle_changes(
    taken: Callable[[Recipe], Any],
    make: Callable[[Mapping[str, Any]], Recipe],
    choices: Iterable[Mapping[str, Any]],
) -> list[str]:
    """The changes of a recipe that change it, and nothing that is taken from it."""
    differs, matters = set(), set()
    for changes in choices:
        whole = make(changes)
        found = taken(whole)
        for path in changes.keys() - matters:
            try:
                rest = make({p: v for p, v in changes.items() if p != path})
                without = taken(rest)
            except Exception:  # of whichever step: nobody asked for it without
                matters.add(path)
                continue
            if rest != whole:
                differs.add(path)
            if without != found:
                matters.add(path)
    return sorted(differs - matters)


def check_inputs(recipe: Recipe) -> None:
    """Refuse a recipe whose base or problems are not to be had, before any work.

    Raises:
        PolicyError: The base's folder or file cannot be loaded.
        SettingsError: There is no such base.
        DataError: There are no such problems.
    """
    locate(recipe.policy)
    if policy_digest(recipe.policy).endswith("@unknown"):
        raise SettingsError(
            f"there is no policy {recipe.policy!r}: neither is it bundled or imported, "
            "nor a folder or file, nor to be had from the hub"
        )
    recipe.task.load("train", 1)


def read_plan(values: Any) -> Plan:
    """A plan from the values of its file.

    Raises:
        SettingsError: They are no plan.
    """
    if not isinstance(values, dict) or not isinstance(values.get("step"), str):
        raise SettingsError("a plan is a mapping with a step, as `--plan` writes it")
    return load_settings(step_named(values["step"]), _without_what_is_gone(values))


def _without_what_is_gone(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        name: _without_what_is_gone(value)
        for name, value in values.items()
        if name not in GONE or value != GONE[name]
    }


def read_plan_file(path: Path) -> Plan:
    """A plan from its file, e.g. the settings.json of a run folder.

    Raises:
        SettingsError: There is no such file, or it holds no plan.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path.absolute()} is no plan: {error}") from None
    return read_plan(values)


AnyPlan = Annotated[
    SerializeAsAny[Plan],
    BeforeValidator(lambda v: read_plan(v) if isinstance(v, dict) else v),
]
"""A plan within a plan, of whichever step."""


# --- Carrying out --------------------------------------------------------------------


def folder_of(plan: Plan) -> RunFolder:
    """The folder that holds a plan's run, or will."""
    kind = RunFolder if ranks() == 1 else SharedRun
    return kind(plan.step, plan)


def obtain(plan: Plan) -> Any:
    """What a plan trains: loaded where it is done, else trained, needs first.

    Returns:
        ``Trained``, or ``TrainedRewardModel`` of a reward model.

    Raises:
        SettingsError: The data or the base are no longer those that the plan is about.
    """
    run = folder_of(plan)
    needed = {}
    if not agreed(run.done):  # before its clock runs
        plan.check()
        needed = {name: obtain(each) for name, each in plan.needs.items()}
    with run:
        if not agreed(_finished(run)):
            plan.check()  # what it needed may have taken hours
            made = plan.make(load_policy(plan.policy), needed, run)
            plan.check()  # problems for validation are read again and again
            run.save(trained_tensors(made), {"finished": True})
            del made  # before what was saved is loaded
    needed.clear()
    _check_base(plan)
    return plan.load(run)


def contents_of(policy: str, task: TaskSettings, reward: str | None = None) -> Contents:
    """Digests of what a base, a task and a reward function of one's own hold now."""
    return Contents(
        policy=policy_digest(policy),
        task=task_digest(task.name) or task.name,
        reward=reward_digest(reward),
    )


def load_run(path: Path) -> Any:
    """What the run in a folder trained, wherever the folder lies.

    Raises:
        RunFolderError: It is no run folder, has not come to its end, or belongs to
            another version of the settings.
    """
    if read_settings(path) is None:
        raise RunFolderError(f"{path} is no run folder: it has no settings.json")
    plan = read_plan_file(path / "settings.json")
    run = RunFolder(plan.step, plan, root=path.resolve().parent)
    if run.path.name != path.resolve().name:
        raise RunFolderError(
            f"{path} is not named after its settings, {settings_hash(plan)}: it comes "
            "from another version of rlreason, or was changed by hand; train it again"
        )
    if not _finished(run):
        raise RunFolderError(
            f"{path} is not finished; run its `rlreason train` to the end"
        )
    _check_base(plan)
    return plan.load(run)


def _check_base(plan: Plan) -> None:
    """Trained weights stand in the base's shape and speak its tokenizer's language."""
    if policy_digest(plan.policy) != plan.contents.policy:
        raise SettingsError(
            f"{plan.step} was trained from another {plan.policy!r} than there is now: "
            "bring that policy back, or train again"
        )


def validate(
    plan: Plan,
    policy: Policy,
    *,
    problems: int | None,
    max_new_tokens: int,
    shots: int = 0,
) -> dict[str, Any]:
    """What is looked at in between: greedy accuracy on the validation split."""
    report = evaluate(
        policy,
        validation_problems(plan.task, problems, shots),
        k=0,
        max_new_tokens=max_new_tokens,
        shots=plan.task.shot_problems(shots),
        sampler=answer_groups,  # a policy on its way is not asked again
    )
    return {"validation_maj_1": report.maj_1.mean}


def validation_problems(
    task: TaskSettings, problems: int | None, shots: int
) -> list[Problem]:
    """What is asked in between; see ``not_shown``."""
    asked = task.load("validation", problems)
    return not_shown(asked, task.shot_problems(shots), "validation_problems")


def not_shown(
    problems: list[Problem], examples: Sequence[Problem], limit: str
) -> list[Problem]:
    """The problems whose solution does not stand in the prompt.

    Args:
        limit: The field of ``evaluation`` that says how many problems there are.

    Raises:
        SettingsError: There is none.
    """
    shown = {example.id for example in examples}
    left = [problem for problem in problems if problem.id not in shown]
    if not left:
        raise SettingsError(
            f"all {len(problems)} problems to judge by are among the {len(shown)} "
            f"solved examples of the prompt: raise evaluation.{limit}, or lower shots"
        )
    return left


def check_room(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    shots: Sequence[Problem] = (),
) -> None:
    """Refuse a problem that the model cannot read with its answer, before any work.

    Raises:
        SettingsError: There is one; names the longest.
    """
    room = positions_of(policy.model)
    if room is None:
        return
    lengths = {p.id: len(prompt_of(policy, p, shots).tokens) for p in problems}
    longest = max(lengths, key=lengths.__getitem__)
    if lengths[longest] + max_new_tokens > room:
        raise SettingsError(
            f"the problem {longest} has a prompt of {lengths[longest]} tokens, which "
            f"with max_new_tokens={max_new_tokens} are more than the {room} positions "
            "of the model: leave it out of the data, or lower max_new_tokens or shots"
        )


def _finished(run: RunFolder) -> bool:
    """Whether the weights are there; a kill may have come just before "done"."""
    if run.done:
        return True
    checkpoint = run.restore()
    return checkpoint is not None and "finished" in checkpoint.state


def trained_tensors(made: Policy | OutcomeRewardModel) -> dict[str, Tensor]:
    """The trained weights, and nothing else."""
    if isinstance(made, OutcomeRewardModel):
        return made.tensors()
    return model_tensors(made.model)


def weights_of(run: RunFolder) -> dict[str, Tensor]:
    """The last weights that a run kept."""
    checkpoint = run.restore()
    if checkpoint is None:
        raise RunFolderError(
            f"{run.path} has lost its weights; delete it to train it again"
        )
    return checkpoint.tensors


def with_weights(policy: Policy, tensors: dict[str, Tensor]) -> Policy:
    """Load trained weights, in float32 where they were saved so."""
    if any(tensor.dtype == torch.float32 for tensor in tensors.values()):
        policy.model.float()
    load_model_tensors(policy.model, tensors)
    return policy

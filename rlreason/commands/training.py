"""``rlreason train``, ``settings`` and ``evaluate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from rlreason.commands.options import (
    profile_option,
    recipe_of,
    seed_option,
    set_option,
    values_of,
)


class TrainGroup(click.Group):
    """The steps as commands, and any file of a plan."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The steps, and the pretraining of the bundled base."""
        from rlreason.runs.plans import steps

        return [*steps(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A step's command, made from the step; a plan's from its file."""
        from rlreason.runs.plans import steps

        if name.endswith(".json"):
            return click.Command("plan", callback=lambda: _train_plan(Path(name)))
        step = steps().get(name)
        if step is None:
            return super().get_command(ctx, name)

        @click.command(name, help=f"{step.about}\n\n{step.__doc__}")
        @profile_option
        @seed_option
        @set_option
        @click.option(
            "--start",
            metavar="START",
            help="sft, base or the folder of a run; the same as --set start.",
        )
        @click.option(
            "--plan",
            "only_plan",
            is_flag=True,
            help="Print the plan, which `rlreason train PLAN.json` carries out.",
        )
        def command(profile, seed, changes, start, only_plan) -> None:
            from rlreason.runs.plans import check_inputs, without_effect
            from rlreason.runs.profiles import load_recipe
            from rlreason.settings import canonical_json

            values = values_of(changes)
            if start is not None and values.setdefault("start", start) != start:
                raise click.UsageError(
                    f"--start {start} and --set start {values['start']} are two "
                    "starts: give one of them"
                )
            recipe = load_recipe(profile, values)
            check_inputs(recipe)
            plan = step.of(recipe, seed)
            for path in without_effect([name], partial(load_recipe, profile), [values]):
                click.echo(f"note: {path} changes nothing of {name}", err=True)
            if only_plan:
                click.echo(canonical_json(plan))
            else:
                _carry_out(plan)

        return command


@click.group(cls=TrainGroup)
def train() -> None:
    """Train a policy or a reward model into a run folder.

    A run is named after its settings and what its data and base hold. One that is done
    is not run twice, one that was killed goes on where it stopped. What a run starts
    from is trained first.

    \b
    rlreason train ppo --seed 1 --set ppo.credit "{'kind': 'rloo'}"
    rlreason train ppo --start base
    rlreason train ppo --set reward.kind dense
    rlreason train ppo --plan > plan.json; rlreason train plan.json

    On several GPUs, or processes of a CPU, each with a share of the work:

    \b
    torchrun --nproc_per_node 2 -m rlreason.cli train ppo
    """


def _train_plan(path: Path) -> None:
    from rlreason.runs.plans import read_plan_file

    _carry_out(read_plan_file(path))


def _carry_out(plan) -> None:
    from rlreason.policy.parallel import connected, rank
    from rlreason.runs.plans import folder_of, obtain

    with connected():
        there = folder_of(plan).done
        trained, first = obtain(plan), rank() == 0
    if first:
        for row in trained.run.metrics:
            if line := plan.lines(row):
                click.echo(line)
        when = " before: it was there already" if there else ""
        click.echo(f"{trained.run.path} took {trained.seconds:.0f} s{when}")


@train.command("nano")
@click.option(
    "--size",
    type=click.Choice(["nano", "nano-xs"]),
    default="nano",
    show_default=True,
    help="Which of the two bundled models.",
)
@seed_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the model. [default: the package's own copy is replaced]",
)
def train_nano_command(size: str, seed: int, output: Path | None) -> None:
    """Pretrain the bundled base on procedurally made text.

    Done once by the project; half an hour to an hour on a CPU core.
    """
    from rlreason.runs.pretrain_nano import train_nano

    click.echo(train_nano(size, seed=seed, folder=output))


@click.command("settings")
@click.argument("algorithm", required=False)
@profile_option
def settings_command(algorithm: str | None, profile: str) -> None:
    """Print every setting of a recipe, or of one ALGORITHM.

    With its type, default, what the profile says, meaning, and where the default comes
    from: the paper (read, at second hand or from memory: paper.yaml says which), its
    authors' earlier code (precursor), or this project (ours).
    """
    from rlreason.runs.describe import describe_settings

    click.echo(describe_settings(algorithm, recipe_of(profile, ())))


@click.command()
@click.argument("policy")
@profile_option
@seed_option
@set_option
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="validation",
    show_default=True,
    help="The test split is for reporting only.",
)
@click.option(
    "--prompted", is_flag=True, help="Put the recipe's solved examples first."
)
@click.option("--greedy", is_flag=True, help="maj@1 alone, without samples.")
@click.option(
    "--label",
    type=click.Choice(["[GOOD]", "[BAD]"]),
    metavar="LABEL",
    help="[GOOD] or [BAD] before every step, for return-conditioned policies.",
)
@click.option("--orm", help="Run folder of a reward model: adds rerank@k.")
def evaluate(
    policy: str,
    profile: str,
    seed: int,
    changes,
    split: str,
    prompted: bool,
    greedy: bool,
    label: str | None,
    orm: str | None,
) -> None:
    """Judge a policy by maj@1, maj@k and pass@k.

    POLICY is a run folder, nano, a folder, a hub name or a GGUF file. The task, the
    number of problems and K come from the profile's recipe. Answers are kept in run
    folders: the same evaluation is not sampled twice.
    """
    from rlreason.runs.evaluate import (
        differences_from_run,
        evaluate_recipe,
        idle_settings,
        knobs_in_words,
    )
    from rlreason.runs.profiles import load_recipe
    from rlreason.runs.steps import load_reward_model, load_trained

    if greedy and orm:
        raise click.UsageError("--orm chooses among samples, and --greedy draws none")
    make, values = partial(load_recipe, profile), values_of(changes)
    recipe = make(values)
    trained = load_trained(policy)
    for path in idle_settings(make, values, greedy=greedy, prompted=prompted):
        click.echo(f"note: {path} changes nothing of this evaluation", err=True)
    for line in differences_from_run(policy, recipe, prompted=prompted, label=label):
        click.echo(f"note: {line}", err=True)
    report = evaluate_recipe(
        recipe,
        trained,
        split=split,
        seed=seed,
        greedy_only=greedy,
        prompted=prompted,
        label=label,
        orm=load_reward_model(orm) if orm else None,
    )
    how = f", {recipe.shots}-shot" if prompted else ""
    how += f", {label} before each step" if label else ""
    task = " ".join([recipe.task.name, *knobs_in_words(recipe.task.knobs)])
    click.echo(f"{policy}: {task}, {split} split, seed {seed}{how}")
    click.echo(str(report))

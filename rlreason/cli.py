"""The command line: ``rlreason --help`` is its manual.

Commands import what they need when they are called, so that ``--help`` answers at
once. What whoever asked has to mend is told in one line, without a traceback, with exit
code 2; any other error is a fault of the program and keeps its traceback.

Relative paths mean one thing here and another in a notebook's kernel, which works in
the notebook's folder, so they are made absolute before anything is done.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from rlreason import __version__
from rlreason.runs.environment import PACKAGE

FOLDERS = ("RLREASON_RUNS", "RLREASON_DATA")


def _absolute(context: click.Context, option: click.Parameter, profile: str) -> str:
    """A profile that is a file, by its absolute path; a built-in one by its name."""
    return str(Path(profile).absolute()) if Path(profile).suffix else profile


profile_option = click.option(
    "--profile",
    default="tiny",
    show_default=True,
    callback=_absolute,
    metavar="PROFILE",
    help="smoke, tiny, smol, paper, or the path of a YAML file.",
)

count_option = partial(click.option, type=click.IntRange(min=1), show_default=True)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88}
)
@click.version_option(__version__, prog_name="rlreason")
def app() -> None:
    """Teach language models to reason with reinforcement learning.

    The notebooks of the book are the way in; these commands run them and what is under
    them without a browser.

    \b
    rlreason doctor                       what can this machine run?
    rlreason run notebooks/00_tour.ipynb  one notebook
    rlreason book                         all notebooks, and the HTML book
    rlreason train expert-iteration       one training run, into a run folder
    rlreason evaluate runs/sft-1f0c9a...  maj@1, maj@k, pass@k of what it trained
    rlreason record table-1               train, measure and record a table
    rlreason claims                       the paper's claims, by the records
    rlreason bench sample                 speed beside transformers, here and now

    A profile is a set of parameters: smoke (seconds, for tests), tiny (minutes on two
    CPU cores, the default), smol (one GPU), paper (several).

    \b
    RLREASON_DATA   folder with gsm8k/ and svamp/ in the formats of their release;
                    without it they come from the Hugging Face hub
    RLREASON_RUNS   folder for runs and executed notebooks, ./runs if not set

    Exit codes: 0 done, 1 a fault of the program, 2 something to mend, which is named,
    130 interrupted.
    """
    for name in FOLDERS:
        if folder := os.environ.get(name):
            os.environ[name] = str(Path(folder).absolute())


@app.command()
@click.argument("notebook", type=click.Path(path_type=Path))
@profile_option
@click.option(
    "-p",
    "--parameter",
    "given",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set a parameter; it wins over the profile's. May be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the executed notebook. [default: runs/notebooks/PROFILE]",
)
def run(
    notebook: Path,
    profile: str,
    given: tuple[tuple[str, str], ...],
    output: Path | None,
) -> None:
    """Execute one notebook and keep it with its outputs.

    Its parameters are those of its cell tagged "parameters". An unknown one is an
    error that lists them. The source notebook is never changed.

    \b
    rlreason run notebooks/00_tour.ipynb
    rlreason run notebooks/00_tour.ipynb --profile smoke -p n_problems 50
    """
    from rlreason.publishing.notebooks import (
        output_folder,
        parse_value,
        read_notebook,
        run_notebook,
    )

    folder = output or output_folder(profile)
    source = read_notebook(notebook)
    record = run_notebook(
        source,
        profile_name=profile,
        given={n: parse_value(v, source.parameters.get(n)) for n, v in given},
        folder=folder,
    )
    click.echo(f"{folder / notebook.name} took {record.seconds:.0f} s")


@app.command()
@profile_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Notebooks executed at a time. [default: one a core, or GPU]",
)
@click.option(
    "--force", is_flag=True, help="Execute, and train, also what has not changed."
)
def book(profile: str, jobs: int | None, force: bool) -> None:
    """Execute all notebooks and build the HTML book.

    Executes what has changed since the last time, a notebook a core, each after those
    that it needs, and builds book/_build/PROFILE/html with warnings as errors. Needs no
    network with the profiles smoke and tiny.
    """
    from rlreason.publishing.book import build_book

    built = build_book(profile, jobs=jobs, force=force, report=click.echo)
    width = max(len(record.notebook) for record in built.records)
    for record in built.records:
        fresh = "" if record.notebook in built.executed else "  (unchanged)"
        click.echo(f"{record.notebook:<{width}} {record.seconds:7.0f} s{fresh}")
    click.echo(built.index)


@app.command()
def doctor() -> None:
    """Say what this machine can run, and how to mend the rest.

    Exit code 0 when the profile tiny can run, 1 when it cannot.
    """
    from rlreason.bench.doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.mark} {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"  {'':<{width}}  -> {finding.remedy}")
    able = all(finding.ok or not finding.required for finding in findings)
    verdict = "can" if able else "cannot"
    click.echo(f"\nThis machine {verdict} run the profile tiny.")
    sys.exit(0 if able else 1)


seed_option = click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Of everything random.",
)
set_option = click.option(
    "--set",
    "changes",
    nargs=2,
    multiple=True,
    metavar="FIELD VALUE",
    help="Change the profile's recipe, e.g. --set expert_iteration.k 8. Repeatable; "
    "`rlreason settings` lists the fields.",
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
            from rlreason.settings import canonical_json

            plan = step.of(_recipe(profile, changes, start=start), seed)
            if only_plan:
                click.echo(canonical_json(plan))
            else:
                _carry_out(plan)

        return command


@app.group(cls=TrainGroup)
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
    """


def _train_plan(path: Path) -> None:
    from rlreason.runs.plans import read_plan_file

    _carry_out(read_plan_file(path))


def _carry_out(plan) -> None:
    from rlreason.runs.plans import obtain

    trained = obtain(plan)
    for row in trained.run.metrics:
        if line := plan.lines(row):
            click.echo(line)
    click.echo(f"{trained.run.path} took {trained.seconds:.0f} s")


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


@app.command("settings")
@click.argument("algorithm", required=False)
@profile_option
def settings_command(algorithm: str | None, profile: str) -> None:
    """Print every setting of a recipe, or of one ALGORITHM.

    With its type, default, what the profile says, meaning, and where the default comes
    from: the paper, its authors' earlier code (precursor), or this project (ours).
    """
    from rlreason.runs.describe import describe_settings

    click.echo(describe_settings(algorithm, _recipe(profile, ())))


@app.command()
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
    from rlreason.runs.evaluate import evaluate_recipe
    from rlreason.runs.steps import load_reward_model, load_trained

    if greedy and orm:
        raise click.UsageError("--orm chooses among samples, and --greedy draws none")
    recipe = _recipe(profile, changes)
    report = evaluate_recipe(
        recipe,
        load_trained(policy),
        split=split,
        seed=seed,
        greedy_only=greedy,
        prompted=prompted,
        label=label,
        orm=load_reward_model(orm) if orm else None,
    )
    click.echo(str(report))


class RecordCommand(click.Command):
    """Its help ends with the catalogue."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line a comparison, under those of the tables."""
        from rlreason.experiments.catalogue import CATALOGUE

        formatter.write("\n" + "\n".join(CATALOGUE.lines()) + "\n")


@app.command(cls=RecordCommand)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@profile_option
@click.option("--seeds", type=click.IntRange(min=1), help="[default: the profile's]")
@click.option("--list", "only_list", is_flag=True, help="Say what is done, and stop.")
@click.option("--jobs", type=click.IntRange(min=1), help="[default: one a core]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the rows. [default: book/results/PROFILE]",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Take over the rows of such a folder, and stop.",
)
@click.option(
    "--measure",
    "measures",
    multiple=True,
    metavar="MEASURE",
    help="Take this one alone, e.g. greedy, the cheapest. Repeatable.",
)
@click.option("--size", help="Of one base alone.")
@click.option("--seed", type=click.IntRange(min=0), help="Of one seed alone.")
@click.option("--here", is_flag=True, help="Train and measure in this process.")
def record(
    names, profile, seeds, only_list, jobs, out, source, measures, size, seed, here
):
    """Train all seeds, measure them on the test split, and record it.

    NAME is an experiment, or a table of them: see below. All by default. Of each run
    and measurement a row is written to rows.jsonl in book/results/PROFILE as it comes;
    what is recorded of the present recipe is not done again. Runs are trained and
    measured by one single-threaded process a core.

    On another machine, and back:

    \b
    rlreason record table-1 --out rows
    rlreason record --from rows
    """
    from rlreason.execution import recording
    from rlreason.publishing.front import draw_front

    recorder = recording.recorder(profile, seeds=seeds, out=out, measures=measures)
    if source is not None:
        click.echo(recorder.take_over(source))
        return
    work = recorder.work(names, size=size, seed=seed)
    for line in work.lines():
        click.echo(line)
    if only_list:
        return
    if here:
        recorder.carry_out_here(work, click.echo)
    else:
        recorder.carry_out(work, cores=jobs, report=click.echo)
    click.echo(f"{recorder.path} is up to date")
    if Path(profile).stem == "tiny" and out is None:
        click.echo(f"{draw_front(profile)} shows it")


@app.command()
@profile_option
def claims(profile: str) -> None:
    """Say what is recorded for and against the paper's claims.

    Each claim with how sure it is that the paper makes it, the effects with their 95%
    intervals, the verdict, and what it rests on. The verdict is computed: supported
    where all effects lie where the claim expects them, with their whole intervals,
    contradicted where one lies elsewhere with its whole interval.
    """
    from rlreason.experiments.claims import judge_claims
    from rlreason.experiments.records import load_records

    for judged in judge_claims(load_records(profile)):
        click.echo(f"{judged}\n")


@app.group()
def bench() -> None:
    """Measure speed here and now, beside transformers, in turns."""


@bench.command("sample")
@click.option(
    "--policy", help="As in load_policy. [default: nano after the SFT of tiny]"
)
@count_option("--questions", default=64, help="gsm-mini problems.")
@click.option(
    "--k",
    "samples",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8, 96),
    show_default=True,
    help="Samples a question. Repeatable.",
)
@count_option("--repeats", default=3, help="Turns that count.")
def bench_sample_command(
    policy: str | None, questions: int, samples: tuple[int, ...], repeats: int
) -> None:
    """Useful tokens a second, ours and transformers'."""
    from rlreason.bench.sample import (
        format_sample_benchmark,
        run_sample_benchmark,
    )

    rows = run_sample_benchmark(
        policy,
        questions=questions,
        samples=samples,
        repeats=repeats,
        report=lambda line: click.echo(line, err=True),
    )
    click.echo(format_sample_benchmark(rows))


@bench.command("train")
@click.option("--policy", default="nano", show_default=True, help="As in load_policy.")
@count_option("--problems", default=512, help="Examples an epoch.")
@count_option("--batch-size", default=32, help="Examples an update.")
@count_option("--repeats", default=5, help="Turns that count.")
def bench_train_command(
    policy: str, problems: int, batch_size: int, repeats: int
) -> None:
    """Tokens a second of fine-tuning, ours and Trainer's."""
    from rlreason.bench.train import bench_train

    row = bench_train(
        policy=policy, problems=problems, batch_size=batch_size, repeats=repeats
    )
    click.echo(
        f"rlreason {row['ours']:,.0f} and Trainer {row['trainer']:,.0f} tokens/s, "
        f"ratio {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}), "
        f"{row['threads']} threads"
    )


@bench.command("ppo")
@profile_option
@count_option("--phases", default=4, help="Phases that count.")
def bench_ppo_command(profile: str, phases: int) -> None:
    """Where the time of a phase of PPO goes.

    Seconds of sampling, scoring and learning; the tokens that had to go through the
    model, and those that did.
    """
    from rlreason.bench.ppo import bench_ppo, format_ppo_benchmark

    click.echo(format_ppo_benchmark(bench_ppo(profile=profile, phases=phases)))


@bench.command("base")
@click.option("--policy", default="nano", show_default=True, help="As in load_policy.")
@profile_option
@count_option("--problems", default=500, help="Of each kind, for greedy answers.")
@count_option("--sampled", default=100, help="Of the profile's, for K answers each.")
def bench_base_command(policy: str, profile: str, problems: int, sampled: int) -> None:
    """What a policy can do before it is trained.

    Equations, problems of one step, of two, and those of the profile, each asked with
    no, one and two solved examples: maj@1, and maj@K and pass@K of the profile's.
    """
    from rlreason.bench.base import bench_base, format_base_benchmark

    rows = bench_base(policy, profile=profile, problems=problems, sampled=sampled)
    click.echo(format_base_benchmark(rows))


@bench.command("tasks")
@count_option("--problems", default=20_000, help="A turn.")
@count_option("--repeats", default=5, help="Turns that count.")
def bench_tasks_command(problems: int, repeats: int) -> None:
    """Problems a second that gsm-mini makes on one core."""
    from rlreason.bench.tasks import bench_tasks

    rates = bench_tasks(problems=problems, repeats=repeats)
    for split, (middle, low, high) in rates.items():
        click.echo(f"{split}: {middle:,.0f} problems/s ({low:,.0f} to {high:,.0f})")


def _recipe(profile: str, changes, **fields):
    """The profile's recipe with the changes given on the command line."""
    from rlreason.publishing.notebooks import parse_value
    from rlreason.runs.profiles import load_recipe

    values = {name: parse_value(value, None) for name, value in changes}
    return load_recipe(profile, values, **fields)


INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT
# What the system refuses and whoever asked can mend; any other is a fault of ours
REFUSED = (
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
)
FULL = ("ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; tell what is to be mended in one line, without traceback.

    That is a wrong option, a ValueError that we raise (see ``_is_worded``), and what
    the system refuses. Any other exception is a fault of the program and goes on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with app.make_context("rlreason", given) as context:
            app.invoke(context)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ValueError as error:
        if not _is_worded(error):
            raise
        _tell_and_exit(error, 2)
    except KeyboardInterrupt:
        _tell_and_exit("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0)
        if not isinstance(error, REFUSED) and code not in FULL:
            raise
        where = f" {error.filename}" if error.filename else ""
        _tell_and_exit(
            f"the system refuses{where}: {error.strerror}; name another file or "
            "folder (RLREASON_RUNS is that of runs), or make room",
            2,
        )


def _is_worded(error: ValueError) -> bool:
    """Whether a ``raise`` in our source raised it: then it says what is to be mended.

    Any other comes out of Python or another package at a place where we expected none,
    e.g. of ``int("x")`` in a line of ours.
    """
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = PACKAGE in Path(place.filename).parents
    return ours and (place.line or "").startswith("raise ")


def _tell_and_exit(message: object, code: int) -> None:
    click.echo(f"rlreason: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""``rlreason record`` and ``rlreason claims``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rlreason.commands.options import (
    POSITIVE,
    executor_option,
    jobs_option,
    profile_option,
)
from rlreason.experiments.catalogue import CATALOGUE

TIME_IS_UP = 3  # the exit code of what its time limit stopped


@click.command(epilog="\b\n" + "\n".join(CATALOGUE.lines()))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@profile_option
@click.option("--seeds", type=click.IntRange(min=1), help="[default: the profile's]")
@click.option("--list", "only_list", is_flag=True, help="Say what is done, and stop.")
@executor_option
@jobs_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the rows. [default: book/results/PROFILE]",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, exists=True),
    help="Take over the rows of such a folder, or of a .tgz of it, and stop.",
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
@click.option(
    "--minutes",
    type=POSITIVE,
    help="Stop after so many, with exit code 3; the same command goes on from there.",
)
def record(
    names,
    profile,
    seeds,
    only_list,
    executor,
    jobs,
    out,
    source,
    measures,
    size,
    seed,
    here,
    minutes,
):
    """Train all seeds, measure them on the test split, and record it.

    NAME is an experiment, or a table of them: see below. All by default. Of each run
    and measurement a row is written to rows.jsonl in book/results/PROFILE as it comes;
    what is recorded of the present recipe is not done again. Runs are trained and
    measured by one single-threaded process a core.

    On another machine, and back:

    \b
    rlreason record table-1 --out rows --minutes 8
    rlreason record --from rows
    """
    from rlreason.execution import recording

    recorder = recording.recorder(profile, seeds=seeds, out=out, measures=measures)
    if source is not None:
        try:
            click.echo(recorder.take_over(source))
        finally:  # also where some are refused, the others are there
            _show(profile, out)
        return
    work = recorder.work(names, size=size, seed=seed)
    for line in work.lines():
        click.echo(line)
    if only_list:
        return
    try:
        with recording.time_limit(minutes) as until:
            if here:
                recorder.carry_out_here(work, click.echo, until=until)
            else:
                recorder.carry_out(
                    work, cores=jobs, report=click.echo, executor=executor
                )
    except recording.TimeIsUpError:
        click.echo(f"stopped after {minutes:g} minutes; the same command goes on")
        sys.exit(TIME_IS_UP)
    click.echo(f"{recorder.path} is up to date")
    _show(profile, out)


def _show(profile: str, out: Path | None) -> None:
    """Draw the README's picture anew, which is of the rows of profile tiny."""
    if Path(profile).stem == "tiny" and out is None:
        from rlreason.publishing.front import draw_front

        if picture := draw_front(profile):
            click.echo(f"{picture} shows it")


@click.command()
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

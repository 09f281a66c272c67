"""``rlreason batch``: a grid of notebooks or training runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rlreason.commands.options import (
    cell_limit_option,
    executor_option,
    jobs_option,
)


@click.command()
@click.argument("grid", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@executor_option
@jobs_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for notebooks, logs and status. [default: runs/batch/GRID]",
)
@cell_limit_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--retry-failed", is_flag=True, help="Run also what failed before.")
def batch(
    grid: Path,
    executor: str,
    jobs: int | None,
    output: Path | None,
    cell_limit: int,
    dry_run: bool,
    retry_failed: bool,
) -> None:
    """Run a grid of notebooks or training runs.

    GRID is a YAML file: notebooks or steps, times parameters, times seeds. The whole of
    it is checked before anything starts. What is done is not done again; a job that
    fails keeps only those from running that need it. The folder gets a log and the
    executed notebook of every job, status.json, and index.html, which shows them.

    \b
    rlreason batch grid.yaml --dry-run
    rlreason batch grid.yaml --executor slurm

    Exit code 0 when all that the grid names is there, 1 when a job failed or the folder
    could not be written.
    """
    from rlreason.execution.local import visible_gpus
    from rlreason.publishing.batch import claim, plan_lines, run_batch
    from rlreason.publishing.grid import read_grid
    from rlreason.runs.environment import cores, make_folder, runs_root

    own = runs_root() / "batch" / grid.stem
    given, output = output is not None, (output or own).absolute()
    items = read_grid(
        grid,
        output,
        cell_limit=cell_limit,
        note=lambda line: click.echo(f"note: {line}", err=True),
    )
    if dry_run:
        here = executor == "local"  # how large a cluster is, only it knows
        room = {"cores": jobs or cores(), "gpus": len(visible_gpus())} if here else {}
        for line in plan_lines(items, **room):
            click.echo(line)
        return
    if not given:
        claim(output, grid)
    outcomes, unwritten = run_batch(
        items,
        make_folder(output),
        executor=executor,
        cores=jobs,
        retry_failed=retry_failed,
        report=click.echo,
        terminal=sys.stdout if sys.stdout.isatty() else None,
    )
    failed = [outcome for outcome in outcomes.values() if not outcome.ok]
    for outcome in failed:
        click.echo(f"\n{outcome.name}: {outcome.message}", err=True)
    click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} jobs are done")
    click.echo(output / "index.html")
    if unwritten:
        click.echo(f"rlreason: {unwritten}", err=True)
    sys.exit(1 if failed or unwritten else 0)

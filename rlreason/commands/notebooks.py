"""``rlreason run`` and ``rlreason book``: notebooks, and the book made of them."""

from __future__ import annotations

from pathlib import Path

import click

from rlreason.commands.options import (
    cell_limit_option,
    executor_option,
    jobs_option,
    profile_option,
)


@click.command()
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
@cell_limit_option
def run(
    notebook: Path,
    profile: str,
    given: tuple[tuple[str, str], ...],
    output: Path | None,
    cell_limit: int,
) -> None:
    """Execute one notebook and keep it with its outputs.

    Its parameters are those of its cell tagged "parameters". An unknown one is an
    error that lists them. The source notebook is never changed.

    \b
    rlreason run notebooks/00_tour.ipynb
    rlreason run notebooks/00_tour.ipynb --profile smoke -p n_questions 6
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
        given={
            n: parse_value(v, source.parameters.get(n), source.kinds.get(n, ()))
            for n, v in given
        },
        folder=folder,
        cell_limit=cell_limit,
    )
    click.echo(f"{folder / notebook.name} took {record.seconds:.0f} s")


@click.command()
@profile_option
@executor_option
@jobs_option
@click.option(
    "--force", is_flag=True, help="Execute, and train, also what has not changed."
)
@cell_limit_option
def book(
    profile: str, executor: str, jobs: int | None, force: bool, cell_limit: int
) -> None:
    """Execute all notebooks and build the HTML book.

    Executes what has changed since the last time, a notebook a core, each after those
    that it needs, and builds book/_build/PROFILE/html with warnings as errors. Needs no
    network with the profiles smoke and tiny.
    """
    from rlreason.publishing.book import build_book

    built = build_book(
        profile,
        jobs=jobs,
        force=force,
        cell_limit=cell_limit,
        executor=executor,
        report=click.echo,
    )
    width = max(len(record.notebook) for record in built.records)
    for record in built.records:
        fresh = "" if record.notebook in built.executed else "  (unchanged)"
        click.echo(f"{record.notebook:<{width}} {record.seconds:7.0f} s{fresh}")
    click.echo(built.index)

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
from pathlib import Path

import click

from rlreason import __version__
from rlreason.commands.batch import batch
from rlreason.commands.bench import bench, doctor
from rlreason.commands.models import models
from rlreason.commands.notebooks import book, run
from rlreason.commands.plan import plan
from rlreason.commands.records import claims, record
from rlreason.commands.training import evaluate, settings_command, train
from rlreason.runs.environment import PACKAGE, folders


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
    rlreason models import NAME           bring a pretrained model here
    rlreason run notebooks/00_tour.ipynb  one notebook
    rlreason book                         all notebooks, and the HTML book
    rlreason batch grid.yaml              notebooks or runs x parameters x seeds
    rlreason plan paper --gpus 8          memory, tokens and hours, before it is run
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
    RLREASON_MODELS folder for imported models, ~/.cache/rlreason if not set

    Exit codes: 0 done, 1 a fault of the program (of batch: a job failed; of doctor:
    tiny cannot run), 2 something to mend, which is named, 3 stopped by its time limit,
    130 interrupted, 143 asked to end.
    """
    os.environ.update(folders())


COMMANDS = (
    *(run, book, batch, plan, doctor, models, train, settings_command),
    *(evaluate, record, claims, bench),
)
for _command in COMMANDS:
    app.add_command(_command)

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

"""What every chapter uses to speak: sentences with numbers, figures, tables, verdicts.

A chapter is read in JupyterLab, VS Code and Colab as well as in the built book, so it
says everything in what Jupyter itself renders. Numbers of a run stand in sentences by
way of :func:`say`, from a cell whose source is folded; a figure comes with its number,
its caption and a description by way of :func:`show`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display
from matplotlib.figure import Figure

from rlreason.evaluation.evaluate import Report, compare
from rlreason.evaluation.intervals import Interval, verdict

DOTS_PER_INCH = 200  # twice what a page shows, for screens with small dots


def say(text: str) -> None:
    """Show sentences, written in Markdown; for those that hold a number of the run."""
    # A paragraph's line that happens to begin with "1." would begin a list
    display(Markdown(re.sub(r"(?<=\S)\n(?=1[.)] )", " ", text.strip())))


def show(figure: Figure, caption: str, *, alt: str) -> None:
    """Show a figure with its caption below.

    Args:
        figure: One of ``rlreason.publishing.figures``.
        caption: Markdown that begins with the figure's number: ``Figure 5.2. ...``.
        alt: What the figure shows, in words, for readers who do not see it. It goes
            into the output's metadata, where nbconvert and the book look for it.

    Raises:
        ValueError: The caption has no number, or there is no description.
    """
    number, stop, text = caption.strip().partition(". ")
    if not number.startswith("Figure ") or not stop or not alt.strip():
        raise ValueError("a figure needs a caption `Figure 5.2. ...` and an alt text")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    display(
        {"image/png": b64encode(buffer.getvalue()).decode()},
        metadata={"image/png": {"alt": alt, "width": width, "height": height}},
        raw=True,
    )
    say(f"**{number}.** {text}")


def provenance(profile: str, seeds: int | Sequence[int], on: date | None = None) -> str:
    """Say where a figure's numbers come from, for its caption; ``on`` is today.

    >>> provenance("tiny", [0, 1, 2], date(2025, 1, 31))
    'Profile tiny, seeds 0, 1, 2; 31 January 2025.'
    """
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    on = on or date.today()
    return (
        f"Profile {Path(profile).stem}, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}; {on.day} {on:%B %Y}."
    )


def points(change: Interval) -> str:
    """Write a difference of shares with its interval, in points.

    >>> points(Interval(0.047, 0.007, 0.087, 300, "paired"))
    '+4.7 points (+0.7 to +8.7)'
    """
    mean, low, high = (100 * x for x in (change.mean, change.low, change.high))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | Sequence[str]
) -> Markdown:
    """Return a table, which a notebook shows where it is a cell's last line.

    Args:
        rows: Name of a column to value; one that is missing leaves its cell empty.
        columns: The names, in order, or name to format, e.g. ``".1%"``. Numbers
            stand at the right; an underscore of a name is shown as a space.
    """
    formats = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
    numeric = [
        all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        for name in formats
    ]

    def cell(row: Mapping[str, Any], name: str) -> str:
        return format(row[name], formats[name]) if name in row else ""

    lines = [
        [name.replace("_", " ") for name in formats],
        ["--:" if right else "---" for right in numeric],
        *([cell(row, name) for name in formats] for row in rows),
    ]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def before_after(reports: Mapping[str, Report]) -> dict[str, Interval]:
    """Show some policies' maj@1 on the same problems, each set against the first.

    Args:
        reports: Name of a policy to its report; what stood before comes first.

    Returns:
        Name to the difference from the first, paired by problem, for all the others.
    """
    (start, before), *others = reports.items()
    changes = {name: compare(before, report, "maj@1") for name, report in others}
    rows = [
        {"policy": name, "maj@1": str(report.maj_1)} for name, report in reports.items()
    ]
    against = f"against {start}"
    for row, change in zip(rows[1:], changes.values(), strict=True):
        row |= {against: points(change), "verdict": verdict(change)}
    display(table(rows, ("policy", "maj@1", against, "verdict")))
    return changes

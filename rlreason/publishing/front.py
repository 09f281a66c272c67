"""The main result in one picture, from the records: for the README and chapter 15."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from rlreason.experiments.records import Cell, Records, load_records
from rlreason.publishing import figures
from rlreason.runs.environment import project_root

PICTURE = "book/_static/first-results.svg"
# Arm of the catalogue, what it is called, and in whose colour
ENDS = (
    ("base", "prompted base", "base"),
    ("expert-iteration-base", "expert iteration, without SFT", "expert_iteration"),
    ("ppo-base", "PPO, without SFT", "ppo"),
    ("sft", "SFT", "sft"),
    ("expert-iteration", "expert iteration, from SFT", "expert_iteration"),
    ("ppo", "PPO, from SFT", "ppo"),
    ("rcrl", "return-conditioned RL", "rcrl"),
)


def plot_ends(records: Records) -> Figure | None:
    """Where each method ends: greedy accuracy; None where nothing is recorded."""
    found = {
        name: (value, figures.COLORS[color])
        for arm, name, color in ENDS
        if (value := records.value(Cell(arm))) is not None
    }
    if not found:
        return None
    return figures.plot_accuracies(
        {name: value for name, (value, _) in found.items()},
        {name: color for name, (_, color) in found.items()},
        x="maj@1 on test problems, 95% interval over seeds and problems",
    )


def draw_front(profile: str | Path) -> Path | None:
    """Draw the README's picture anew; None where nothing is recorded.

    Returns:
        Where it is.
    """
    figures.use_style()
    figure = plot_ends(load_records(profile))
    if figure is None:
        return None
    path = project_root() / PICTURE
    figure.savefig(path, metadata={"Date": None})  # the same rows are the same file
    return path

"""The main result in one picture, from the records: for the README and chapter 15."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from rlreason.experiments.records import Cell, Records, load_records
from rlreason.publishing import figures
from rlreason.runs.environment import project_root

PICTURE = "book/_static/first-results.svg"
# Arm of the catalogue, and what it is called
ENDS = {
    "base": "prompted base",
    "expert-iteration-base": "expert iteration without SFT",
    "expert-iteration-orm-base": "filtered expert iteration without SFT",
    "ppo-base": "PPO without SFT",
    "sft": "SFT",
    "expert-iteration": "expert iteration",
    "expert-iteration-orm": "filtered expert iteration",
    "ppo": "PPO",
    "ppo-network": "PPO with a value network",
    "rcrl": "return-conditioned RL",
}


def plot_ends(records: Records) -> Figure | None:
    """Where each method ends: greedy accuracy; None where nothing is recorded."""
    found = {
        arm: value for arm in ENDS if (value := records.value(Cell(arm))) is not None
    }
    if not found:
        return None
    return figures.plot_accuracies(
        {ENDS[arm]: value for arm, value in found.items()},
        {ENDS[arm]: figures.color_of(arm) for arm in found},
        x="maj@1 on test, 95% interval over seeds and problems",
    )


def draw_front(profile: str | Path) -> Path | None:
    """Draw the README's picture anew; None where nothing is recorded.

    Returns:
        Where it is.
    """
    figures.use_style()
    figure, path = plot_ends(load_records(profile)), project_root() / PICTURE
    if figure is None or not path.parent.is_dir():  # no checkout
        return None
    figure.savefig(path, metadata={"Date": None})  # the same rows are the same file
    return path

"""What is compared: the experiments of the book, as data.

An experiment is one entry, a ``Comparison``: what is trained, with what it is compared,
and how both are measured. ``rlreason record``, its help, the tables of the chapters and
the tests are made from the entries, so adding an experiment is adding one here.

There are no conditions and no expressions on purpose. What depends on the values of a
recipe is a function of the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this without waiting for torch
    from rlreason.runs.recipes import Recipe

Changes = Mapping[str, Any]
"""Path of a recipe's field to its value, e.g. ``{"ppo.credit": {"kind": "rloo"}}``."""


class CatalogueError(ValueError):
    """A name that the catalogue does not have."""


@dataclass(frozen=True)
class Variant:
    """A step of ``rlreason.runs.steps``, and what it changes in a profile's recipe.

    A nested value replaces the whole: a reward of another kind keeps no size.
    """

    name: str
    step: str
    changes: Changes | Callable[[Recipe], Changes] = field(default_factory=dict)

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the changes.

        Raises:
            ValueError: They cannot be made of this recipe.
        """
        changes = self.changes(recipe) if callable(self.changes) else self.changes
        return recipe.changed(changes)


@dataclass(frozen=True)
class Comparison:
    """An experiment.

    Attributes:
        name: As given to ``rlreason record`` and written into the records.
        text: What it is, in a few words.
        after: What is trained.
        measures: Names of ``rlreason.experiments.measures.MEASURES``.
        before: With what ``greedy`` compares it; None: with what it started from.
    """

    name: str
    text: str
    after: Variant
    measures: Sequence[str] = ("greedy",)
    before: Variant | None = None


@dataclass(frozen=True)
class Table:
    """Comparisons that the book shows together."""

    name: str
    title: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Figure:
    """What each phase of training reached, of several comparisons side by side.

    Attributes:
        lines: Comparison to what the figure calls it.
        columns: Of ``rlreason.experiments.records.TrainingRecord``.
    """

    name: str
    title: str
    lines: Mapping[str, str]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """All tables and figures. Every comparison stands in one table."""

    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """All comparisons by their name, in the order of the tables."""
        return {c.name: c for table in self.tables for c in table.comparisons}

    def find(self, names: Sequence[str] = ()) -> list[Comparison]:
        """Comparisons by their own names or by their table's; all where none is given.

        Raises:
            CatalogueError: There is no such name; says what is near, and what there is.
        """
        known = self.comparisons
        members = {table.name: table.comparisons for table in self.tables}
        members |= {name: (comparison,) for name, comparison in known.items()}
        for name in names:
            if name not in members:
                near = difflib.get_close_matches(name, members, n=1)
                meant = f" (did you mean {near[0]!r}?)" if near else ""
                raise CatalogueError(
                    f"no comparison {name!r}{meant}; there are {', '.join(known)}"
                )
        found = {c.name: c for name in names for c in members[name]}
        return [*(found or known).values()]

    def figure(self, name: str) -> Figure:
        """A figure by its name.

        Raises:
            CatalogueError: There is no such figure.
        """
        known = {figure.name: figure for figure in self.figures}
        if name not in known:
            raise CatalogueError(f"no figure {name!r}; there are {', '.join(known)}")
        return known[name]

    def lines(self) -> list[str]:
        """One line a table, and below it one a comparison."""
        width = max(map(len, self.comparisons))
        return [
            line
            for table in self.tables
            for line in (
                f"{table.name}: {table.title}",
                *(f"  {c.name:<{width}}  {c.text}" for c in table.comparisons),
            )
        ]


# --- How entries are made -------------------------------------------------------------

EXPERT_ITERATION = Variant("expert-iteration", "expert-iteration")
PPO = Variant("ppo", "ppo")
RCRL = Variant("rcrl", "rcrl")


def varied(
    of: Variant,
    name: str,
    text: str,
    changes: Any,
    measures: Sequence[str] = ("greedy",),
) -> Comparison:
    """An algorithm with something changed, compared with the same as it is."""
    return Comparison(name, text, Variant(name, of.step, changes), measures, before=of)


def baseline(kind: str, text: str) -> Comparison:
    """PPO with a baseline in place of the value function, compared with its start."""
    return Comparison(kind, text, Variant(kind, "ppo", {"ppo.credit": {"kind": kind}}))


def reward(kind: str, text: str) -> Comparison:
    """PPO with another reward; of a reward model, what it gives as well."""
    measures = ("greedy", "score", "auc") if "orm" in kind else ("greedy",)
    return varied(PPO, f"ppo-{kind}", text, {"reward": {"kind": kind}}, measures)


def curriculum(kind: str, text: str) -> Comparison:
    """PPO that asks other questions, or from elsewhere."""
    return varied(PPO, f"ppo-{kind}", text, {"ppo.curriculum": {"kind": kind}})


def relabelled(name: str, text: str, changes: Changes) -> Comparison:
    """Return-conditioned RL on other labels."""
    return varied(RCRL, name, text, changes, ("labels", "greedy"))


def best_half(recipe: Recipe) -> Changes:
    """Learn from half of the responses, in as many updates."""
    n, batch = recipe.ppo.n, recipe.ppo.batch_size
    if n % 2 or batch % 2:
        raise CatalogueError(
            f"ppo-best-half halves ppo.n={n} and ppo.batch_size={batch}: make them even"
        )
    return {"ppo.keep": n // 2, "ppo.batch_size": batch // 2}


def weak_reward_model(recipe: Recipe) -> Changes:
    """A head alone, which learns slowly, from samples of SFT; and no KL penalty."""
    return {
        "reward": {"kind": "sparse-orm"},
        "orm_samples": "sft",
        "orm.likelihood": False,
        "orm.epochs": 4,
        "orm.lr": recipe.sft.lr,
        "orm.lr_floor": recipe.sft.lr_floor,
        "orm.head_lr_scale": 10.0,
        "ppo.kl.coef": 0.0,
        "ppo.kl.target": None,
    }


# --- The entries ----------------------------------------------------------------------

FILTERING = (
    Comparison("expert-iteration", "keep what is right, learn it", EXPERT_ITERATION),
    varied(
        EXPERT_ITERATION,
        "expert-iteration-orm",
        "keep of it what the reward model believes",
        {"expert_iteration.orm_threshold": 0.5},
    ),
)
CREDIT = (
    Comparison("ppo", "advantages from a value function", PPO),
    baseline("reinforce", "the mean of the batch as the baseline"),
    baseline("rloo", "the mean of the question's other responses"),
    baseline("grpo", "the question's mean and standard deviation"),
)
REWARDS = (
    reward("dense", "for each step that the reference has too"),
    reward("shaped", "the same as a potential, which is taken back"),
)
LEARNED_REWARDS = (
    reward("sparse-orm", "the reward model's score at the end"),
    reward("dense-orm", "the reward model's score at each step"),
    varied(
        PPO,
        "ppo-weak-orm",
        "the score of one that knows little, without a KL penalty",
        weak_reward_model,
        ("greedy", "score", "auc"),
    ),
)
EXPLORATION = (
    curriculum("backtracking", "start inside reference solutions"),
    curriculum("replay", "ask again what had large advantages"),
    varied(PPO, "ppo-best-half", "learn from the better half", best_half),
)
LABELS = (
    Comparison("rcrl", "labels from rollouts", RCRL, ("labels",)),
    relabelled("rcrl-orm", "labels from the reward model", {"rcrl_labels": "orm"}),
    relabelled("rcrl-10", "10 right to a wrong one", {"rcrl.positive_ratio": 10.0}),
    relabelled("rcrl-100", "100 right to a wrong one", {"rcrl.positive_ratio": 100.0}),
)
RERANKING = (
    Comparison(
        "orm", "the outcome reward model", Variant("orm", "orm"), ("reranking", "auc")
    ),
)

CATALOGUE = Catalogue(
    tables=(
        Table("filtering", "expert iteration, from SFT", FILTERING),
        Table("credit", "PPO and its baselines, from SFT", CREDIT),
        Table("rewards", "PPO with rewards for steps", REWARDS),
        Table("learned-rewards", "PPO for a reward model", LEARNED_REWARDS),
        Table("exploration", "PPO that asks or keeps something else", EXPLORATION),
        Table("labels", "return-conditioned RL, by how steps are labelled", LABELS),
        Table("reranking", "choosing among samples of SFT", RERANKING),
    ),
    figures=(
        Figure(
            "over-optimisation",
            "what PPO earns from a reward model, and how often it is right",
            {
                "ppo-sparse-orm": "this page's reward model, with KL",
                "ppo-weak-orm": "a head alone, no KL",
            },
            ("reward", "accuracy"),
        ),
    ),
)

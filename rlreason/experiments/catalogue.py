"""What is compared: the paper's tables and the experiments of the book, as data.

An experiment is one entry, an ``Arm``: what is trained, what is measured of it, and
with which other arm it is compared. A ``Table`` holds arms by their names, so that a
run that stands in several is trained and measured once. ``rlreason record``, its help,
the pages of tables and the tests are made from the entries, so adding an experiment is
adding one here.

There are no conditions and no expressions on purpose. What depends on the values of a
recipe is a function of the recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this without waiting for torch
    from rlreason.runs.recipes import Recipe

Changes = Mapping[str, Any] | Callable[["Recipe"], Mapping[str, Any]]
"""Path of a recipe's field to its value, e.g. ``{"ppo.credit": {"kind": "rloo"}}``."""

BASE = "base"  # the step of arms that train nothing: the prompted base
GREEDY = ("greedy", "curve")
ALL = ("greedy", "samples", "curve")
MANY = (*ALL, "solutions")


class CatalogueError(ValueError):
    """A name that the catalogue does not have, or a recipe that an arm cannot use."""


@dataclass(frozen=True)
class Arm:
    """An experiment: a step, and what it changes in a profile's recipe.

    Attributes:
        name: As given to ``rlreason record`` and written into the rows.
        text: What it is, in a few words.
        step: Of ``rlreason.runs.steps``, or ``BASE``.
        changes: A nested value replaces the whole: a reward of another kind keeps no
            size.
        start: The arm from which its training begins; empty for those that begin from
            the base with solutions.
        against: The arm it is compared with; ``start`` where empty.
        measures: Names of ``rlreason.experiments.measures.MEASURES``.
    """

    name: str
    text: str
    step: str
    changes: Changes = field(default_factory=dict)
    start: str = "sft"
    against: str = ""
    measures: tuple[str, ...] = GREEDY

    @property
    def called(self) -> str:
        """The method by name, where it is one of the paper's, else what it is."""
        return METHODS.get(re.sub("-base$|-shifted$", "", self.name), self.text)

    @property
    def compared(self) -> str:
        """The arm it is compared with; empty where there is none."""
        return self.against or self.start

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the changes.

        Raises:
            ValueError: They cannot be made of this recipe.
        """
        changes = self.changes(recipe) if callable(self.changes) else self.changes
        return recipe.changed(changes)


@dataclass(frozen=True)
class Table:
    """Arms that the book shows together.

    Attributes:
        arms: Names, in the order of the rows.
        metrics: Columns; K is the number of samples that was recorded.
        sizes: Whether every base of the profile is trained, or the main one alone.
        seeds: How many of the profile's are enough; None: all are trained.
        reported: Number of the paper's table; empty where it has none.
        methods: What the paper's table calls the arms.
    """

    name: str
    title: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...] = ("maj@1",)
    sizes: bool = False
    seeds: int | None = None
    reported: str = ""
    methods: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """All arms, and the tables that show them."""

    entries: tuple[Arm, ...]
    tables: tuple[Table, ...]

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by their name."""
        return {arm.name: arm for arm in self.entries}

    def find(self, names: Sequence[str] = ()) -> list[Arm]:
        """Arms by their own names or by their table's; all where none is given.

        Raises:
            CatalogueError: There is no such name; says what is near, and what there is.
        """
        known = self.arms
        members = {name: (name,) for name in known}
        members |= {table.name: table.arms for table in self.tables}
        for name in names:
            if name not in members:
                near = difflib.get_close_matches(name, members, n=1)
                meant = f" (did you mean {near[0]!r}?)" if near else ""
                raise CatalogueError(
                    f"no experiment {name!r}{meant}; there are {', '.join(members)}"
                )
        found = dict.fromkeys(arm for name in names for arm in members[name])
        return [known[name] for name in found or known]

    def table(self, name: str) -> Table:
        """A table by its name.

        Raises:
            CatalogueError: There is no such table.
        """
        known = {table.name: table for table in self.tables}
        if name not in known:
            raise CatalogueError(f"no table {name!r}; there are {', '.join(known)}")
        return known[name]

    def has_sizes(self, arm: str) -> bool:
        """Whether an arm is trained from every base of the profile."""
        return any(arm in table.arms for table in self.tables if table.sizes)

    def seeds(self, arm: str, most: int) -> int:
        """How many of a profile's seeds an arm is trained with.

        As many as the table asks for that asks for most; outside of tables all.
        """
        asked = [table.seeds or most for table in self.tables if arm in table.arms]
        return min(most, max(asked, default=most))

    def lines(self) -> list[str]:
        """One line a table, and below it one an arm."""
        known, width = self.arms, max(map(len, self.arms))
        return [
            line
            for table in self.tables
            for line in (
                f"{table.name}: {table.title}",
                *(f"  {name:<{width}}  {known[name].text}" for name in table.arms),
            )
        ]


# --- How entries are made -------------------------------------------------------------


def ppo(name: str, text: str, changes: Changes, **more: Any) -> Arm:
    """PPO with something changed, compared with the same as it is."""
    return Arm(name, text, "ppo", changes, **{"against": "ppo"} | more)


def baseline(kind: str, text: str) -> Arm:
    """PPO with a baseline in place of the value function, compared with its start."""
    return Arm(kind, text, "ppo", {"ppo.credit": {"kind": kind}})


def reward(kind: str, text: str, measures: tuple[str, ...] = GREEDY) -> Arm:
    """PPO with another reward; of a reward model, what it gives as well."""
    learned = ("earned", "auc") if "orm" in kind else ()
    changes = {"reward": {"kind": kind}}
    return ppo(f"ppo-{kind}", text, changes, measures=(*measures, *learned))


def curriculum(kind: str, text: str) -> Arm:
    """PPO that asks other questions, or from elsewhere."""
    return ppo(f"ppo-{kind}", text, {"ppo.curriculum": {"kind": kind}})


def relabelled(name: str, text: str, changes: Changes, more: tuple = ()) -> Arm:
    """Return-conditioned RL on other labels."""
    measures = ("labels", *GREEDY, *more)
    return Arm(name, text, "rcrl", changes, against="rcrl", measures=measures)


def without_sft(arm: Arm) -> Arm:
    """The same from the prompted base."""
    measures = tuple(m for m in arm.measures if m in ALL)
    name = f"{arm.name}-base"
    text = f"{arm.text}, from the base"
    changes = together(arm.changes, {"start": "base"})
    return Arm(name, text, arm.step, changes, start="base", measures=measures)


def shifted(arm: Arm) -> Arm:
    """An arm without SFT, on the shifted task."""
    name = f"{arm.name.removesuffix('-base')}-shifted"
    changes = together(arm.changes, on_the_shifted_task)
    start = arm.start and "base-shifted"
    name = "base-shifted" if arm.step == BASE else name
    text = f"{arm.text}, shifted task"
    return replace(arm, name=name, text=text, changes=changes, start=start)


def together(one: Changes, other: Changes) -> Changes:
    """Both changes; the other one's where they are of the same field."""

    def changes(recipe: Recipe) -> Mapping[str, Any]:
        each = [c(recipe) if callable(c) else c for c in (one, other)]
        return {**each[0], **each[1]}

    return changes


def on_the_shifted_task(recipe: Recipe) -> Mapping[str, Any]:
    """SVAMP in place of GSM8K, svamp-mini in place of gsm-mini."""
    twins = {"gsm-mini": "svamp-mini", "gsm8k": "svamp"}
    if recipe.task.name not in twins:
        raise CatalogueError(
            f"the task {recipe.task.name} has no shifted variant; {', '.join(twins)} do"
        )
    return {"task.name": twins[recipe.task.name]}


def best_half(recipe: Recipe) -> Mapping[str, Any]:
    """Learn from half of the responses, in as many updates."""
    n, batch = recipe.ppo.n, recipe.ppo.batch_size
    if n % 2 or batch % 2:
        raise CatalogueError(
            f"ppo-best-half halves ppo.n={n} and ppo.batch_size={batch}: make them even"
        )
    return {"ppo.keep": n // 2, "ppo.batch_size": batch // 2}


def two_epochs(recipe: Recipe) -> Mapping[str, Any]:
    """More updates, which the clip holds together, from more questions.

    The rate ends at half, so that the last phases still have something to clip.
    """
    changes = {"ppo.n": 2, "ppo.epochs": 2, "ppo.clip": 0.1}
    return {**changes, "ppo.lr_floor": recipe.ppo.lr / 2}


def weak_reward_model(recipe: Recipe) -> Mapping[str, Any]:
    """A head alone, which learns slowly, from samples of SFT; and no KL penalty."""
    return {
        "reward": {"kind": "sparse-orm"},
        "orm_samples": "sft",
        "orm.likelihood": False,
        "orm.epochs": 4,
        "orm.lr": recipe.sft.lr,
        "orm.lr_floor": recipe.sft.lr_floor,
        "orm.head_lr_scale": 10.0,
        **NO_KL,
    }


NO_KL = {"ppo.kl.coef": 0.0, "ppo.kl.target": None}
# A network beside the policy, passes of its own, and its target what was paid
OWN_VALUE = {
    "ppo.credit": {
        "kind": "gae",
        "lam": 0.99,
        "value": {"kind": "network", "layers": 2, "detach": True},
        "value_clip": None,
        "value_lr_scale": 3.0,
        "value_epochs": 2,
        "value_lam": 1.0,
    },
}
PASS_AT_4 = {"ppo.credit": {"kind": "rloo", "k": 4}, "ppo.n": 8}
# Of the appendix: one round, one sample, and labels of whole solutions
MINIMAL = {
    "start": "base",
    "expert_iteration.k": 1,
    "first_k_from_base": None,
    "rounds_from_base": 1,
}


def from_minimal(ratio: float) -> Arm:
    """Return-conditioned RL on solutions of the least expert iteration."""
    return Arm(
        f"rcrl-minimal-{ratio:g}",
        f"RCRL, {ratio:g} right to a wrong one",
        "rcrl",
        {**MINIMAL, "rcrl.k": 0, "rcrl.positive_ratio": ratio},
        start="base",
        against="ei-minimal",
    )


# --- The entries ----------------------------------------------------------------------

SFT = Arm("sft", "supervised fine-tuning", "sft", start="", measures=MANY)
EI = Arm(
    "expert-iteration",
    "keep what is right, learn it",
    "expert-iteration",
    measures=MANY,
)
EI_ORM = replace(
    EI,
    name="expert-iteration-orm",
    text="keep of it what the reward model believes",
    changes={"expert_iteration.orm_threshold": 0.5},
    measures=ALL,
    against="expert-iteration",
)
PPO = Arm("ppo", "advantages from a value function", "ppo", measures=MANY)
SPARSE_ORM = reward("sparse-orm", "the reward model's score at the end", ALL)
DENSE_ORM = reward("dense-orm", "the reward model's score at each step", ALL)
PROMPTED = Arm("base", "the prompted base", BASE, {"start": "base"}, start="")
PROMPTED = replace(PROMPTED, measures=("greedy", "samples"))
NO_SFT = (PROMPTED, *map(without_sft, (EI, EI_ORM, PPO, SPARSE_ORM, DENSE_ORM)))
SHIFTED = tuple(shifted(arm) for arm in NO_SFT if arm.name != f"{EI_ORM.name}-base")
BY_MODEL = {"rcrl_labels": "orm"}
LIGHT = {
    "changes": lambda recipe: {"sft.epochs": max(1, recipe.sft.epochs // 2)},
    "measures": ALL,
}

ENTRIES = (
    SFT,
    EI,
    EI_ORM,
    replace(
        relabelled("rcrl", "RCRL, labels from rollouts", {}, ("samples",)),
        against="sft",
    ),
    relabelled("rcrl-orm", "labels from the reward model", BY_MODEL, ("samples",)),
    PPO,
    reward("dense", "for each step that the reference has too", ALL),
    SPARSE_ORM,
    DENSE_ORM,
    *NO_SFT,
    *SHIFTED,
    Arm("sft-light", "SFT, half of the epochs", "sft", start="", **LIGHT),
    Arm("ppo-light", "PPO from light SFT", "ppo", start="sft-light", **LIGHT),
    Arm(
        "ei-minimal",
        "expert iteration, one round, K = 1",
        "expert-iteration",
        MINIMAL,
        start="base",
    ),
    *map(from_minimal, (100.0, 10.0, 1.0)),
    curriculum("backtracking", "PPO, starts inside reference solutions"),
    curriculum("replay", "PPO, asks again what had large advantages"),
    # Beside the paper's tables
    baseline("reinforce", "the mean of the batch as the baseline"),
    baseline("rloo", "the mean of the question's other responses"),
    baseline("grpo", "the question's mean and standard deviation"),
    reward("shaped", "dense as a potential, which is taken back"),
    ppo(
        "ppo-weak-orm",
        "the score of one that knows little, without a KL penalty",
        weak_reward_model,
        measures=(*GREEDY, "earned", "auc"),
    ),
    ppo("ppo-best-half", "learn from the better half", best_half),
    ppo("ppo-no-kl", "without a KL penalty", NO_KL),
    ppo(
        "ppo-early",
        "a quarter of the phases",
        lambda recipe: {"ppo.phases": max(1, recipe.ppo.phases // 4)},
        measures=ALL,
    ),
    ppo(
        "ppo-longer",
        "twice the phases",
        lambda recipe: {"ppo.phases": 2 * recipe.ppo.phases},
    ),
    replace(
        EI,
        name="expert-iteration-early",
        text="one round",
        changes={"expert_iteration.rounds": 1},
        against="expert-iteration",
    ),
    Arm(
        "expert-iteration-current",
        "each round goes on from the last policy",
        "expert-iteration",
        {"expert_iteration.start_from": "current"},
        against="expert-iteration",
    ),
    Arm(
        "expert-iteration-longer",
        "each fit as long as those of all rounds together",
        "expert-iteration",
        lambda recipe: {
            "expert_iteration.finetune.epochs": recipe.expert_iteration.rounds
            * recipe.expert_iteration.finetune.epochs
        },
        against="expert-iteration",
    ),
    Arm(
        "sft-longer",
        "SFT, five times the epochs",
        "sft",
        lambda recipe: {"sft.epochs": 5 * recipe.sft.epochs},
        start="",
        against="sft",
    ),
    Arm(
        "expert-iteration-own",
        "learns its own solutions alone, not the reference solutions again",
        "expert-iteration",
        {"expert_iteration.reference_solutions": False},
        against="expert-iteration",
    ),
    ppo(
        "ppo-network",
        "two epochs, and a value function of its own that learns more often",
        together(two_epochs, OWN_VALUE),
    ),
    ppo("ppo-two-epochs", "two epochs, V as it is", two_epochs),
    ppo(
        "reinforce-two-epochs",
        "two epochs, and the mean of the batch as the baseline",
        together(two_epochs, {"ppo.credit": {"kind": "reinforce"}}),
        against="ppo-network",
    ),
    # Beyond the paper: ways to explore
    ppo(
        "ppo-novel",
        "more for ways not seen yet",
        {"reward": {"kind": "novel"}},
        measures=MANY,
    ),
    ppo("rloo-pass", "RLOO that aims at the best of 4 of 8", PASS_AT_4, measures=MANY),
    Arm(
        "expert-iteration-rare",
        "samples and weight for what is seldom solved",
        "expert-iteration",
        {"expert_iteration.allocation": "rare", "expert_iteration.rarity": 0.5},
        measures=MANY,
        against="expert-iteration",
    ),
    relabelled("rcrl-10", "10 right to a wrong one", {"rcrl.positive_ratio": 10.0}),
    relabelled("rcrl-100", "100 right to a wrong one", {"rcrl.positive_ratio": 100.0}),
    Arm(
        "orm",
        "the outcome reward model, among samples of SFT",
        "orm",
        measures=("reranking", "auc"),
    ),
)

FEW = 3  # seeds of what stands beside the paper's tables, so that all of it fits
K_COLUMNS = ("maj@1", "maj@K", "rerank@K", "pass@K")
METHODS = {
    "sft": "SFT",
    "base": "prompted",
    "expert-iteration": "expert iteration",
    "expert-iteration-orm": "expert iteration, ORM",
    "rcrl-orm": "RCRL, ORM",
    "ppo": "PPO, sparse",
    "ppo-dense": "PPO, dense",
    "ppo-sparse-orm": "PPO, sparse ORM",
    "ppo-dense-orm": "PPO, dense ORM",
}


def table_of_paper(number: str, title: str, arms: Sequence[str], **more: Any) -> Table:
    """One of the paper's tables; its columns are those of K samples unless given."""
    known = {arm.name: arm.called for arm in ENTRIES if arm.name in arms}
    methods = {arm: m for arm, m in known.items() if m in METHODS.values()}
    defaults = {"metrics": K_COLUMNS, "methods": methods}
    return Table(
        f"table-{number}", title, tuple(arms), reported=number, **defaults | more
    )


CATALOGUE = Catalogue(
    ENTRIES,
    tables=(
        table_of_paper("1", "from SFT", [arm.name for arm in ENTRIES[:9]], sizes=True),
        table_of_paper("2", "without SFT", [arm.name for arm in NO_SFT], sizes=True),
        table_of_paper(
            "3",
            "without SFT, on the shifted task",
            [arm.name for arm in SHIFTED],
            sizes=True,
        ),
        table_of_paper(
            "4",
            "light and full SFT, and PPO after each",
            ["sft-light", "sft", "ppo-light", "ppo"],
            methods={
                "sft-light": "SFT, 2 epochs",
                "sft": "SFT, 4 epochs",
                "ppo-light": "PPO after 2 epochs",
                "ppo": "PPO after 4 epochs",
            },
        ),
        table_of_paper(
            "5",
            "return-conditioned RL, by right solutions to wrong ones, without SFT",
            ["ei-minimal", "rcrl-minimal-100", "rcrl-minimal-10", "rcrl-minimal-1"],
            metrics=("maj@1",),
            methods={
                "ei-minimal": "expert iteration, one round of K = 1",
                "rcrl-minimal-100": "RCRL, 100 to 1",
                "rcrl-minimal-10": "RCRL, 10 to 1",
                "rcrl-minimal-1": "RCRL, 1 to 1",
            },
        ),
        table_of_paper(
            "6",
            "curricula of PPO",
            ["ppo", "ppo-backtracking", "ppo-replay"],
            metrics=("maj@1",),
        ),
        Table(
            "credit",
            "PPO and its baselines",
            ("ppo", "reinforce", "rloo", "grpo"),
            seeds=FEW,
        ),
        Table(
            "rewards",
            "PPO with rewards for steps",
            ("ppo-dense", "ppo-shaped"),
            seeds=FEW,
        ),
        Table(
            "learned-rewards",
            "PPO for a reward model",
            ("ppo-sparse-orm", "ppo-dense-orm", "ppo-weak-orm"),
            seeds=FEW,
        ),
        Table(
            "stability",
            "without KL, with the better half",
            ("ppo", "ppo-no-kl", "ppo-best-half"),
            seeds=FEW,
        ),
        Table(
            "rounds",
            "expert iteration and PPO on their way",
            (
                "expert-iteration-early",
                "expert-iteration-current",
                "expert-iteration-longer",
                "expert-iteration-own",
                "sft-longer",
                "ppo-early",
                "ppo-longer",
            ),
            seeds=FEW,
        ),
        Table(
            "labels",
            "return-conditioned RL, by how steps are labelled",
            ("rcrl", "rcrl-orm", "rcrl-10", "rcrl-100"),
            seeds=FEW,
        ),
        Table(
            "value",
            "PPO, by what V is",
            ("ppo", "ppo-two-epochs", "ppo-network", "reinforce-two-epochs"),
        ),
        Table(
            "ways",
            "ways to explore that are not the paper's",
            ("ppo-novel", "rloo-pass", "expert-iteration-rare"),
        ),
        Table("reranking", "choosing among samples of SFT", ("orm",)),
    ),
)

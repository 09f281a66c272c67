"""``rlreason gains``: what each algorithm gains over its start, over seeds.

One row an algorithm and metric, with its interval over seeds and problems, written to
``book/results/<profile>/gains.csv``, and beside it ``phases.csv``, what each phase of
PPO was paid. The book's chapters train one seed where they stand; that the gain is no
luck of a seed is shown here, once, and recorded.

===================  =================================================================
expert-iteration     maj@1 on test, minus that of the SFT policy it starts from
ppo and baselines    likewise
rcrl                 maj@1 with [GOOD] forced before every step, minus that with [BAD]
<algorithm>-...      one thing changed, such as the reward, what is asked and kept, or
                     how steps are labelled; maj@1 (with [GOOD]) minus that of the
                     algorithm as it is. Of ppo-weak-orm two: paid by a judge that
                     knows little, and kept near its start by nothing
ppo-...-orm          besides, what the judge finds of the answers, minus what it found
                     of SFT's; the share that is right, likewise; and its AUC
orm                  rerank@K minus maj@K, both of one set of samples of SFT; minus
                     rerank@K by the likelihood alone, which needs no training; and
                     the AUC on training questions that were held out
===================  =================================================================
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.evaluate import Report, Scorer
from rlreason.evaluation.intervals import (
    Interval,
    hierarchical_interval,
    seed_interval,
)
from rlreason.policy.load import Policy
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.environment import commit, environment, project_root
from rlreason.runs.folder import RunFolder
from rlreason.runs.recipes import Recipe
from rlreason.runs.steps import (
    TrainedRewardModel,
    evaluate_recipe,
    likelihood_judge,
    train_reward_model,
    train_seeds,
    train_sft,
)
from rlreason.settings import load_settings
from rlreason.tasks.problem import Problem

BASELINES = {
    kind: {"ppo": {"credit": {"kind": kind}}} for kind in ("reinforce", "rloo", "grpo")
}
REWARDS = {
    f"ppo-{kind}": {"reward": {"kind": kind}}
    for kind in ("dense", "shaped", "sparse-orm", "dense-orm")
}
CURRICULA = {
    "ppo-backtracking": {"ppo": {"curriculum": {"kind": "backtracking"}}},
    "ppo-replay": {"ppo": {"curriculum": {"kind": "replay"}}},
}
BEST = "ppo-best-half"
WEAK = "ppo-weak-orm"
OF_PPO = BASELINES | REWARDS | CURRICULA | {BEST: {}, WEAK: {}}
FILTERED = {"expert-iteration-orm": {"expert_iteration": {"orm_threshold": 0.5}}}
LABELLED = {
    "rcrl-orm": {"rcrl_labels": "orm"},
    "rcrl-10": {"rcrl": {"positive_ratio": 10.0}},
    "rcrl-100": {"rcrl": {"positive_ratio": 100.0}},
}
JUDGED = ("ppo-sparse-orm", "ppo-dense-orm", WEAK)
VARIANTS = OF_PPO | FILTERED | LABELLED
"""What each variant changes in a recipe; in ``BEST`` and ``WEAK`` by what it has."""

ALGORITHMS = ("expert-iteration", *FILTERED, "ppo", *OF_PPO, "rcrl", *LABELLED, "orm")
CHANCE = 0.5  # the AUC of a guess


@dataclass(frozen=True)
class Gain:
    """A row of the table. Means and limits are shares, or an AUC.

    Attributes:
        before: What it is compared with, mean over seeds; empty for an AUC.
        gain: ``after`` minus ``before``; of an AUC, what it has over chance.
        low, high: 95% interval of ``gain`` over seeds and problems.
        minutes: Of training, a seed, single-threaded, without what it starts from.
    """

    algorithm: str
    metric: str
    before: float | None
    after: float
    gain: float
    low: float
    high: float
    seeds: int
    problems: int
    minutes: float
    settings: str
    commit: str
    device: str
    date: str


def measure_gains(
    recipe: Recipe,
    algorithms: Sequence[str] = ALGORITHMS,
    *,
    report: Callable[[str], None] = print,
) -> list[Gain]:
    """Train what is not trained yet, judge it on the test split, one row each.

    Raises:
        ValueError: An algorithm is none of ``ALGORITHMS``.
    """
    check_algorithms(algorithms)
    rows = []
    for name in algorithms:
        for row in _measure_of(name)(recipe, name):
            report(format_gain(row))
            rows.append(row)
    return rows


def _measure_of(name: str) -> Callable[[Recipe, str], list[Gain]]:
    if name in JUDGED:
        return _of_judge
    if name in LABELLED:
        return _of_labels
    if name in VARIANTS and name not in BASELINES:
        return _of_variant
    return {"rcrl": _of_rcrl, "orm": _of_orm}.get(name, _of_policy)


def check_algorithms(algorithms: Sequence[str]) -> None:
    """Refuse a name that is none of ``ALGORITHMS``, before anything is trained."""
    if unknown := [name for name in algorithms if name not in ALGORITHMS]:
        raise ValueError(
            f"no algorithm {unknown[0]!r}; there are {', '.join(ALGORITHMS)}"
        )


def format_gain(row: Gain) -> str:
    """One line for the terminal, in points; an AUC as it is."""
    if row.before is None:
        interval = f"[{CHANCE + row.low:.3f}, {CHANCE + row.high:.3f}]"
        return f"{row.algorithm}: {row.metric} {row.after:.3f} {interval}"
    return (
        f"{row.algorithm}: {row.metric} {row.before:.1%} -> {row.after:.1%}, "
        f"{100 * row.gain:+.1f} points [{100 * row.low:+.1f}, {100 * row.high:+.1f}], "
        f"{row.seeds} seeds, {row.minutes:.1f} minutes a seed"
    )


def write_gains(rows: Sequence[Gain], path: Path) -> None:
    """Put rows into a table, in place of all that it has of the same algorithms."""
    _replace(path, [_as_text(row) for row in rows], [f.name for f in fields(Gain)])


def _replace(path: Path, rows: Sequence[dict[str, Any]], names: list[str]) -> None:
    """As ``write_gains``, whatever the columns, in the order of ``ALGORITHMS``."""
    new = {row["algorithm"] for row in rows}
    kept = [row for row in read_table(path) if row["algorithm"] not in new]
    table = [*kept, *rows]
    table.sort(key=lambda row: list(ALGORITHMS).index(row["algorithm"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    draft.replace(path)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a recorded table as text; none where there is no table."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def recorded_interval(row: dict[str, str]) -> Interval:
    """The gain of a recorded row with its ends, in the units of ``Gain``."""
    gain, low, high = (float(row[name]) for name in ("gain", "low", "high"))
    return Interval(gain, low, high, 0.95, int(row["seeds"]), "as recorded")


def measure_phases(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """What each phase of PPO was paid and how often it was right, of every seed.

    ``reward`` is the mean pay of a response without the KL penalty, ``accuracy`` the
    share that is right by the answer key, ``kl`` nats a response, "" where it is not
    measured. Each phase asks other questions. Of what is no PPO: no rows.
    """
    if algorithm_of(name) != "ppo":
        return []
    runs = train_seeds(variant_of(recipe, name), "ppo", range(recipe.seeds))
    return [
        {
            "algorithm": name,
            "seed": seed,
            "phase": row["phase"],
            "reward": f"{row['reward']:.4f}",
            "accuracy": f"{row['accuracy']:.4f}",
            "kl": f"{row['kl']:.4f}" if "kl" in row else "",
            "settings": _settings_of(run.run),
        }
        for seed, run in enumerate(runs)
        for row in run.phases
    ]


def write_phases(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Put rows into a table, in place of all that it has of the same algorithms."""
    if rows:
        _replace(path, rows, list(rows[0]))


def phases_path(profile: str) -> Path:
    """Where the phases of a profile's PPO runs are recorded."""
    return gains_path(profile).with_name("phases.csv")


def gains_table(profile: str, algorithms: Sequence[str], run: RunFolder) -> str:
    """What is recorded of some algorithms, as a table in Markdown for a chapter.

    Args:
        run: Of the first algorithm, made by the chapter; the text under the table says
            whether the record is of the same settings.
    """
    table = read_table(gains_path(profile))
    rows = [row for row in table if row["algorithm"] in algorithms]
    if not rows:
        return (
            f"Nothing is recorded for profile {profile} yet; `rlreason gains` does it. "
            "Until then one seed is an anecdote."
        )
    lines = [
        "| | measured | before | after | gain, 95% interval | |",
        "|---|---|--:|--:|---|---|",
        *map(_table_line, rows, [{}, *rows]),
    ]
    recorded = {r["settings"] for r in rows if r["algorithm"] == algorithms[0]}
    same = _settings_of(run) in recorded
    when = ", ".join(sorted({row["date"] for row in rows}))
    note = "" if same else ", with other settings than the run above"
    seeds = " or ".join(sorted({row["seeds"] for row in rows}, key=int))
    counts = sorted({int(row["problems"]) for row in rows} - {0})
    problems = " or ".join(f"{n:,}" for n in counts)
    return "\n".join(lines) + (
        f"\n\n{seeds} seeds, {problems} test problems; gains of percentages in points. "
        f"Recorded at profile {profile}, {when}{note}."
    )


def _table_line(row: dict[str, str], above: dict[str, str]) -> str:
    """One row in points; an AUC as it is, beside that of a guess.

    An algorithm is named in the first of its rows. What is to stay on one line has
    spaces that do not break (U+00A0).
    """
    interval = recorded_interval(row)
    gain, low, high = interval.mean, interval.low, interval.high
    word = "inconclusive"
    if interval.excludes(0):
        word = "a gain" if gain > 0 else "a loss"
    if row["before"]:
        before, after = (f"{float(row[name]):.1%}" for name in ("before", "after"))
        change = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    else:
        before, after = f"{CHANCE:.2f}", f"{float(row['after']):.2f}"
        change = f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]"
    known = row["algorithm"] == above.get("algorithm")
    name = "" if known else f"`{row['algorithm']}`"
    one_line = [text.replace(" ", "\N{NO-BREAK SPACE}") for text in (change, word)]
    return f"| {' | '.join([name, row['metric'], before, after, *one_line])} |"


def gains_path(profile: str) -> Path:
    """Where the gains of a profile are recorded."""
    return project_root() / "book" / "results" / Path(profile).stem / "gains.csv"


def algorithm_of(name: str) -> str:
    """What ``rlreason train`` calls it: of a variant, whose variant it is."""
    if name in OF_PPO:
        return "ppo"
    if name in FILTERED:
        return "expert-iteration"
    return "rcrl" if name in LABELLED else name


def variant_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe with what a variant changes; as it is for what is no variant.

    Raises:
        ValueError: It is none of ``ALGORITHMS``, or cannot be made of this recipe.
    """
    check_algorithms([name])
    values = recipe.model_dump(mode="json")
    for part, changes in VARIANTS.get(name, {}).items():
        # A reward of another kind has no use for the size of this one
        if isinstance(changes, dict) and part != "reward":
            changes = values[part] | changes
        values[part] = changes
    if name == BEST:  # half of the responses, in as many updates
        n, batch = recipe.ppo.n, recipe.ppo.batch_size
        if n % 2 or batch % 2:
            raise ValueError(f"{BEST} halves ppo.n={n} and ppo.batch_size={batch}")
        values["ppo"] |= {"keep": n // 2, "batch_size": batch // 2}
    if name == WEAK:  # a head alone, which learns slowly, from the samples of SFT
        rates = {"lr": recipe.sft.lr, "lr_floor": recipe.sft.lr_floor}
        values["orm"] |= rates | {"likelihood": False, "epochs": 4, "head_lr_scale": 10}
        values |= {"orm_samples": "sft", "reward": {"kind": "sparse-orm"}}
        values["ppo"]["kl"] |= {"coef": 0.0, "target": None}
    return load_settings(Recipe, values)


def _of_policy(recipe: Recipe, name: str) -> list[Gain]:
    """maj@1 against the SFT policy of the same seed."""
    seeds = range(recipe.seeds)
    trained = train_seeds(variant_of(recipe, name), algorithm_of(name), seeds)
    starts = [train_sft(recipe, seed).policy for seed in seeds]
    before, after = (
        _greedy(recipe, policies)
        for policies in (starts, [run.policy for run in trained])
    )
    return [_row(name, "maj@1", before, after, trained)]


def _of_variant(recipe: Recipe, name: str, *, label: str | None = None) -> list[Gain]:
    """maj@1 against the same algorithm and seed with nothing changed."""
    algorithm = algorithm_of(name)
    plain, changed = (
        train_seeds(each, algorithm, range(recipe.seeds))
        for each in (recipe, variant_of(recipe, name))
    )
    before, after = (
        _greedy(recipe, [run.policy for run in runs], label=label)
        for runs in (plain, changed)
    )
    metric = f"maj@1 of {label}" if label else "maj@1"
    return [_row(name, f"{metric} against {algorithm}", before, after, changed)]


def _of_judge(recipe: Recipe, name: str) -> list[Gain]:
    """Beside its accuracy: whether what it was paid for rose, and what that is worth.

    The answers are of the policy, and of SFT's from which it started.
    """
    changed, seeds = variant_of(recipe, name), range(recipe.seeds)
    trained = train_seeds(changed, "ppo", seeds)
    judges = [train_reward_model(changed, seed) for seed in seeds]
    problems = recipe.task.load("test", recipe.evaluation.problems)
    starts = [train_sft(recipe, seed).policy for seed in seeds]

    def found(policies: Sequence[Policy]) -> np.ndarray:
        each = [
            paid_and_right(recipe, policy, judge.orm, problems, seed=seed)
            for policy, judge, seed in zip(policies, judges, seeds, strict=True)
        ]
        return np.swapaxes(each, 0, 1)  # (2, seeds, problems)

    before, after = found(starts), found([run.policy for run in trained])
    metrics = ("score by its judge", "right, of the same answers")
    return [
        *_of_variant(recipe, name),
        *(
            _row(name, f"{metric}, against SFT", *tables, trained)
            for metric, *tables in zip(metrics, before, after, strict=True)
        ),
        _auc(name, judges, trained),
    ]


def paid_and_right(
    recipe: Recipe,
    policy: Policy,
    judge: OutcomeRewardModel,
    problems: Sequence[Problem],
    *,
    k: int = 1,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """What a judge finds of ``k`` answers to each problem, and what is true of them.

    They are sampled as PPO samples, so that both are what its training would have made
    larger.

    Returns:
        The mean score and the share that is right by the answer key: (problems,) each.
    """
    rollouts = sample(
        policy,
        problems,
        k=k,
        temperature=recipe.ppo.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
    )
    scores, right = score_responses(judge, rollouts), sparse_rewards(rollouts, problems)
    by_problem = len(problems), k
    return (
        np.reshape(scores, by_problem).mean(1),
        np.reshape(right, by_problem).mean(1),
    )


def _of_labels(recipe: Recipe, name: str) -> list[Gain]:
    """What its labels are worth, and what it is worth itself."""
    return _of_rcrl(recipe, name) + _of_variant(recipe, name, label=GOOD)


def _of_rcrl(recipe: Recipe, name: str) -> list[Gain]:
    trained = train_seeds(variant_of(recipe, name), "rcrl", range(recipe.seeds))
    bad, good = (
        _greedy(recipe, [run.policy for run in trained], label=label)
        for label in (BAD, GOOD)
    )
    return [_row(name, "maj@1 of [GOOD] against [BAD]", bad, good, trained)]


def _of_orm(recipe: Recipe, name: str) -> list[Gain]:
    seeds = range(recipe.seeds)
    trained = train_seeds(recipe, name, seeds)
    policies = [train_sft(recipe, seed).policy for seed in seeds]
    chosen = recipe.evaluation
    many = {"sampled_problems": chosen.recorded_problems or chosen.sampled_problems}
    judged = recipe.model_copy(update={"evaluation": chosen.model_copy(update=many)})

    def reports(judges: Sequence[Scorer]) -> list[Report]:
        return [
            evaluate_recipe(judged, policy, orm=judge, seed=seed)
            for policy, judge, seed in zip(policies, judges, seeds, strict=True)
        ]

    by_model = reports([run.orm for run in trained])
    by_likelihood = reports([likelihood_judge(recipe, seed) for seed in seeds])
    k = by_model[0].k
    rerank, vote = f"rerank@{k}", f"maj@{k}"
    scored = _table(by_model, rerank)
    against_vote = _row(
        name, f"{rerank} against {vote}", _table(by_model, vote), scored, trained
    )
    against_likelihood = _row(
        name,
        f"{rerank} against the likelihood's",
        _table(by_likelihood, rerank),
        scored,
        trained,
    )
    return [against_vote, against_likelihood, _auc(name, trained, trained)]


def _auc(
    name: str, judges: Sequence[TrainedRewardModel], trained: Sequence[Any]
) -> Gain:
    """How well reward models rank held-out questions, against a guess."""
    interval = seed_interval([judge.held_out[-1]["auc"] for judge in judges])
    return Gain(
        metric="AUC on held-out questions",
        before=None,
        after=interval.mean,
        gain=interval.mean - CHANCE,
        low=interval.low - CHANCE,
        high=interval.high - CHANCE,
        **_common(name, trained, len(judges), 0),
    )


def _greedy(recipe: Recipe, policies: Sequence[Policy], **options: Any) -> np.ndarray:
    """Which problems each seed's policy solves greedily: (seeds, problems)."""
    reports = [
        evaluate_recipe(recipe, policy, greedy_only=True, **options)
        for policy in policies
    ]
    return _table(reports, "maj@1")


def _table(reports: Sequence[Report], metric: str) -> np.ndarray:
    """A metric of each seed and problem: (seeds, problems)."""
    return np.stack([report.values(metric) for report in reports])


def _row(
    name: str,
    metric: str,
    before: np.ndarray,
    after: np.ndarray,
    trained: Sequence[Any],
) -> Gain:
    """The paired difference of two tables, (seeds, problems) each."""
    interval: Interval = hierarchical_interval(after - before)
    return Gain(
        metric=metric,
        before=float(before.mean()),
        after=float(after.mean()),
        gain=interval.mean,
        low=interval.low,
        high=interval.high,
        **_common(name, trained, *before.shape),
    )


def _common(name: str, trained: Sequence[Any], seeds: int, problems: int) -> dict:
    return {
        "algorithm": name,
        "seeds": seeds,
        "problems": problems,
        "minutes": fmean(run.seconds for run in trained) / 60,
        "settings": _settings_of(trained[0].run),
        "commit": commit() or "",
        "device": environment()["device"],
        "date": date.today().isoformat(),
    }


def _settings_of(run: RunFolder) -> str:
    """The hash in the name of a run's folder."""
    return run.path.name.rsplit("-", 1)[-1]


def _as_text(row: Gain) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}"
        return "" if value is None else str(value)

    return {name: text(value) for name, value in asdict(row).items()}

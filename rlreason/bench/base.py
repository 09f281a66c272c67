"""``rlreason bench base``: what a policy can do before training, and what it lacks.

The parts first, then more and more of the whole: equations without a story, problems of
one step, of two, and those of a profile. All are asked with no, one and two solved
examples of the profile's task, on the same validation problems, so that only the form
differs. A prompt that a policy cannot read shows as a fall from one form to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlreason.algorithms.pretrain import PretrainSettings
from rlreason.evaluation.evaluate import evaluate
from rlreason.evaluation.intervals import Interval, accuracy_interval
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.rollout import Prompt
from rlreason.policy.sampler import sample_prompts
from rlreason.runs.profiles import load_recipe
from rlreason.tasks import load_problems
from rlreason.tasks.answers import evaluate_expression, parse_solution
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response

SHOTS = (0, 1, 2)
DRILL = "12*3=36 40-8=32 "  # what is asked stands in a row, as it was read


def bench_base(
    policy: Policy | str, *, profile: str = "tiny", problems: int, sampled: int
) -> list[dict[str, Any]]:
    """Calibrate a policy on validation problems that stand in no prompt.

    Args:
        policy: As in ``load_policy``, or a policy.
        profile: Whose problems, examples, temperature and K.
        problems: Of each kind, for greedy answers.
        sampled: Of the profile's, for K answers each.

    Returns:
        Rows: ``asked`` (which problems), ``shots``, ``tokens`` (of the longest prompt
        with its solution and EOS), ``maj@1`` and for the profile's ``maj@K`` and
        ``pass@K``, as intervals over problems.
    """
    policy = load_policy(policy) if isinstance(policy, str) else policy
    recipe = load_recipe(profile)
    shown = recipe.task.shot_problems(max(SHOTS))
    steps = {"1 step": (1, 1), "2 steps": (2, 2)}
    kinds = {
        asked: load_problems("gsm-mini", "validation", limit=problems, steps=n)
        for asked, n in steps.items()
    }
    kinds[profile] = recipe.task.load("validation", problems + len(shown))[len(shown) :]
    judged = recipe.evaluation
    rows = [_on_equations(policy, kinds[profile])]
    for asked, chosen in kinds.items():
        for shots in SHOTS:
            how = {"shots": shown[:shots], "max_new_tokens": recipe.max_new_tokens}
            row = {"asked": asked, "shots": shots}
            row["tokens"] = _longest(policy, chosen, shown[:shots])
            row["maj@1"] = evaluate(policy, chosen, k=0, **how).maj_1
            if asked == profile:
                how |= {"k": judged.k, "temperature": judged.temperature}
                part = evaluate(policy, chosen[:sampled], **how)
                row |= {"maj@K": part.maj_k, "pass@K": part.pass_k}
            rows.append(row)
    return rows


def _on_equations(policy: Policy, problems: Sequence[Problem]) -> dict[str, Any]:
    """The problems' equations, without stories and among others: ``12+5=`` is asked."""
    asked = sorted({o for p in problems for o in parse_solution(p.solution).operations})
    prompts = [Prompt(o, tuple(policy.encode_prompt(f"{DRILL}{o}="))) for o in asked]
    answers = sample_prompts(policy, prompts, temperature=0, max_new_tokens=6)
    # What follows the number is another equation, after a space
    right = [
        answer.text.partition(" ")[0] == str(evaluate_expression(operation))
        for answer, operation in zip(answers, asked, strict=True)
    ]
    longest = max(len(answer.prompt_tokens + answer.tokens) for answer in answers)
    row = {"asked": "equations", "shots": 0, "tokens": longest}
    return row | {"maj@1": accuracy_interval(right)}


def _longest(
    policy: Policy, problems: Sequence[Problem], shots: Sequence[Problem]
) -> int:
    texts = [(format_prompt(p, shots), format_response(p.solution)) for p in problems]
    return max(
        len(policy.encode_prompt(prompt) + policy.encode_response(prompt, response))
        for prompt, response in texts
    )


def format_base_benchmark(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal: percentages with their 95% intervals."""

    def cell(share: Interval | None) -> str:
        if share is None:
            return ""
        return f"{share.mean:.1%} ({100 * share.low:.1f} to {100 * share.high:.1f})"

    metrics = ("maj@1", "maj@K", "pass@K")
    lines = [f"{'asked':<10} shots tokens  " + "".join(f"{m:<22}" for m in metrics)]
    for row in rows:
        shares = "".join(f"{cell(row.get(metric)):<22}" for metric in metrics)
        lines.append(
            f"{row['asked']:<10} {row['shots']:>5} {row['tokens']:>6}  {shares}"
        )
    lines.append(f"nano was pretrained on rows of {PretrainSettings().context} tokens")
    return "\n".join(line.rstrip() for line in lines)

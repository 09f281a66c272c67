"""``rlreason bench`` and ``rlreason doctor``: what this machine can do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rlreason.commands.options import (
    POSITIVE,
    FiniteRange,
    count_option,
    profile_option,
)


@click.command()
def doctor() -> None:
    """Say what this machine can run, and how to mend the rest.

    Exit code 0 when the profile tiny can run, 1 when it cannot.
    """
    from rlreason.bench.doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.mark} {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"  {'':<{width}}  -> {finding.remedy}")
    able = all(finding.ok or not finding.required for finding in findings)
    verdict = "can" if able else "cannot"
    click.echo(f"\nThis machine {verdict} run the profile tiny.")
    sys.exit(0 if able else 1)


@click.group()
def bench() -> None:
    """Measure speed here and now, beside transformers, in turns."""


@bench.command("sample")
@click.option(
    "--policy", help="As in load_policy. [default: nano after the SFT of tiny]"
)
@count_option("--questions", default=64, help="gsm-mini problems.")
@click.option(
    "--k",
    "samples",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8, 96),
    show_default=True,
    help="Samples a question. Repeatable.",
)
@count_option("--repeats", default=3, help="Turns that count.")
def bench_sample_command(
    policy: str | None, questions: int, samples: tuple[int, ...], repeats: int
) -> None:
    """Useful tokens a second, ours and transformers'."""
    from rlreason.bench.sample import (
        format_sample_benchmark,
        run_sample_benchmark,
    )

    rows = run_sample_benchmark(
        policy,
        questions=questions,
        samples=samples,
        repeats=repeats,
        report=lambda line: click.echo(line, err=True),
    )
    click.echo(format_sample_benchmark(rows))


@bench.command("train")
@click.option("--policy", default="nano", show_default=True, help="As in load_policy.")
@count_option("--problems", default=512, help="Examples an epoch.")
@count_option("--batch-size", default=32, help="Examples an update.")
@count_option("--repeats", default=5, help="Turns that count.")
@click.option("--compile", "compiled", is_flag=True, help="Both by torch.compile.")
def bench_train_command(
    policy: str, problems: int, batch_size: int, repeats: int, compiled: bool
) -> None:
    """Tokens a second of fine-tuning, ours and Trainer's."""
    from rlreason.bench.train import bench_train

    row = bench_train(
        policy=policy,
        problems=problems,
        batch_size=batch_size,
        repeats=repeats,
        compiled=compiled,
    )
    click.echo(
        f"rlreason {row['ours']:,.0f} and Trainer {row['trainer']:,.0f} tokens/s, "
        f"ratio {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}), "
        f"{row['threads']} threads"
    )


@bench.command("trl")
@click.option(
    "--points",
    type=POSITIVE,
    default=5.0,
    show_default=True,
    help="Percentage points of maj@1 to gain.",
)
@click.option(
    "--phases", type=click.IntRange(min=1), help="At most. [default: the profile's]"
)
@count_option("--seeds", default=3, help="Runs of each.")
def bench_trl_command(points: float, phases: int | None, seeds: int) -> None:
    """How soon RL has gained so much, ours and TRL's GRPO.

    Also the seconds of a phase. Medians over seeds; a seed takes up to ten minutes.
    """
    from rlreason.bench.trl import bench_trl

    found = bench_trl(
        points=points,
        phases=phases,
        seeds=seeds,
        report=lambda line: click.echo(line, err=True),
    )
    what = {"a_phase": "a phase", "reached": f"to +{points:g} points"}
    for key, name in what.items():
        ours, theirs = found["ours"][key], found["trl"][key]
        said = [f"{t:,.1f} s" if t else "not reached" for t in (ours, theirs)]
        ratio = f", ratio {theirs / ours:.2f}" if ours and theirs else ""
        click.echo(f"{name}: rlreason {said[0]}, TRL {said[1]}{ratio}")
    click.echo(f"from {found['start']:.1%}, {found['threads']} threads")


@bench.command("gpu")
@click.option("--model", help="Folder of a policy of 135M. [default: random weights]")
@click.option(
    "--size",
    type=FiniteRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Less shrinks models and work, e.g. 0.01 on a CPU.",
)
@click.option(
    "--minutes",
    type=POSITIVE,
    default=8.0,
    show_default=True,
    help="After which nothing more is begun.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    help="Folder for gpu-check.md and gpu-check.json. [default: here]",
)
def bench_gpu_command(model: str | None, size: float, minutes: float, out: Path):
    """How near a GPU comes to what is asked of it.

    Tokens a second of sampling, the share of the card's arithmetic that SFT uses,
    seconds of a phase of PPO: target and measured, of 135M and 7B weights. Needs no
    network.
    """
    from rlreason.bench.gpu import check_gpu, table, write_check

    lines = check_gpu(
        model=model,
        size=size,
        minutes=minutes,
        report=lambda line: click.echo(line, err=True),
    )
    write_check(lines, out, size=size)
    click.echo(table(lines, size=size))


@bench.command("base")
@click.option("--policy", default="nano", show_default=True, help="As in load_policy.")
@profile_option
@count_option("--problems", default=500, help="Of each kind, for greedy answers.")
@count_option("--sampled", default=100, help="Of the profile's, for K answers each.")
def bench_base_command(policy: str, profile: str, problems: int, sampled: int) -> None:
    """What a policy can do before it is trained.

    Equations, problems of one step, of two, and those of the profile, each asked with
    no, one and two solved examples: maj@1, and maj@K and pass@K of the profile's.
    """
    from rlreason.bench.base import bench_base, format_base_benchmark

    rows = bench_base(policy, profile=profile, problems=problems, sampled=sampled)
    click.echo(format_base_benchmark(rows))

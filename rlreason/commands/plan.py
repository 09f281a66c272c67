"""``rlreason plan``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from rlreason.commands.options import POSITIVE, recipe_of, set_option


@click.command()
@click.argument("profile")
@set_option
@click.option(
    "--gpus",
    default=1,
    show_default=True,
    type=click.IntRange(min=0),
    help="GPUs that work on one job; 0: a CPU.",
)
@click.option(
    "--memory",
    default=80.0,
    show_default=True,
    type=POSITIVE,
    help="GB of each GPU, or of the CPU.",
)
@click.option(
    "--rates",
    nargs=2,
    type=POSITIVE,
    metavar="SAMPLED TRAINED",
    help="Tokens a second of one device, for hours.",
)
@click.option("--measure", is_flag=True, help="Measure these rates here and now.")
def plan(profile: str, changes, gpus: int, memory: float, rates, measure: bool) -> None:
    """Say what PROFILE takes before it is run.

    Parameters, memory of one device in each phase of each step, tokens to sample and to
    train, hours, and what to change where it does not fit. No weights and no data of
    the paper's are needed: the model's configuration is enough, which may be a folder
    with its config.json (--set policy FOLDER).

    \b
    rlreason plan paper --gpus 8 --memory 80 --rates 11700 9000
    rlreason plan tiny --gpus 0 --memory 8 --measure
    """
    from rlreason.bench.rates import measured_rates
    from rlreason.runs.estimate import Machine, Work

    recipe = recipe_of(profile, changes)
    work = Work.of(recipe)
    machine = Machine(gpus, memory * 1e9)
    if measure:
        rates = measured_rates(recipe, work)
    for line in _lines(recipe, machine, work, rates):
        click.echo(line)


def _lines(recipe, machine, work, rates) -> Iterator[str]:
    """The models, a table of memory, one of tokens, and what to change."""
    from rlreason.runs.estimate import Models, estimate, remedy

    models, gb = Models(recipe, machine, work), 1e9
    yield (
        f"{recipe.policy}: {models.parameters:,} parameters in "
        f"{str(models.dtype).removeprefix('torch.')}, "
        f"{models.weights / gb:.2f} GB"
    )
    yield (
        f"Keys and values of a token: {models.checked.token_bytes:,} bytes. Taken for "
        f"the mean: {work.prompt} tokens a prompt, {work.response} a response"
    )
    where = f"each of {machine.gpus} GPUs" if machine.gpus > 1 else "the device"
    yield f"Peaks in GB on {where} with {machine.memory / gb:g} GB:"
    needs = estimate(recipe, machine, work)
    yield _row("step", "load", "sampling", "scoring", "update", "rows", "fits")
    for step, need in needs.items():
        peaks = (need.load, need.sampling[0], need.scoring, need.update)
        cells = [f"{peak / gb:.2f}" if peak else "-" for peak in peaks]
        fits = "yes" if need.peak <= machine.memory else "NO"
        yield _row(step, *cells, f"{need.sampling[1] or '-'}", fits)
    yield "Millions of tokens, one seed:"
    yield _row("step", "sampled", "scored", "trained", "hours" if rates else "")
    for step, need in needs.items():
        counts = (need.sampled, need.scored, need.trained)
        hours = f"{need.hours(machine, rates):.2f}" if rates else ""
        yield _row(step, *(f"{n / 1e6:.1f}" for n in counts), hours)
    if rates:
        total = sum(need.hours(machine, rates) for need in needs.values())
        yield (
            f"{total:.1f} hours at {rates[0]:,.0f} tokens a second sampled and "
            f"{rates[1]:,.0f} trained, {total * recipe.seeds:.1f} for {recipe.seeds} "
            "seeds"
        )
    else:
        yield "Hours: give --rates, or --measure where the policy's weights are"
    for step, need in needs.items():
        if need.peak > machine.memory:
            yield _advice(step, remedy(step, recipe, machine, work))


def _row(name: str, *cells: str) -> str:
    return f"  {name:<18}" + "".join(f"{cell:>10}" for cell in cells).rstrip()


def _advice(step: str, found) -> str:
    if found is None:
        return f"{step} does not fit, whatever is set: take a smaller policy"
    changes, gpus = found
    said = "".join(f" --set {path} {value}" for path, value in changes.items())
    return f"{step} fits with{said} --gpus {gpus}"

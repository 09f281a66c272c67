"""The benchmark measures what it says, on a policy too small to be timed."""

from __future__ import annotations

from dataclasses import replace

from tiny_models import PROBLEMS, tiny_policy

from rlreason.bench import sample as bench_sample
from rlreason.bench.sample import (
    format_sample_benchmark,
    run_sample_benchmark,
)


def test_a_row_for_each_k_with_both_rates():
    policy = tiny_policy()
    lines: list[str] = []
    rows = run_sample_benchmark(
        policy,
        questions=3,
        samples=(1, 3),
        max_new_tokens=4,
        repeats=2,
        report=lines.append,
    )
    assert [row["k"] for row in rows] == [1, 3]
    for row in rows:
        assert row["questions"] == 3
        assert 1 <= row["mean_tokens"] <= 4
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["generate_rows"] % row["k"] == 0  # of whole questions
    assert len(lines) == 2 * (1 + 3)
    assert len(format_sample_benchmark(rows).splitlines()) == 3


def test_tokens_after_eos_are_not_useful():
    policy = replace(tiny_policy(), eos_id=40)
    generate, answers = policy.model.generate, []

    def spy(**options):
        output = generate(**options)
        answers.append(output[:, options["input_ids"].shape[1] :].tolist())
        return output

    policy.model.generate = spy
    lengths = bench_sample._lengths_generate(
        policy, PROBLEMS, k=6, seed=0, rows=12, temperature=1.5, max_new_tokens=60
    )
    lengths = list(lengths)
    assert len(answers) == 2  # calls, with two questions of six rows each
    assert lengths == [
        tokens.index(40) + 1 if 40 in tokens else len(tokens)
        for call in answers
        for tokens in call
    ]
    assert len(set(lengths)) > 3

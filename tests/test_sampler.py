"""The sampler against the definition, and against transformers' own ``generate``."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import KINDS, PROBLEMS, tiny_policy
from torch import nn

from rlreason.policy import cohort_engine, sampler, slot_engine
from rlreason.policy.drawing import draw_tokens
from rlreason.policy.kv_cache import ATTENTION_NAME, Moves
from rlreason.policy.layout import opening_of
from rlreason.policy.load import make_policy
from rlreason.policy.rollout import Prompt
from rlreason.policy.sampler import (
    sample,
    sample_groups,
    sample_prompts,
)
from rlreason.policy.streams import next_uniforms, stream_key
from rlreason.policy.value import score
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt


@pytest.fixture(params=["cohorts", "slots"])
def engine(request, monkeypatch):
    """Decoding as on a CPU, and as on a GPU."""
    if request.param == "slots":
        monkeypatch.setitem(sampler.ENGINES, "cpu", slot_engine.SlotEngine)


def full_logits(policy, rollout) -> torch.Tensor:
    """The logits that predict each sampled token, by one unpadded forward pass."""
    ids = torch.tensor([rollout.prompt_tokens + rollout.tokens])
    with torch.no_grad():
        logits = policy.model(ids.to(policy.device)).logits[0].float().cpu()
    return logits[len(rollout.prompt_tokens) - 1 : -1]


def worst_error(policy, rollouts, logprobs_from) -> float:
    """Largest gap between reported log-probabilities and those of full passes."""
    worst = 0.0
    for rollout in rollouts:
        logprobs = logprobs_from(full_logits(policy, rollout))
        tokens = torch.tensor(rollout.tokens)[:, None]
        expected = logprobs.gather(1, tokens).squeeze(1)
        gap = (expected - torch.tensor(rollout.logprobs)).abs().max()
        worst = max(worst, float(gap))
    return worst


def by_name(rollouts) -> dict:
    return {(r.problem_id, r.sample): r.tokens for r in rollouts}


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_p03_logprobs_are_those_of_one_full_forward_pass(kind, temperature):
    policy = tiny_policy(kind)
    rollouts = sample(policy, PROBLEMS, k=4, temperature=temperature, max_new_tokens=48)
    error = worst_error(
        policy, rollouts, lambda logits: (logits / temperature).log_softmax(-1)
    )
    assert error < 1e-4


def test_p04_the_bound_rejects_unscaled_and_truncated_logprobs():
    policy = tiny_policy()
    rollouts = sample(policy, PROBLEMS, k=4, temperature=0.7, max_new_tokens=48)

    def truncated(logits):
        scaled = logits / 0.7
        least = scaled.topk(50).values[:, -1:]
        return scaled.masked_fill(scaled < least, -1e9).log_softmax(-1)

    assert worst_error(policy, rollouts, lambda x: x.log_softmax(-1)) > 0.1
    assert worst_error(policy, rollouts, truncated) > 1e-2


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "pad=eos"])
@pytest.mark.parametrize("kind", KINDS)
def test_p13_greedy_is_token_for_token_that_of_generate_on_a_padded_batch(kind, pad):
    policy = tiny_policy(kind, pad=pad)
    free = sample(policy, PROBLEMS, temperature=0, max_new_tokens=40)
    # A random model hardly ever chooses EOS, so let a token that it did choose be EOS
    policy = replace(policy, eos_id=free[0].tokens[12])
    if not pad:
        policy = replace(policy, pad_id=policy.eos_id)
    rollouts = sample(policy, PROBLEMS, temperature=0, max_new_tokens=40)
    assert {r.finished for r in rollouts} >= {True}

    prompts = [policy.encode_prompt(format_prompt(p)) for p in PROBLEMS]
    width = max(map(len, prompts))
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=policy.eos_id,
        pad_token_id=policy.pad_id,
    )[:, width:].tolist()
    for rollout, expected in zip(rollouts, output, strict=True):
        assert list(rollout.tokens) == expected[: len(rollout.tokens)]
        assert rollout.finished == (policy.eos_id in expected)


def test_greedy_logprobs_are_those_at_temperature_one():
    policy = tiny_policy()
    rollouts = sample(policy, PROBLEMS, temperature=0, max_new_tokens=20)
    assert worst_error(policy, rollouts, lambda x: x.log_softmax(-1)) < 1e-4


def test_p02_a_poisoned_generation_config_changes_nothing():
    policy = tiny_policy()
    before = sample(policy, PROBLEMS, k=3, max_new_tokens=24)
    poison = {"top_k": 2, "top_p": 0.3, "repetition_penalty": 2.0, "temperature": 0.1}
    for name, value in poison.items():
        setattr(policy.model.generation_config, name, value)
    assert sample(policy, PROBLEMS, k=3, max_new_tokens=24) == before


@pytest.mark.usefixtures("engine")
def test_p09_samples_do_not_depend_on_the_company_they_keep():
    policy = replace(tiny_policy(), eos_id=40)
    options = {"max_new_tokens": 64, "temperature": 1.5, "seed": 3}
    whole = by_name(sample(policy, PROBLEMS, k=6, **options))
    assert len({len(tokens) for tokens in whole.values()}) > 5  # rows leave one by one
    budget = 220_000  # four rows at a time, so a problem is cut up
    assert by_name(sample(policy, PROBLEMS, k=6, byte_budget=budget, **options)) == (
        whole
    )
    assert by_name(sample(policy, PROBLEMS[::-1], k=6, **options)) == whole
    alone = by_name(sample(policy, PROBLEMS[2:3], k=3, **options))
    assert alone == {name: whole[name] for name in alone}
    assert by_name(sample(policy, PROBLEMS, k=6, max_new_tokens=64, seed=4)) != whole


def count_rows(monkeypatch) -> list[int]:
    """Rows of each forward pass from now on, that of the prompts not counted."""
    rows = []
    step = cohort_engine.next_logits

    def spy(model, cache, ids, positions):
        rows.append(len(ids))
        return step(model, cache, ids, positions)

    monkeypatch.setattr(cohort_engine, "next_logits", spy)
    return rows


def prefixes(rollouts) -> set:
    """What a forward pass has to go on from: no answer needs that of its last token."""
    return {
        (r.problem_id, r.tokens[:n]) for r in rollouts for n in range(1, len(r.tokens))
    }


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_computed_for_each_distinct_prefix(kind, temperature, monkeypatch):
    policy = replace(tiny_policy(kind), eos_id=40)
    rows = count_rows(monkeypatch)
    options = {"temperature": temperature, "max_new_tokens": 40, "seed": 5}
    shared = sample(policy, PROBLEMS, k=24, **options)
    assert sum(rows) == len(prefixes(shared)) < sum(len(r.tokens) for r in shared)
    # Tokens are those of samples that have a row each, from the first token on
    monkeypatch.setitem(sampler.ENGINES, "cpu", slot_engine.SlotEngine)
    alone = sample(policy, PROBLEMS, k=24, **options)
    assert by_name(shared) == by_name(alone)
    for one, other in zip(shared, alone, strict=True):
        # A low temperature magnifies the rounding of logits
        gap = 1e-4 / min(1, 5 * temperature)
        assert one.logprobs == pytest.approx(other.logprobs, abs=gap)


def test_greedy_samples_are_one_row(monkeypatch):
    rows = count_rows(monkeypatch)
    rollouts = sample(tiny_policy(), PROBLEMS, k=50, temperature=0, max_new_tokens=9)
    assert rows == [len(PROBLEMS)] * 8
    assert len({(r.problem_id, r.tokens, r.logprobs) for r in rollouts}) == 4


def test_wrong_one_draw_for_all_samples_of_a_row_is_seen(monkeypatch):
    policy = tiny_policy()
    right = by_name(sample(policy, PROBLEMS, k=24, max_new_tokens=12))
    draw = cohort_engine.draw_tokens

    def together(logits, uniforms, *, rows, temperature):
        first = torch.zeros_like(rows).index_copy_(0, rows, torch.arange(len(rows)))
        return draw(logits, uniforms[first[rows]], rows=rows, temperature=temperature)

    monkeypatch.setattr(cohort_engine, "draw_tokens", together)
    assert by_name(sample(policy, PROBLEMS, k=24, max_new_tokens=12)) != right


def test_rows_split_move_and_end_where_their_successors_are():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 40):
        parents = torch.randint(7, (count,), generator=generator).sort().values
        entries = torch.cat([torch.arange(7), torch.full((40,), -1)])
        moves = Moves(parents)
        successors = moves.apply_(entries.clone())
        assert torch.equal(successors, moves.parents)
        assert torch.equal(successors[moves.places], parents)
        # As many stay as can
        stay = int((successors[:7] == torch.arange(7)[:count]).sum())
        assert stay == len({p for p in parents.tolist() if p < count})


@pytest.mark.usefixtures("engine")
def test_a_longer_limit_only_lengthens_samples():
    policy = replace(tiny_policy(), eos_id=40)
    short = sample(policy, PROBLEMS, k=4, max_new_tokens=10)
    long = sample(policy, PROBLEMS, k=4, max_new_tokens=80)
    for one, other in zip(short, long, strict=True):
        assert other.tokens[: len(one.tokens)] == one.tokens


@pytest.mark.usefixtures("engine")
def test_global_random_state_is_neither_read_nor_moved():
    policy = tiny_policy()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(policy, PROBLEMS, k=2, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(policy, PROBLEMS, k=2, max_new_tokens=8) == first


def chi_square_tail(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Probability of counts at least this far from ``probs``; rare bins are joined."""
    order = probs.argsort(descending=True)
    counts, expected = counts[order].double(), probs[order].double() * counts.sum()
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_p01_draws_follow_the_softmax(temperature):
    policy = tiny_policy()
    rollouts = sample(
        policy,
        PROBLEMS[:1],
        k=20_000,
        temperature=temperature,
        max_new_tokens=1,
        seed=7,
    )
    vocabulary = policy.model.config.vocab_size
    tokens = torch.tensor([r.tokens[0] for r in rollouts])
    counts = torch.bincount(tokens, minlength=vocabulary)
    logits = full_logits(policy, rollouts[0])[0]
    assert chi_square_tail(counts, (logits / temperature).softmax(-1)) > 0.01
    # The same counts against what top-k 50 or another temperature would have drawn
    scaled = logits / temperature
    top = scaled.masked_fill(scaled < scaled.topk(50).values[-1], -math.inf)
    assert chi_square_tail(counts, top.softmax(-1)) < 1e-9
    assert chi_square_tail(counts, (logits / 1.2).softmax(-1)) < 1e-9


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, 2.0, -math.inf]])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for temperature in (0.3, 1.0, 5.0):
        tokens, logprobs = draw_tokens(
            logits.expand(2, -1), ends, temperature=temperature
        )
        assert tokens.tolist() == [1, 4]
        assert logprobs.isfinite().all()


def test_p31_half_precision_logits_are_raised_before_the_softmax():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = torch.full((64,), 0.5, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms, temperature=0.7)
    exact = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])
    assert (logprobs - exact.squeeze(1)).abs().max() < 1e-5


@pytest.mark.usefixtures("engine")
def test_a_bfloat16_model_stays_near_its_own_full_forward_pass():
    policy = tiny_policy()
    policy = replace(policy, model=policy.model.to(torch.bfloat16))
    rollouts = sample(policy, PROBLEMS, k=2, max_new_tokens=24)
    gaps = []
    for rollout in rollouts:
        assert max(rollout.logprobs) <= 0
        expected = full_logits(policy, rollout).log_softmax(-1)
        expected = expected.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        gaps.append((expected - torch.tensor(rollout.logprobs)).abs())
    assert torch.cat(gaps).mean() < 0.1


def test_p08_streams_are_uniform_distinct_and_pinned():
    keys = torch.tensor([stream_key(0, f"p/{i}", j) for i in range(50) for j in (0, 1)])
    assert len(set(keys.tolist())) == 100
    draws = torch.stack([next_uniforms(keys) for _ in range(400)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(draws.var() - 1 / 12) < 0.002
    together = torch.corrcoef(draws.T) - torch.eye(100)
    assert together.abs().max() < 0.3
    # The same on every platform, so that published samples can be drawn again
    state = torch.tensor([stream_key(0, "gsm8k/test/0", 0)])
    pinned = [0.4484478985097555, 0.5357839006331201]
    assert [float(next_uniforms(state)) for _ in range(2)] == pinned


@pytest.mark.usefixtures("engine")
def test_order_lengths_and_finish():
    policy = replace(tiny_policy(), eos_id=40)
    rollouts = sample(policy, PROBLEMS, k=5, temperature=1.5, max_new_tokens=48)
    names = [(p.id, j) for p in PROBLEMS for j in range(5)]
    assert [(r.problem_id, r.sample) for r in rollouts] == names
    assert {r.finished for r in rollouts} == {True, False}
    for rollout in rollouts:
        assert len(rollout.tokens) == len(rollout.logprobs) <= 48
        assert rollout.finished == (rollout.tokens[-1] == policy.eos_id)
        assert policy.eos_id not in rollout.tokens[:-1]
        assert rollout.finished or len(rollout.tokens) == 48
        body = rollout.tokens[:-1] if rollout.finished else rollout.tokens
        assert rollout.text == policy.decode(body)


@pytest.mark.usefixtures("engine")
def test_one_token_and_no_problem_and_the_same_problem_twice():
    policy = tiny_policy()
    assert sample(policy, [], k=3) == []
    single = sample(policy, PROBLEMS, k=3, max_new_tokens=1)
    assert [len(r.tokens) for r in single] == [1] * 12
    twice = sample(policy, PROBLEMS[:1] * 2, k=2, max_new_tokens=8)
    assert twice[:2] == twice[2:]


def test_shots_stand_in_the_prompt():
    policy = tiny_policy()
    (rollout,) = sample(policy, PROBLEMS[:1], shots=PROBLEMS[1:3], max_new_tokens=4)
    text = format_prompt(PROBLEMS[0], PROBLEMS[1:3])
    assert list(rollout.prompt_tokens) == policy.encode_prompt(text)
    assert worst_error(policy, [rollout], lambda x: x.log_softmax(-1)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_prompts_begin_with_is_computed_once(kind):
    policy, shots = tiny_policy(kind), PROBLEMS[1:3]
    asked = {"shots": shots, "k": 3, "max_new_tokens": 24, "temperature": 1.0}
    shapes = []

    def see(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    sample(policy, PROBLEMS, **asked)  # the model is checked
    with policy.model.register_forward_pre_hook(see, with_kwargs=True):
        together = sample(policy, PROBLEMS, **asked)
    prompts = [r.prompt_tokens for r in together[::3]]
    opening = opening_of(prompts)
    assert opening > len(policy.encode_prompt(format_prompt(shots[0])))
    assert shapes[:2] == [
        (1, opening),
        (len(PROBLEMS), max(map(len, prompts)) - opening),
    ]
    assert worst_error(policy, together, lambda x: x.log_softmax(-1)) < 1e-4
    alone = [r for p in PROBLEMS for r in sample(policy, [p], **asked)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_each_question_may_have_a_number_of_samples_of_its_own():
    policy, options = tiny_policy(), {"max_new_tokens": 8, "seed": 5}
    whole = by_name(sample(policy, PROBLEMS, k=3, **options))
    for ks in ([1, 3, 2, 1], np.array([1, 3, 2, 1])):
        some = sample(policy, PROBLEMS, k=ks, **options)
        assert [r.problem_id for r in some[:4]] == [PROBLEMS[0].id] + [
            PROBLEMS[1].id
        ] * 3
        assert by_name(some).items() <= whole.items()
    one = sample(policy, PROBLEMS, k=np.int64(2), **options)
    assert by_name(one) == by_name(sample(policy, PROBLEMS, k=2, **options))
    with pytest.raises(ValueError, match="2 numbers k for 4 prompts"):
        sample(policy, PROBLEMS, k=[1, 2], **options)


def test_an_opening_leaves_each_its_last_token_and_saves_a_tenth():
    long, short = tuple(range(20)), tuple(range(8))
    assert opening_of([(*long, 30), (*long, 31, 32)]) == 20
    assert opening_of([long, short]) == 7
    assert opening_of([long, long]) == 19
    assert opening_of([long]) == 0  # there is nobody to share it with
    assert opening_of([(1, *short), (1, *long[1:]), (1, 9, 9)]) == 0


@pytest.mark.usefixtures("engine")
def test_after_examples_an_answer_ends_where_it_asks_a_question_itself():
    policy, problem = tiny_policy(), PROBLEMS[1]
    said = " 5\n\nQ: 1+1?\nA: 2"
    found = []
    for shots in ((), PROBLEMS[2:]):
        prompt = policy.encode_prompt(format_prompt(problem, shots))
        reciter = replace(policy, model=reciting(policy, said, after=len(prompt)))
        found.append(sample(reciter, [problem], k=3, shots=shots, max_new_tokens=12))
    plain, shown = found
    assert {(r.text, r.finished) for r in plain} == {(said[:12], False)}
    assert {(r.text, r.finished) for r in shown} == {(" 5\n\nQ:", True)}
    for rollout in shown:
        assert policy.decode(rollout.tokens) == rollout.text
        assert len(rollout.logprobs) == len(rollout.tokens) == 6


def reciting(policy, text: str, *, after: int) -> nn.Module:
    """The model, but behind a prompt of so many tokens it says a text."""
    said = torch.tensor(policy.encode_response("", text))
    model = copy.deepcopy(policy.model)

    def recite(module, args, kwargs, output):
        step = (kwargs["position_ids"][:, -1] + 1 - after).clamp(0, len(said) - 1)
        logits = torch.full_like(output.logits[:, -1], -1e4)
        output.logits[:, -1] = logits.scatter(1, said[step][:, None], 1e4)
        return output

    with torch.no_grad():
        sample(replace(policy, model=model), PROBLEMS, max_new_tokens=1)  # checked
    model.register_forward_hook(recite, with_kwargs=True)
    return model


@pytest.mark.usefixtures("engine")
def test_p06_dropout_never_acts_and_the_mode_is_left_as_it_was():
    policy = tiny_policy("gpt2")
    for module in policy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    quiet = sample(policy, PROBLEMS, k=2, max_new_tokens=12)
    policy.model.train()
    policy.model.transformer.h[0].eval()
    assert sample(policy, PROBLEMS, k=2, max_new_tokens=12) == quiet
    assert policy.model.training
    assert not policy.model.transformer.h[0].training
    assert policy.model.config._attn_implementation != ATTENTION_NAME


@pytest.mark.usefixtures("engine")
def test_an_abandoned_or_failed_job_gives_the_model_back():
    policy = tiny_policy()
    policy.model.train()
    attention = policy.model.config._attn_implementation
    jobs = sample_groups(policy, PROBLEMS, k=2, max_new_tokens=4)
    next(jobs)
    assert policy.model.training
    assert policy.model.config._attn_implementation == attention
    del jobs
    gc.collect()

    def fail(*args):
        raise RuntimeError("stop here")

    handle = policy.model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        sample(policy, PROBLEMS, max_new_tokens=4)
    handle.remove()
    assert policy.model.training
    assert policy.model.config._attn_implementation == attention


@pytest.mark.usefixtures("engine")
def test_p07_weights_are_read_anew_each_time():
    policy = tiny_policy()
    before = sample(policy, PROBLEMS, temperature=0, max_new_tokens=16)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += 0.05 * torch.ones_like(weight).cumsum(-1).cos()
    after = sample(policy, PROBLEMS, temperature=0, max_new_tokens=16)
    assert after != before
    assert worst_error(policy, after, lambda x: x.log_softmax(-1)) < 1e-4


def test_training_goes_on_after_sampling():
    policy = tiny_policy()
    rollouts = sample(policy, PROBLEMS[:1], max_new_tokens=4)
    ids = torch.tensor([rollouts[0].prompt_tokens])
    policy.model(ids, labels=ids).loss.backward()
    assert all(w.grad is not None for w in policy.model.parameters())


def test_memory_stays_within_the_budget(monkeypatch):
    policy = replace(tiny_policy("qwen2"), eos_id=40)
    problems = [Problem(f"m/{i}", "x" * (1 + 7 * i % 60), "", "0") for i in range(60)]
    budget = 1_000_000
    held, rows, samples = [], [], []
    decode = cohort_engine.CohortEngine.decode

    def spy(engine):
        decode(engine)
        slabs = [slab for cohort in engine.cohorts for slab in cohort.store.slabs]
        held.append(sum(slab.untyped_storage().nbytes() for slab in slabs))
        rows.append(sum(cohort.rows for cohort in engine.cohorts))
        samples.append(sum(cohort.samples for cohort in engine.cohorts))

    monkeypatch.setattr(cohort_engine.CohortEngine, "decode", spy)
    options = {"k": 8, "max_new_tokens": 40, "temperature": 1.5}
    small = by_name(sample(policy, problems, byte_budget=budget, **options))
    assert max(held) <= budget
    assert 4 <= max(rows) <= max(samples) < len(problems)  # 480 samples, by and by
    monkeypatch.undo()
    assert small == by_name(sample(policy, problems, **options))


def test_a_question_comes_when_its_samples_have_ended_and_not_with_its_cohort(
    monkeypatch,
):
    policy = replace(tiny_policy(), more_eos_ids=tuple(range(40, 60)))
    passes, seen = count_rows(monkeypatch), {}
    options = {"k": 1, "max_new_tokens": 64, "temperature": 1.5}
    for index, group in sample_groups(policy, PROBLEMS, **options):
        seen[index] = (len(passes), max(len(r.tokens) for r in group))
    assert len({length for _, length in seen.values()}) > 1
    # The last token of a sample needs no pass; the model is borrowed for some at a time
    assert all(n - 1 <= count < n + cohort_engine.STEPS for count, n in seen.values())
    counts, lengths = zip(*seen.values(), strict=True)
    assert min(counts) < max(lengths) - 1  # which its cohort would have waited for


@pytest.mark.usefixtures("engine")
def test_groups_come_as_they_finish():
    policy = replace(tiny_policy(), eos_id=40)
    budget = 250_000  # a few rows at a time
    seen = dict(
        sample_groups(policy, PROBLEMS, k=4, max_new_tokens=30, byte_budget=budget)
    )
    together = [r for index in range(4) for r in seen[index]]
    whole = sample(policy, PROBLEMS, k=4, max_new_tokens=30)
    assert by_name(together) == by_name(whole)
    assert list(by_name(together)) == list(by_name(whole))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least one sample"),
        ({"temperature": -1.0}, "greedy"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"max_new_tokens": 500}, "512 positions.*Lower max_new_tokens to at most"),
        ({"byte_budget": 1000}, "Raise byte_budget"),
        ({"byte_budget": 0}, "Raise byte_budget"),
        ({"temperature": 1e-39}, r"temperature=1e-39.* give 0 \(greedy\)"),
        ({"max_new_tokens": 3.0}, r"max_new_tokens=3\.0: give a whole number"),
    ],
)
def test_impossible_settings_are_refused_with_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_policy(), PROBLEMS, **options)


def test_one_row_that_is_not_a_number_is_seen_in_every_draw():
    logits = torch.zeros(9, 5)
    logits[4, 2] = math.nan
    uniforms = torch.full((9,), 0.3, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms, temperature=1.0)
    assert logprobs.isnan().all()
    assert tokens.max() < 5


def test_outputs_that_are_not_numbers_are_reported():
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        sample(policy, PROBLEMS, max_new_tokens=4)


def test_a_sliding_window_that_is_too_short_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    policy = tiny_policy()
    config = MistralConfig(
        vocab_size=policy.model.config.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=70,
    )
    policy = replace(policy, model=MistralForCausalLM(config).eval())
    sample(policy, PROBLEMS[:1], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"sliding window of 70.* Up to 70 tokens"):
        sample(policy, PROBLEMS[:1], max_new_tokens=40)


def test_an_adapter_is_sampled_with():
    from peft import LoraConfig, get_peft_model

    policy = tiny_policy()
    plain = sample(policy, PROBLEMS, temperature=0, max_new_tokens=12)
    adapted = get_peft_model(
        policy.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    policy = replace(policy, model=adapted)
    same = sample(policy, PROBLEMS, temperature=0, max_new_tokens=12)
    assert by_name(same) == by_name(plain)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    moved = sample(policy, PROBLEMS, temperature=0, max_new_tokens=12)
    assert by_name(moved) != by_name(plain)
    assert worst_error(policy, moved, lambda x: x.log_softmax(-1)) < 1e-4


def prompts_of(policy, **more):
    return [
        Prompt(p.id, tuple(policy.encode_prompt(format_prompt(p))), **more)
        for p in PROBLEMS
    ]


def test_prompts_as_tokens_are_answered_as_problems_are():
    policy = tiny_policy()
    options = {"k": 3, "max_new_tokens": 20, "seed": 4}
    plain = sample(policy, PROBLEMS, **options)
    assert sample_prompts(policy, prompts_of(policy), **options) == plain
    # Another stream is another draw
    other = sample_prompts(policy, prompts_of(policy, stream="/2"), **options)
    assert [r.tokens for r in other] != [r.tokens for r in plain]


def test_what_stands_in_the_prompt_is_no_action():
    policy = tiny_policy()
    whole = sample(policy, PROBLEMS, temperature=0, max_new_tokens=20)
    halves = [Prompt(r.problem_id, r.prompt_tokens + r.tokens[:8]) for r in whole]
    rest = sample_prompts(policy, halves, temperature=0, max_new_tokens=12)
    assert [r.tokens for r in rest] == [r.tokens[8:] for r in whole]
    for first, second in zip(whole, rest, strict=True):
        assert second.prompt_tokens == first.prompt_tokens + first.tokens[:8]
        assert second.logprobs == pytest.approx(first.logprobs[8:], abs=1e-4)


def test_any_of_several_eos_ids_ends_a_rollout():
    policy = tiny_policy()
    options = {"k": 8, "max_new_tokens": 40, "seed": 1}
    plain = sample(policy, PROBLEMS, **options)
    other = plain[0].tokens[5]
    policy = replace(policy, more_eos_ids=(other,))
    assert policy.eos_ids == (policy.eos_id, other)
    rollouts = sample(policy, PROBLEMS, **options)
    assert any(r.tokens[-1] == other for r in rollouts)
    for whole, part in zip(plain, rollouts, strict=True):
        places = [i for i, t in enumerate(whole.tokens) if t in policy.eos_ids]
        assert part.tokens == whole.tokens[: places[0] + 1 if places else 40]
        assert part.finished == bool(places)
        body = part.tokens[:-1] if part.finished else part.tokens
        assert part.text == policy.decode(body)  # without what ended it


def test_no_pad_is_ever_looked_at_even_one_without_an_embedding():
    plain = tiny_policy(pad=False)
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == plain.model.config.vocab_size
    policy = make_policy(plain.model, tokenizer, name="padded")
    options = {"k": 2, "max_new_tokens": 12}
    assert sample(policy, PROBLEMS, **options) == sample(plain, PROBLEMS, **options)
    prompts, answers = [[1, 5], [1]], [[7, 2], [8]]
    logprobs = score(policy, prompts, answers).logprobs
    assert torch.equal(logprobs, score(plain, prompts, answers).logprobs)


@pytest.mark.parametrize("token", [260, -1])
def test_tokens_that_the_model_has_no_embedding_for_are_refused(token):
    policy, prompts = tiny_policy(), [Prompt("p", (1, token))]
    told = f"token {token}, but the embedding.* 260 rows"
    with pytest.raises(ValueError, match=told):
        sample_prompts(policy, prompts, max_new_tokens=2)


def test_a_problem_that_is_no_unicode_is_named():
    odd = Problem("gsm8k/test/7", "Tom has 3 \ud83d pens.", "3", "3")
    with pytest.raises(
        ValueError, match=r"gsm8k/test/7.*surrogate.*'\\ud83d'"
    ) as error:
        sample(tiny_policy(), [*PROBLEMS, odd], max_new_tokens=2)
    assert str(error.value).isprintable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_draws_from_the_same_distribution(kind):
    policy = tiny_policy(kind)
    device = torch.device("cuda")
    policy = replace(policy, model=policy.model.to(device), device=device)
    rollouts = sample(policy, PROBLEMS, k=4, max_new_tokens=48)
    assert worst_error(policy, rollouts, lambda x: x.log_softmax(-1)) < 1e-3

"""Sequences end to end: exact, never across examples, and fewer calls of operators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, tiny_family, tiny_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlreason.algorithms import batching
from rlreason.algorithms.batching import Example, tokens_that_fit
from rlreason.algorithms.finetune import accumulate_gradients, nll
from rlreason.policy import packing
from rlreason.policy.layout import (
    Layout,
    alike_batches,
    in_order,
    lay_out,
    shares_of,
)
from rlreason.policy.load import PolicyError
from rlreason.policy.logprobs import (
    pad_batch,
    response_logits,
    token_logprobs,
    trunk_of,
)
from rlreason.policy.packing import Inputs, pack

PROMPTS = [[1, 40, 50, 60], [1, 41], [1, 90, 95], [1, 42, 43]]
RESPONSES = [[70, 71, 72, 2], [73, 2], [80, 81, 82, 83, 84, 2], [2]]
BATCH = [Example(tuple(p), tuple(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def gradients(policy) -> Tensor:
    found = torch.cat([w.grad.flatten() for w in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    return found


def one_at_a_time(policy) -> tuple[float, Tensor]:
    """Loss and gradient of the batch, each example a plain pass of the model's own."""
    count, total = sum(map(len, RESPONSES)), 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = policy.model(torch.tensor([prompt + response])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        loss = -logprobs[range(len(response)), response].sum() / count
        loss.backward()
        total += loss.item()
    return total, gradients(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_has_the_loss_and_gradient_of_its_examples_alone(kind):
    policy = tiny_policy(kind)
    loss, expected = one_at_a_time(policy)
    assert "packed" in pad_batch(PROMPTS, RESPONSES).inputs(policy.model).options
    found = accumulate_gradients(policy, BATCH, 10_000)
    assert found == pytest.approx(loss, rel=1e-5)
    scale = expected.abs().max()
    assert (gradients(policy) - expected).abs().max() < 1e-5 * scale


def test_attention_across_examples_would_be_seen():
    policy = tiny_policy()
    batch = pad_batch(PROMPTS, RESPONSES)
    right = batch.inputs(policy.model)
    # Wrong: one sequence as far as attention is concerned, positions as they are
    weight = policy.model.get_input_embeddings().weight
    across = pack(lay_out([batch.layout.tokens.tolist()]), weight).options["packed"]
    wrong = Inputs(right.input_ids, right.options | {"packed": across}, right.places)
    logits = [response_logits(policy.model, batch, each) for each in (right, wrong)]
    apart = (logits[0] - logits[1]).abs().amax(-1)
    assert apart[batch.rows == 0].max() < 1e-5  # the first has nothing before it
    assert apart[batch.rows == 1].max() > 1e-3


@pytest.mark.parametrize("why", ["eager", "window", "leak"])
def test_a_model_that_does_not_pack_gets_padded_rows(why, monkeypatch):
    policy = tiny_policy()
    model = policy.model
    loss, expected = one_at_a_time(policy)
    if why == "eager":
        model.set_attn_implementation("eager")
    elif why == "window":
        model.config.sliding_window = 6  # some sequences are longer
    else:  # a family that looks across sequences is found out

        def leaky(layout: Layout, weight: Tensor) -> Inputs:
            everything = layout.tokens[layout.places].flatten().tolist()
            found = pack(lay_out([everything]), weight)
            return replace(found, places=found.places.view(layout.places.shape))

        monkeypatch.setattr(packing, "pack", leaky)
    own = model.config._attn_implementation
    inputs = pad_batch(PROMPTS, RESPONSES).inputs(model)
    assert inputs.input_ids.shape == (4, 9)
    if why != "window":
        assert trunk_of(model).config._attn_implementation == own
    assert accumulate_gradients(policy, BATCH, 10_000) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradients(policy), expected, atol=1e-5)


def plain_logprobs(policy, prompt, response) -> Tensor:
    """Of a response, by a plain pass of the model's own, alone."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(response)), response]


def gap_of(policy, prompts, responses) -> float:
    """Largest error of the batch's log-probabilities."""
    logprobs, _ = token_logprobs(policy.model, prompts, responses)
    worst = 0.0
    for row, prompt, response in zip(logprobs, prompts, responses, strict=True):
        apart = row[: len(response)] - plain_logprobs(policy, prompt, response)
        worst = max(worst, apart.abs().max().item())
    return worst


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_is_changed_after_a_first_batch_is_seen(attention):
    policy = tiny_policy()
    for _ in range(2):
        assert gap_of(policy, PROMPTS, RESPONSES) < 1e-5
        policy.model.set_attn_implementation(attention)
    packed = "packed" in pad_batch(PROMPTS, RESPONSES).inputs(policy.model).options
    assert packed == (attention == "sdpa")


ROWS = [[1, *range(20, n)] for n in (70, 60, 25)], [[80, 2], [81, 82, 2], [83, 2]]


@pytest.mark.parametrize("longest", [70, 12])
def test_what_a_model_does_past_any_number_of_its_configuration_is_seen(longest):
    """Llama 4 scales queries past one, and counts positions in rows for that."""
    policy = tiny_family("llama4_text", floor_scale=24, no_rope_layers=[1, 0])
    few = pad_batch([[1, 5]], [[7]]).inputs(policy.model)
    assert "packed" in few.options
    assert gap_of(policy, [row[:longest] for row in ROWS[0]], ROWS[1]) < 1e-5


STRETCHED = {
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_longer_sequence_beside_it_never_changes_how_another_is_read(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **STRETCHED[kind]}
    more = {"original_max_position_embeddings": 40} if kind == "longrope" else {}
    family = "phi3" if kind == "longrope" else "llama"
    room = 512 if kind == "longrope" else 40
    options = {"rope_parameters": rope, "max_position_embeddings": room, **more}
    policy = tiny_family(family, **options)
    prompts, responses = ROWS
    with pytest.raises(PolicyError, match=f"{kind!r}.* up to 40|{kind!r}.* than 40"):
        gap_of(policy, prompts, responses)
    # Wrong: what came of it
    alone = plain_logprobs(policy, prompts[2], responses[2])
    batch = pad_batch(prompts, responses)
    logits = response_logits(policy.model, batch, packing.pad(batch.input_ids))
    beside = logits.log_softmax(-1).gather(1, batch.targets[:, None])[batch.rows == 2]
    assert (beside[:, 0] - alone).abs().max() > 0.01
    assert gap_of(policy, prompts[2:], responses[2:]) < 1e-5
    if kind == "longrope":
        assert gap_of(policy, prompts[:2], responses[:2]) < 1e-5


def test_a_family_without_a_number_of_positions_is_scored():
    policy = tiny_family("bloom")
    assert getattr(policy.model.config, "max_position_embeddings", None) is None
    assert gap_of(policy, *ROWS) < 1e-5


# --- Common beginnings ----------------------------------------------------------------

EXAMPLES = [1, 40, 50, 60, 55, 44, 45, 46, 47, 48]
ASKED = [[*EXAMPLES, 20, 21], [*EXAMPLES, 20, 22, 23, 24]]
SAMPLES = [
    (ASKED[0], [70, 71, 72, 2]),
    (ASKED[1], [2]),
    (ASKED[0], [70, 71, 80, 81, 82, 83, 2]),
    (ASKED[1], [90, 2]),
    (ASKED[0], [70, 71, 72, 2]),  # once more
    ([1, 30, 31], [33, 34, 2]),
]


def token_by_token(policy) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities of the samples, each by a pass of its own, and a gradient."""
    logprobs = []
    for prompt, response in SAMPLES:
        logits = policy.model(torch.tensor([prompt + response])).logits[0]
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(every[range(len(response)), response])
    weighted(logprobs).backward()
    return [each.detach() for each in logprobs], gradients(policy)


def weighted(logprobs: list[Tensor]) -> Tensor:
    """A loss to which each token counts differently."""
    every = torch.cat(list(logprobs))
    return (every * torch.arange(1.0, len(every) + 1).cos()).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_beginning_goes_through_once_and_nothing_else_changes(kind):
    policy = tiny_policy(kind)
    expected, gradient = token_by_token(policy)
    prompts, responses = map(list, zip(*SAMPLES, strict=True))
    inputs = pad_batch(prompts, responses).inputs(policy.model)
    # Examples, questions, and what each response or its repeat has of its own
    assert inputs.input_ids.shape == (1, 10 + 2 + 3 + 4 + 1 + 5 + 2 + 1 + 5)
    logprobs, _ = token_logprobs(policy.model, prompts, responses)
    found = [row[: len(r)] for row, r in zip(logprobs, responses, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    weighted(found).backward()
    assert (gradients(policy) - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("wrong", ["all that follows too", "its own alone"])
def test_attention_to_more_or_less_than_the_beginning_would_be_seen(wrong, monkeypatch):
    policy = tiny_policy()
    packing.packs(trunk_of(policy.model), 0)
    expected, _ = token_by_token(policy)
    right = packing._padded_rows

    def rows(*given):
        for part in right(*given):
            seen = part.mask == 0
            shared = seen[:, :, :1].sum(-1, keepdim=True) - 1
            own = torch.arange(seen.shape[-1]) >= shared
            kept = seen & own if wrong == "its own alone" else torch.ones_like(seen)
            yield replace(part, mask=torch.zeros(kept.shape).masked_fill(~kept, -1e9))

    monkeypatch.setattr(packing, "_padded_rows", rows)
    prompts, responses = map(list, zip(*SAMPLES, strict=True))
    logprobs, mask = token_logprobs(policy.model, prompts, responses)
    assert (logprobs[mask] - torch.cat(expected)).abs().max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_in_half_precision_shares_beginnings_too():
    policy = tiny_policy()
    expected, gradient = token_by_token(policy)
    policy = replace(policy, model=policy.model.cuda().bfloat16())
    prompts, responses = map(list, zip(*SAMPLES, strict=True))
    assert "packed" in pad_batch(prompts, responses).inputs(policy.model).options
    logprobs, mask = token_logprobs(policy.model, prompts, responses)
    assert (logprobs[mask].cpu() - torch.cat(expected)).abs().max() < 0.15
    weighted([logprobs[mask].cpu()]).backward()
    found = gradients(policy).float().cpu()
    assert torch.cosine_similarity(found, gradient, dim=0) > 0.999


def test_few_common_tokens_are_not_worth_it():
    far = [(1, *range(n, n + 30)) for n in (10, 50, 90)]
    assert not lay_out(far).begins.any()
    assert lay_out([(*range(10), *row) for row in far]).begins.tolist() == [0, 11, 11]


sequences = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple),
    min_size=1,
    max_size=12,
)


@given(sequences, st.booleans())
def test_a_layout_holds_each_beginning_where_it_says(rows, alike):
    rows = [(*range(8), *row) for row in rows] if alike else rows
    layout = lay_out(rows)
    for row, places in zip(rows, layout.places, strict=True):
        assert tuple(layout.tokens[places[: len(row)]]) == row
        assert layout.columns[places[: len(row)]].tolist() == [*range(len(row))]
    # What a token stands for is its whole beginning, so two places are never one
    beginnings: dict[int, set] = {}
    for row, places in zip(rows, layout.places, strict=True):
        for n in range(len(row)):
            beginnings.setdefault(int(places[n]), set()).add(row[: n + 1])
    assert all(len(found) == 1 for found in beginnings.values())


texts = st.lists(
    st.tuples(*[st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)] * 2),
    min_size=1,
    max_size=12,
)


def alike(rows: list, shared: bool) -> list:
    return [((*range(8), *p), r) for p, r in rows] if shared else rows


@given(texts, st.integers(1, 60), st.booleans())
def test_alike_batches_hold_each_item_once_within_the_budget(rows, most, shared):
    rows = alike(rows, shared)
    every = range(len(rows))
    batches = [*alike_batches(every, max_tokens=most, text=rows.__getitem__)]
    assert sorted(i for mb in batches for i in mb) == [*every]
    for mb in batches:
        whole = [p + r for p, r in (rows[i] for i in mb)]
        looked_at = len(mb) * max(map(len, whole)) / 4
        own = len(lay_out(whole).tokens)
        told = sum(len(rows[i][1]) for i in mb)
        assert len(mb) == 1 or own <= most / 0.9
        assert len(mb) == 1 or max(looked_at, told) <= most


@given(texts, st.integers(1, 5), st.booleans())
def test_shares_are_about_equal_and_hold_each_item_once(rows, count, shared):
    rows = alike(rows, shared)
    shares = shares_of(range(len(rows)), count, rows.__getitem__)
    assert len(shares) == count
    assert sorted(i for share in shares for i in share) == [*range(len(rows))]

    def own(share) -> int:
        whole = [rows[i][0] + rows[i][1] for i in share]
        return sum(map(len, whole)) - sum(in_order(whole)[1])

    longest = max(len(p + r) for p, r in rows)
    # A share begins in the middle of what it begins alike with
    assert max(map(own, shares)) <= own(range(len(rows))) / count + 2 * longest


def test_samples_of_a_question_stay_in_one_share():
    rows = [((q,) * 30, (s, s)) for s in range(4) for q in range(6)]
    shares = shares_of(range(24), 3, rows.__getitem__)
    assert [len({rows[i][0] for i in share}) for share in shares] == [2, 2, 2]
    # Wrong: every fifth, which may be of any question
    assert max(len({rows[i][0] for i in range(n, 24, 5)}) for n in range(5)) == 5


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def test_an_update_of_64_examples_at_30_layers_takes_a_third_of_the_calls(monkeypatch):
    """53,265 were counted with padded micro-batches of 1,024 tokens, 8,803 now."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    policy = replace(tiny_policy(), model=LlamaForCausalLM(config))
    sizes = torch.randint(54, 167, (64,), generator=torch.Generator().manual_seed(0))
    batch = [
        Example(tuple(range(3, 3 + n // 2)), tuple(range(3, 3 + n - n // 2)))
        for n in sizes.tolist()
    ]
    monkeypatch.setattr(batching, "CPU_ROOM", 2**30)  # a GPU has more
    max_tokens = tokens_that_fit(partial(nll, policy), batch)
    with Calls() as calls:
        accumulate_gradients(policy, batch, max_tokens)
    assert calls.count < 53_265 / 3


def test_what_fits_grows_with_the_room_and_adds_no_gradient(monkeypatch):
    policy = tiny_policy()
    loss = partial(nll, policy)
    some = tokens_that_fit(loss, BATCH)
    monkeypatch.setattr(batching, "CPU_ROOM", 2 * batching.CPU_ROOM)
    assert tokens_that_fit(loss, BATCH) == pytest.approx(2 * some, abs=1)
    assert all(weight.grad is None for weight in policy.model.parameters())

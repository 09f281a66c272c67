"""Log-probabilities of a padded batch against one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import KINDS, tiny_policy
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
)

from rlreason.policy.logprobs import (
    first_call,
    logprobs_and_entropy,
    logprobs_of,
    pad_batch,
    response_logits,
    response_logprobs,
    token_logprobs,
    trunk_of,
)

PROMPTS = [[1, 20, 30], [1, 7, 8, 9, 10, 11], [1], [1, 50, 60, 70]]
RESPONSES = [[40, 41, 42, 43, 2], [44, 2], [45, 0, 2, 46, 47], [2]]


def naive(policy, prompt, response, temperature=1.0) -> torch.Tensor:
    """The definition: one sequence, no padding, all logits."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logprobs[i, t] for i, t in zip(rows, response, strict=True)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_p13_a_padded_batch_equals_single_sequences(kind, temperature):
    policy = tiny_policy(kind)
    logprobs, mask = token_logprobs(
        policy.model, PROMPTS, RESPONSES, temperature=temperature
    )
    assert logprobs.shape == mask.shape == (4, 5)
    assert mask.sum(1).tolist() == [5, 2, 5, 1]
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = naive(policy, prompt, response, temperature)
        assert torch.allclose(logprobs[i, : len(response)], expected, atol=1e-5)
        assert (logprobs[i, len(response) :] == 0).all()


def test_p15_the_comparison_rejects_a_shift_by_one():
    policy = tiny_policy()
    logprobs, _ = token_logprobs(policy.model, PROMPTS, RESPONSES)
    expected = naive(policy, PROMPTS[0], RESPONSES[0])
    assert not torch.allclose(logprobs[0, 1:5], expected[:-1], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_fills_the_batch_up_does_not_matter(kind):
    policy = tiny_policy(kind, pad=False)
    assert policy.pad_id == policy.eos_id
    results = [
        token_logprobs(policy.model, PROMPTS, RESPONSES, pad_id=pad_id)[0]
        for pad_id in (0, policy.eos_id, 77)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradients_equal_those_of_single_sequences():
    policy = tiny_policy()
    logprobs, mask = token_logprobs(policy.model, PROMPTS, RESPONSES)
    (logprobs * mask).sum().backward()
    batched = [w.grad.clone() for w in policy.model.parameters()]
    policy.model.zero_grad()
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    sum(naive(policy, *pair).sum() for pair in pairs).backward()
    for one, weight in zip(batched, policy.model.parameters(), strict=True):
        assert torch.allclose(one, weight.grad, atol=1e-4)


def test_logits_are_computed_for_response_tokens_alone():
    policy = tiny_policy()
    batch = pad_batch(PROMPTS, RESPONSES)
    logits = response_logits(policy.model, batch)
    assert logits.shape == (13, policy.model.config.vocab_size)
    assert batch.targets.tolist() == [t for response in RESPONSES for t in response]
    # The output layer is itself again afterwards
    whole = policy.model(torch.tensor([PROMPTS[1]])).logits
    assert whole.shape[1] == 6


def test_unpack_lays_values_out_by_sequence():
    batch = pad_batch(PROMPTS, RESPONSES)
    values = batch.unpack(torch.arange(1.0, 14.0))
    assert values.tolist() == [
        [1, 2, 3, 4, 5],
        [6, 7, 0, 0, 0],
        [8, 9, 10, 11, 12],
        [13, 0, 0, 0, 0],
    ]


def test_an_empty_response_has_no_logprobs():
    policy = tiny_policy()
    logprobs, mask = token_logprobs(policy.model, PROMPTS[:2], [[40, 41], []])
    assert mask.tolist() == [[True, True], [False, False]]
    assert torch.allclose(logprobs[0], naive(policy, PROMPTS[0], [40, 41]), atol=1e-5)


def test_p31_half_precision_logits_are_raised_before_the_softmax():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(64)
    exact = (logits.double() / 0.7).log_softmax(-1)[targets, targets]
    assert (logprobs_of(logits, targets, temperature=0.7) - exact).abs().max() < 1e-5
    in_half = (logits / 0.7).log_softmax(-1)[targets, targets]
    assert (in_half - exact).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("prompts", "responses", "options", "message"),
    [
        ([[1]], [[2]], {"temperature": 0}, "divides the logits"),
        ([[1], []], [[2], [3]], {}, "no tokens"),
        ([[1]], [], {}, "one response"),
        ([], [], {}, "at least one pair"),
    ],
)
def test_what_cannot_be_scored_is_refused(prompts, responses, options, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(tiny_policy().model, prompts, responses, **options)


def random_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def scaled_or_capped(name):
    """Models that do something to the logits behind the output layer."""
    cls, options = {
        "capped": (Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}),
        "multiplied": (CohereConfig, {"logit_scale": 0.3}),
        "divided": (GraniteConfig, {"logits_scaling": 4.0}),
    }[name]
    return random_model(
        cls(
            vocab_size=80,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.25,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
    )


def double_model(*, tied):
    """A model of float64 throughout (Llama's norm would round to float32)."""
    config = GPT2Config(
        vocab_size=7,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_positions=8,
        initializer_range=0.5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_model(config).double()


class EntropyWithoutGradient(torch.autograd.Function):
    """The wrong version: made for log-probabilities, with entropies as a by-product."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        return logprobs_and_entropy(logits, targets)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, targets = ctx.saved_tensors
        one_hot = torch.nn.functional.one_hot(targets, logits.shape[1])
        return grad_logprobs[:, None] * (one_hot - logits.softmax(-1)), None


def random_logits(rows=4, vocab=5):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return (2 * logits).requires_grad_(), torch.arange(rows) % vocab


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_p30_gradients_of_logprobs_and_entropy_are_right(temperature):
    logits, targets = random_logits()
    options = {"temperature": temperature}
    assert gradcheck(lambda x: logprobs_of(x, targets, **options), (logits,))
    assert gradcheck(lambda x: logprobs_and_entropy(x, targets, **options), (logits,))


def test_p30_wrong_a_backward_that_drops_the_gradient_of_the_entropy():
    logits, targets = random_logits()
    wrong = EntropyWithoutGradient.apply
    assert gradcheck(lambda x: wrong(x, targets)[0], (logits,))  # it looks right
    assert not gradcheck(lambda x: wrong(x, targets), (logits,), raise_exception=False)


@pytest.mark.parametrize("tied", [True, False])
def test_p30_gradients_through_chunks_are_right(tied):
    model = double_model(tied=tied)
    batch = pad_batch([[1, 3], [4]], [[5, 6, 2], [3, 0]])
    heads = {model.lm_head.weight, model.get_input_embeddings().weight}
    assert len(heads) == (1 if tied else 2)

    def run(*_):  # the weights themselves are what gradcheck moves
        return response_logprobs(model, batch, temperature=0.7, chunk=2)

    assert gradcheck(run, tuple(heads))

    def wrong(*_):
        logits = response_logits(model, batch)
        return EntropyWithoutGradient.apply(logits / 0.7, batch.targets)

    assert not gradcheck(wrong, tuple(heads), raise_exception=False)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_neither_values_nor_gradients(kind, chunk):
    found = []
    for size in (None, chunk):
        model = tiny_policy(kind).model
        batch = pad_batch(PROMPTS, RESPONSES)
        logprobs, entropy = response_logprobs(model, batch, temperature=0.7, chunk=size)
        (logprobs.exp().sum() + entropy.square().sum()).backward()
        found.append([logprobs, entropy, *(w.grad for w in model.parameters())])
        alone, none = response_logprobs(
            model, batch, temperature=0.7, entropy=False, chunk=size
        )
        assert none is None
        assert torch.allclose(alone, logprobs, atol=1e-5)
    for whole, chunked in zip(*found, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_all_that_is_held_of_the_logits(kind):
    model = tiny_policy(kind).model
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: rows.append(output.shape[-2])
    )
    batch = pad_batch(PROMPTS, RESPONSES)
    saved = []  # what is kept for the backward pass

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy = response_logprobs(model, batch, chunk=4)
    assert rows == [0, 4, 4, 4, 1]
    vocab = model.config.vocab_size
    weight = (vocab, model.config.hidden_size)
    assert not [s for s in saved if vocab in s and s not in (weight, weight[::-1])]
    (logprobs.sum() + entropy.sum()).backward()
    assert sorted(rows) == [0, 1, 1, *[4] * 6]  # each chunk once more


@pytest.mark.parametrize("name", ["capped", "multiplied", "divided"])
def test_chunks_see_what_happens_behind_the_output_layer(name):
    model = scaled_or_capped(name)
    batch = pad_batch(PROMPTS, RESPONSES)
    whole = torch.stack(response_logprobs(model, batch))
    chunked = torch.stack(response_logprobs(model, batch, chunk=4))
    assert torch.allclose(whole, chunked, atol=1e-5)
    # Wrong: the output layer applied by hand
    with first_call(trunk_of(model)) as seen:
        model(batch.input_ids, use_cache=False)
    hidden = seen["output"].last_hidden_state[batch.rows, batch.columns]
    by_hand = checkpoint(model.lm_head, hidden, use_reentrant=False)
    by_hand = torch.stack(logprobs_and_entropy(by_hand, batch.targets))
    assert (whole - by_hand).abs().max() > 0.1


def test_the_trunk_computes_again_after_an_error_in_a_chunk():
    model = tiny_policy().model
    batch = pad_batch(PROMPTS, RESPONSES)
    before = model(batch.input_ids).logits
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: output[:, 1:] if output.shape[1] == 4 else None
    )
    with pytest.raises(ValueError, match="batch_size"):
        response_logprobs(model, batch, entropy=False, chunk=4)
    handle.remove()
    assert torch.equal(model(batch.input_ids).logits, before)


def test_entropy_is_that_of_the_tempered_distribution_in_nats():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.5, -1.0]])
    targets = torch.tensor([0, 1])
    for temperature in (0.5, 1.0, 2.0):
        logprobs, entropy = logprobs_and_entropy(
            logits, targets, temperature=temperature
        )
        expected = torch.distributions.Categorical(logits=logits / temperature)
        assert torch.allclose(entropy, expected.entropy(), atol=1e-6)
        assert torch.allclose(logprobs, expected.log_prob(targets), atol=1e-6)
        assert entropy[0].item() == pytest.approx(math.log(4))


def test_a_token_of_probability_zero_adds_nothing_to_entropy_or_gradient():
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -1e6]], requires_grad=True)
    fewer = torch.tensor([[1.0, 2.0]], requires_grad=True)
    target = torch.tensor([1])
    for x in (logits, fewer):
        logprobs, entropy = logprobs_and_entropy(x, target)
        (3 * entropy + logprobs).sum().backward()
    assert torch.allclose(logits.grad[:, :2], fewer.grad)
    assert (logits.grad[:, 2:] == 0).all()
    # Wrong: p log p as it is written
    every = logits.log_softmax(-1)
    assert (every.exp() * every).sum().isnan()


def test_p31_half_precision_is_raised_before_entropies_too():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(64)
    exact = torch.stack(logprobs_and_entropy(logits.double(), targets, temperature=0.7))
    found = torch.stack(logprobs_and_entropy(logits, targets, temperature=0.7))
    assert exact.dtype == torch.float64
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5
    assert (found[0] <= 0).all()
    in_half = (logits / 0.7).log_softmax(-1)
    assert (-(in_half.exp() * in_half).sum(-1) - exact[1]).abs().max() > 1e-2


def test_p15_logprobs_of_a_model_of_three_tokens_are_known():
    """Token 1 is followed by 2, 2 by 0 and 0 by 1, each with odds of e^5 to 1."""
    model = random_model(
        GPT2Config(vocab_size=3, n_embd=3, n_layer=1, n_head=1, n_positions=8)
    )
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(3))
        model.transformer.ln_f.weight.fill_(1)
        model.lm_head.weight = torch.nn.Parameter(torch.eye(3).roll(1, 0))
        state = model.transformer(torch.tensor([[0]])).last_hidden_state[0, 0]
        model.lm_head.weight.mul_(5 / (state[0] - state[1]))
    likely, unlikely = (math.log(x / (math.exp(5) + 2)) for x in (math.exp(5), 1))
    for chunk in (None, 1):
        batch = pad_batch([[1], [0, 1]], [[2, 0, 1], [2, 2]])
        logprobs, _ = response_logprobs(model, batch, chunk=chunk)
        expected = [likely, likely, likely, likely, unlikely]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    assert batch.response_mask.sum(1).tolist() == [3, 2]
    assert batch.ends.tolist() == [3, 3]


def test_a_chunk_holds_one_row_at_least():
    with pytest.raises(ValueError, match="chunk=0"):
        response_logprobs(tiny_policy().model, pad_batch([[1]], [[2]]), chunk=0)

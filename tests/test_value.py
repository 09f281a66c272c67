"""Value functions on a shared trunk: what V(s) is, where it is read, what it moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import KINDS, tiny_family, tiny_policy, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig

from rlreason.policy.load import PolicyError, make_policy
from rlreason.policy.logprobs import first_call, token_logprobs, trunk_of
from rlreason.policy.lora import with_lora
from rlreason.policy.value import ValueSettings, new_value_function, score, score_values
from rlreason.policy.weights import load_tensors, trainable_tensors
from rlreason.settings import SettingsError, load_settings

PROMPTS = [[1, 20, 30], [1, 7, 8, 9, 10, 11], [1], [1, 50, 60, 70]]
RESPONSES = [[40, 41, 42, 43, 2], [44, 2], [45, 0, 2, 46, 47], []]
VALUE_KINDS = ("head", "branch", "network")


def value_function(policy, kind="branch", *, layers=1, detach=True, seed=0):
    """As made for a policy, and then with a linear layer that is not zero."""
    settings = ValueSettings(kind=kind, layers=layers, detach=detach)
    function = new_value_function(policy, settings)
    with torch.no_grad():
        function.weight.normal_(generator=torch.Generator().manual_seed(seed))
        function.bias.fill_(0.5)
    return function


def parameters_with_gradient(module: nn.Module) -> list[str]:
    return [n for n, w in module.named_parameters() if w.grad is not None]


@pytest.mark.parametrize("kind", VALUE_KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_p27_values_are_zero_before_the_first_update(model, kind):
    policy = tiny_policy(model)
    before = torch.get_rng_state()
    function = new_value_function(policy, ValueSettings(kind=kind, layers=2))
    assert torch.equal(before, torch.get_rng_state())
    scores = score(policy, PROMPTS, RESPONSES, value_function=function)
    assert (scores.values == 0).all()
    assert (scores.last_values == 0).all()
    # Wrong: a linear layer as torch initialises it is off at once
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        function.weight.copy_(nn.Linear(32, 1).weight[0])
    scores = score(policy, PROMPTS, RESPONSES, value_function=function)
    assert scores.values.abs().max() > 0.1


@pytest.mark.parametrize("kind", VALUE_KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_p15_a_value_is_that_of_the_tokens_before_it_and_of_nothing_else(model, kind):
    """Batch, padding and what follows do not matter; the last value is one further."""
    policy = tiny_policy(model)
    function = value_function(policy, kind)

    def of_state(tokens: list[int]) -> float:
        alone = score(policy, [tokens], [[]], value_function=function)
        return alone.last_values.item()

    with torch.no_grad():
        scores = score(policy, PROMPTS, RESPONSES, value_function=function)
        shifted = []
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            states = [of_state(prompt + response[:t]) for t in range(len(response) + 1)]
            found = [*scores.values[i, : len(response)], scores.last_values[i]]
            assert found == pytest.approx(states, abs=1e-5)
            assert (scores.values[i, len(response) :] == 0).all()
            shifted += [abs(a - b) for a, b in zip(found, states[1:], strict=False)]
    assert min(shifted) > 1e-2  # the wrong version: V of the state after the token


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model", KINDS)
def test_all_kinds_start_from_the_hidden_states_of_the_trunk(model, layers):
    policy = tiny_policy(model)
    with torch.no_grad():
        head, branch, network = (
            score(
                policy,
                PROMPTS,
                RESPONSES,
                value_function=value_function(policy, kind, layers=layers),
            ).values
            for kind in VALUE_KINDS
        )
    assert torch.allclose(branch, head, atol=1e-5)
    assert torch.allclose(network, head, atol=1e-5)


def test_a_branch_that_adds_positions_twice_is_another():
    policy = tiny_policy("gpt2")
    right, wrong = value_function(policy), value_function(policy)
    wrong.body.wpe = copy.deepcopy(trunk_of(policy.model).wpe)
    a, b = (
        score(policy, PROMPTS, RESPONSES, value_function=function).values
        for function in (right, wrong)
    )
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_the_rest_of_the_scores_does_not_depend_on_the_value_function(kind):
    policy = tiny_policy()
    plain = score(policy, PROMPTS, RESPONSES, temperature=0.7)
    assert plain.values is None
    assert plain.last_values is None
    function = value_function(policy, kind)
    full = score(policy, PROMPTS, RESPONSES, temperature=0.7, value_function=function)
    expected, mask = token_logprobs(policy.model, PROMPTS, RESPONSES, temperature=0.7)
    for scores in (plain, full):
        assert torch.allclose(scores.logprobs, expected, atol=1e-6)
        assert torch.equal(scores.response_mask, mask)
        assert (scores.entropy[~mask] == 0).all()
        assert (scores.entropy[mask] > 0).all()
    assert score(policy, PROMPTS, RESPONSES, entropy=False).entropy is None


@pytest.mark.parametrize("kind", VALUE_KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_p16_what_stands_after_the_end_changes_nothing(model, kind):
    policy = tiny_policy(model)
    function = value_function(policy, kind)
    first, *others = (
        score(
            replace(policy, pad_id=pad_id), PROMPTS, RESPONSES, value_function=function
        )
        for pad_id in (0, policy.eos_id, 77)
    )
    for scores in others:
        for name in ("logprobs", "entropy", "values", "last_values"):
            assert torch.equal(getattr(first, name), getattr(scores, name)), name


@pytest.mark.parametrize("kind", VALUE_KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_values_alone_are_those_of_the_score_and_teach_nothing_to_the_trunk(
    model, kind
):
    policy = tiny_policy(model)
    function = value_function(policy, kind, detach=False)
    expected = score(policy, PROMPTS, RESPONSES, value_function=function)
    values, mask = score_values(policy, PROMPTS, RESPONSES, function)
    assert torch.allclose(values, expected.values, atol=1e-5)
    assert torch.equal(mask, expected.response_mask)
    values.sum().backward()
    assert not parameters_with_gradient(policy.model)
    assert "weight" in parameters_with_gradient(function)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("kind", [None, *VALUE_KINDS])
def test_a_score_and_its_gradient_take_one_pass_of_the_trunk(kind, chunk):
    policy = tiny_policy()
    function = kind and value_function(policy, kind, detach=False)
    score(policy, PROMPTS, RESPONSES)  # the first asks whether the model packs
    calls = []
    for layer in trunk_of(policy.model).layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    scores = score(policy, PROMPTS, RESPONSES, value_function=function, chunk=chunk)
    total = scores.logprobs.sum() + scores.entropy.sum()
    (total if kind is None else total + scores.values.sum()).backward()
    assert len(calls) == len(trunk_of(policy.model).layers)
    calls.clear()  # the wrong version: one call for policy and another for values
    score(policy, PROMPTS, RESPONSES)
    score(policy, PROMPTS, RESPONSES, value_function=function)
    assert len(calls) == 2 * len(trunk_of(policy.model).layers)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", ["head", "branch"])
@pytest.mark.parametrize("model", KINDS)
def test_the_value_loss_reaches_the_trunk_only_where_asked(model, kind, detach):
    policy = tiny_policy(model)
    function = value_function(policy, kind, detach=detach)
    scores = score(policy, PROMPTS, RESPONSES, value_function=function)
    (scores.values.square().sum() + scores.last_values.square().sum()).backward()
    touched = parameters_with_gradient(policy.model)
    assert len(parameters_with_gradient(function)) == len([*function.parameters()])
    if detach:
        assert not touched
    else:
        # All below the branch, the embedding included; nothing beside or above it
        below = [name for name in touched if "embed" in name or "wte" in name]
        assert below
        assert not any("lm_head" in name for name in touched)
        if kind == "branch":
            assert not any(".1." in name or name == "norm.weight" for name in touched)


def test_a_network_is_apart_from_the_trunk_whatever_detach_says():
    policy = tiny_policy()
    function = value_function(policy, "network", detach=False)
    score(policy, PROMPTS, RESPONSES, value_function=function).values.sum().backward()
    assert not parameters_with_gradient(policy.model)


@pytest.mark.parametrize("kind", VALUE_KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_a_value_function_holds_its_own_weights_all_trainable(model, kind):
    policy = tiny_policy(model)
    function = value_function(policy, kind)
    theirs = {w.data_ptr() for w in policy.model.parameters()}
    for name, weight in function.named_parameters():
        assert weight.data_ptr() not in theirs, name
        assert weight.requires_grad, name
    score(policy, PROMPTS, RESPONSES, value_function=function).values.sum().backward()
    assert len(parameters_with_gradient(function)) == len([*function.parameters()])
    if kind == "branch":  # one of two layers, and no embedding
        trunk = sum(w.numel() for w in trunk_of(tiny_policy(model).model).parameters())
        assert sum(w.numel() for w in function.parameters()) < trunk / 2


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_values_can_be_learnt_and_kept(kind):
    policy = tiny_policy()
    before = copy.deepcopy(policy.model.state_dict())
    function = new_value_function(policy, ValueSettings(kind=kind, layers=1))
    optimizer = torch.optim.Adam(function.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        scores = score(policy, PROMPTS, RESPONSES, value_function=function)
        loss = (scores.values - 1.5)[scores.response_mask].square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, before[name]), name

    other = new_value_function(policy, ValueSettings(kind=kind, layers=1))
    load_tensors(trainable_tensors(other), trainable_tensors(function), of=other)
    a, b = (
        score(policy, PROMPTS, RESPONSES, value_function=f) for f in (function, other)
    )
    assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_a_policy_with_adapters_gets_its_value_function_before(kind):
    policy = with_lora(tiny_policy(), rank=2, alpha=4)
    with pytest.raises(PolicyError, match="has adapters: merge them first"):
        new_value_function(policy, ValueSettings(kind=kind, layers=1))


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_p50_gradients_do_not_change_with_gradient_checkpointing(kind):
    grads = []
    for checkpointing in (False, True):
        policy = tiny_policy()
        if checkpointing:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
        function = value_function(policy, kind, detach=False).train()
        scores = score(policy, PROMPTS, RESPONSES, value_function=function, chunk=4)
        (scores.logprobs + scores.entropy + scores.values).square().sum().backward()
        weights = [*policy.model.parameters(), *function.parameters()]
        grads.append([weight.grad for weight in weights])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(plain, again, atol=1e-5)


def test_half_precision_models_have_values_in_single_precision():
    policy = tiny_policy()
    policy.model.bfloat16()
    for kind in VALUE_KINDS:
        function = value_function(policy, kind)
        scores = score(policy, PROMPTS, RESPONSES, value_function=function)
        assert scores.values.dtype == scores.logprobs.dtype == torch.float32
        assert (scores.logprobs <= 0).all()  # pitfall 31


def test_more_layers_than_there_are_is_an_error_that_says_how_many():
    with pytest.raises(PolicyError, match="Set layers=2 or less"):
        new_value_function(tiny_policy(), ValueSettings())


def test_an_architecture_that_a_branch_does_not_fit_is_refused():
    """Granite multiplies embeddings inside the trunk, so a branch would do it twice."""
    tokenizer = tiny_tokenizer()
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        embedding_multiplier=12.0,
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    policy = make_policy(model, tokenizer, name="granite")
    with pytest.raises(PolicyError, match="Use the kind 'head' or 'network'"):
        new_value_function(policy, ValueSettings(layers=1))
    for kind in ("head", "network"):
        function = new_value_function(policy, ValueSettings(kind=kind))
        assert (
            score(policy, PROMPTS, RESPONSES, value_function=function).values == 0
        ).all()


def test_layers_may_be_wider_than_what_a_trunk_gives_of_a_token():
    """Of OPT-350m a branch would need what enters a layer to be narrow as well."""
    policy = tiny_family("opt", word_embed_proj_dim=16)
    for kind in ("head", "network"):
        values = score(
            policy, PROMPTS, RESPONSES, value_function=value_function(policy, kind)
        ).values
        assert values.abs().max() > 0.1
    with pytest.raises(PolicyError, match="Use the kind 'head' or 'network'"):
        value_function(policy)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_a_trunk_is_found_where_a_model_looks_for_it_by_another_name(kind):
    policy = tiny_family("llama4_text")
    assert policy.model.get_decoder() is policy.model  # what would be wrong
    function = value_function(policy, kind)
    with torch.no_grad():
        values = score(policy, PROMPTS, RESPONSES, value_function=function).values
        hidden = policy.model.model(torch.tensor([PROMPTS[0]])).last_hidden_state
    expected = hidden[0, -1] @ function.weight + function.bias
    assert values[0, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_look_at_a_call_is_over_after_it_and_after_an_error():
    policy = tiny_policy()
    trunk = trunk_of(policy.model)
    with first_call(trunk) as seen:
        score(policy, PROMPTS, RESPONSES)
        output = seen["output"]
        score(policy, PROMPTS[:1], RESPONSES[:1])
        assert seen["output"] is output
    with pytest.raises(ZeroDivisionError), first_call(trunk):
        raise ZeroDivisionError
    assert not trunk._forward_hooks


@pytest.mark.parametrize(
    "values", [{"kind": "tree"}, {"layers": 0}, {"detached": True}]
)
def test_settings_that_cannot_be_are_refused(values):
    with pytest.raises(SettingsError):
        load_settings(ValueSettings, values)

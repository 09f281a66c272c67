"""Each architecture is sampled exactly, or refused by name before it is sampled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_models import PROBLEMS, tiny_family, tiny_policy

from rlreason.policy import fused_layers
from rlreason.policy.kv_cache import AttentionError, CohortStore
from rlreason.policy.load import Policy, PolicyError, load_policy
from rlreason.policy.logprobs import causal_of, pad_batch
from rlreason.policy.lora import with_lora
from rlreason.policy.passes import borrowed, check_model, next_logits, prompt_logits
from rlreason.policy.sampler import sample, sample_groups
from rlreason.policy.slots import SlotStore

PLAIN = """
afmoe apertus arcee aria_text beam bert bert-generation biogpt bitnet cohere cohere2
cohere2_moe ctrl cwm doge electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe
flex_olmo gemma gemma3_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox
granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax
internlm3 jais2 lfm2 llama llama4_text mellum minimax_m2 ministral ministral3 mistral
mixtral moshi nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_moe roc_bert seed_oss smollm3 solar_open starcoder2 whisper
"""


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


SHORT = {"original_max_position_embeddings": 40}
STRETCHED = {"factor": 4.0, **SHORT}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG = {**SHORT, **rope("longrope", **FACTORS, **SHORT)}
EXACT = [
    *((name, {}) for name in PLAIN.split()),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", rope("linear", **STRETCHED)),
    ("llama", rope("yarn", **STRETCHED)),
    ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED)),
    ("llama", {"num_key_value_heads": 1}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
]
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
REFUSED = [
    # What stands around attention is of another kind
    *((name, {}) for name in ("diffllama", "bart", "mbart", "blenderbot", "pegasus")),
    *((name, {}) for name in ("roberta", "xlm-roberta", "hrm_text")),
    ("bert", {"is_decoder": False}),  # looks to the right
    # Attention is not to be replaced, or is told what we do not compute
    *((name, {}) for name in ("falcon", "gptj", "rwkv", "stablelm", "nemotron")),
    *((name, {}) for name in ("gemma2", "gpt_oss", "vaultgemma")),
    # There is no plain cache of keys and values
    *((name, LATENT) for name in ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu")),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    *((name, {}) for name in ("mamba", "falcon_mamba", "xlstm", "minimax")),
    *((name, {}) for name in ("nemotron_h", "qwen3_next", "recurrent_gemma")),
]


def error_of(policy: Policy, **options) -> float:
    """Largest gap between reported log-probabilities and those of one plain pass."""
    worst = 0.0
    for rollout in sample(policy, PROBLEMS, k=2, **options):
        ids = torch.tensor([rollout.prompt_tokens + rollout.tokens])
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits[0]
        logprobs = logits[len(rollout.prompt_tokens) - 1 : -1].log_softmax(-1)
        tokens = torch.tensor(rollout.tokens)[:, None]
        gap = logprobs.gather(1, tokens)[:, 0] - torch.tensor(rollout.logprobs)
        worst = max(worst, float(gap.abs().max()))
    return worst


@contextmanager
def left_as_it_was(policy: Policy) -> Iterator[None]:
    """See that the model computes the same, in the same way, afterwards."""
    ids = torch.arange(3, 15)[None]

    def state():
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits
        modes = [module.training for module in policy.model.modules()]
        return modes, policy.model.config._attn_implementation, logits

    *before, logits = state()
    yield
    *after, now = state()
    assert after == before
    assert torch.equal(now, logits)


def test_there_are_at_least_45_configurations():
    assert len(EXACT) >= 45


@pytest.mark.parametrize(("name", "changes"), EXACT)
def test_a_family_is_sampled_exactly(name, changes):
    assert error_of(tiny_family(name, **changes), max_new_tokens=12) < 1e-5


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_a_family_that_is_not_known_is_refused_by_name_in_one_line(name, changes):
    policy = tiny_family(name, **changes)
    policy.model.train()
    with (
        left_as_it_was(policy),
        pytest.raises(PolicyError, match=f"^{name!r} .*cannot be sampled") as caught,
    ):
        sample(policy, PROBLEMS, max_new_tokens=12)
    assert type(policy.model).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_without_the_check_such_a_family_is_off_by_nats():
    policy = tiny_family("diffllama", initializer_range=0.25)
    ids = torch.arange(3, 20)
    with torch.inference_mode(), borrowed(policy.model, CohortStore):
        pads, group = torch.zeros(1, dtype=torch.int64), torch.zeros(1).long()
        store = CohortStore(pads, 16, group, max_columns=1)
        prompt_logits(policy.model, store, slice(0, 1), [ids[:16].tolist()], pad_id=0)
        found = next_logits(
            policy.model, store.decoding(), ids[16:], torch.tensor([16])
        )
    with torch.no_grad():
        expected = policy.model(ids[None], use_cache=False).logits[:, -1]
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() > 1


@pytest.mark.parametrize(
    ("limit", "name", "changes"),
    [
        (40, "mistral", {"sliding_window": 40}),
        (40, "gemma3_text", {"sliding_window": 40}),
        (32, "llama4_text", {"attention_chunk_size": 32}),
        (24, "llama4_text", {"floor_scale": 24, "no_rope_layers": [1, 0]}),
        (40, "phi3", LONG),
    ],
)
def test_past_a_limit_of_its_configuration_a_model_is_refused_with_the_remedy(
    limit, name, changes
):
    policy = tiny_family(name, **changes)
    policy = replace(policy, name="mine")
    short = [p for p in PROBLEMS if len(p.question) < 14]
    longest = max(len(r.prompt_tokens) for r in sample(policy, short, max_new_tokens=1))
    room = limit - longest + 1  # the last token that is drawn is not read
    sample(policy, short, max_new_tokens=room)
    with pytest.raises(PolicyError, match=f"mine.* Up to {limit} tokens it can"):
        sample(policy, short, max_new_tokens=room + 1)


@pytest.mark.parametrize("store", [CohortStore, SlotStore])
def test_a_model_is_checked_once_and_again_past_another_limit(store):
    policy = tiny_family("llama4_text", attention_chunk_size=400)
    passes = []
    policy.model.register_forward_hook(lambda *_: passes.append(1))
    for tokens, cost in [(60, 16), (60, 0), (100, 0), (399, 0), (400, 0)]:
        passes.clear()
        check_model(policy, tokens, store)
        assert len(passes) == cost
    with pytest.raises(PolicyError, match="Up to 400 tokens"):
        check_model(policy, 401, store)
    passes.clear()
    check_model(policy, 400, store)  # what was found before stands
    assert not passes


def test_a_model_in_another_number_format_is_checked_anew():
    policy = tiny_policy()
    takes = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.bfloat16):
        policy.model.to(dtype)
        takes[dtype] = check_model(policy, 60, CohortStore).token_bytes
    assert [*takes.values()] == [256, 512, 1024]


def test_double_precision_is_rounded_where_layers_compute_in_single():
    policy = tiny_policy()
    policy.model.double()
    error = error_of(policy, max_new_tokens=12)
    assert torch.finfo(torch.float64).eps ** 0.5 < error < 1e-5
    assert "packed" in pad_batch([[1, 5]], [[7]]).inputs(policy.model).options


def bfloat16(name: str, **changes) -> Policy:
    policy = tiny_family(name, **changes)
    policy.model.to(torch.bfloat16)
    return policy


@pytest.mark.parametrize("seed", range(3))
def test_in_half_precision_rounding_is_told_from_another_computation(seed):
    for policy in (tiny_policy(seed=seed), load_policy("nano", device="cpu")):
        for dtype in (torch.bfloat16, torch.float16):
            half = replace(policy.clone(), name=str(dtype))
            half.model.to(dtype)
            for store in (CohortStore, SlotStore):
                check_model(half, 60, store)
    for name in ("olmoe", "qwen3_moe"):  # rounding may choose another expert
        check_model(bfloat16(name), 60, CohortStore)
    for name, changes in [
        ("diffllama", {}),
        ("bart", {}),
        ("llama4_text", {"attention_chunk_size": 32}),
    ]:
        with pytest.raises(PolicyError, match=name):
            check_model(bfloat16(name, **changes), 60, SlotStore)


@pytest.mark.parametrize("store", [CohortStore, SlotStore])
def test_a_window_that_layers_do_not_tell_of_is_seen_in_half_precision(store):
    """A check of ten tokens past the window took what they lack for rounding."""
    policy = bfloat16("phimoe", sliding_window=400, max_position_embeddings=4096)
    check_model(policy, 400, store)
    with pytest.raises(PolicyError, match="Up to 400 tokens it can"):
        check_model(policy, 420, store)
    check_model(bfloat16("phimoe", max_position_embeddings=4096), 420, store)


def fused_in(policy: Policy) -> list[bool]:
    """Which layers are computed by us while the model is borrowed."""
    layers = causal_of(policy.model).model.layers
    with borrowed(policy.model, CohortStore):
        found = ["forward" in vars(layer) for layer in layers]
    assert not any("forward" in vars(layer) for layer in layers)
    return found


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_layers_of_a_llama_are_fused_and_compute_the_same(heads, monkeypatch):
    policy = tiny_family("llama", num_key_value_heads=heads, tie_word_embeddings=True)
    assert all(fused_in(policy))
    assert error_of(policy, temperature=1.0, max_new_tokens=40) < 1e-4
    # The wrong version: angles of the other sign are seen, and refused
    right = fused_layers.rotate
    wrong = lambda heads, cos, sin: right(heads, cos, -sin.abs())  # noqa: E731
    monkeypatch.setattr(fused_layers, "rotate", wrong)
    with pytest.raises(PolicyError, match="not those of its own forward pass"):
        sample(policy.clone(), PROBLEMS, max_new_tokens=40)


def test_who_calls_a_borrowed_model_is_told():
    policy = tiny_policy()
    told = pytest.raises(AttentionError, match="another thread uses the model")
    with borrowed(policy.model, CohortStore), told:
        policy.model(torch.arange(3, 9)[None])


def test_layers_that_are_not_plain_stay_what_they_are():
    hooked, seen = tiny_policy(), []
    norm = hooked.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda *_: seen.append(1))
    assert fused_in(hooked) == [True, False]
    sample(hooked, PROBLEMS, max_new_tokens=4)
    assert seen
    assert not any(fused_in(tiny_family("llama", attention_bias=True)))
    assert not any(fused_in(tiny_family("llama", hidden_act="gelu")))
    assert not any(fused_in(tiny_policy("qwen2")))
    assert not any(fused_in(with_lora(tiny_policy(), rank=4, alpha=8)))
    replaced = tiny_policy()
    replaced.model.model.layers[0].input_layernorm = torch.nn.Identity()
    assert fused_in(replaced) == [False, True]
    sample(replaced, PROBLEMS, max_new_tokens=4)


def test_a_copy_made_while_a_model_is_borrowed_follows_its_own_weights():
    policy = tiny_policy()
    with borrowed(policy.model, CohortStore):
        copy = policy.clone()
    copy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for weight in copy.model.parameters():
            weight.mul_(1.1)
    assert error_of(copy, temperature=1.0, max_new_tokens=8) < 1e-4
    assert all(fused_in(copy))


def test_large_models_are_not_joined(monkeypatch):
    monkeypatch.setattr(fused_layers, "ROOM", 1000)
    assert not any(fused_in(tiny_policy()))


def test_threads_take_turns():
    policy = tiny_policy()
    options = {"k": 3, "max_new_tokens": 24}
    expected = [sample(policy, PROBLEMS, seed=seed, **options) for seed in range(4)]
    policy = policy.clone()  # one that nobody has checked
    found, start = {}, threading.Barrier(4)

    def work(seed):
        start.wait()
        for _ in range(3):
            found[seed] = sample(policy, PROBLEMS, seed=seed, **options)

    with left_as_it_was(policy):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(4):
        for one, other in zip(found[seed], expected[seed], strict=True):
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("checked", [True, False])
def test_whatever_ends_sampling_the_model_is_given_back(error, checked):
    policy = tiny_policy()
    policy.model.train()
    if checked:
        sample(policy, PROBLEMS, max_new_tokens=8)

    def fail(*_):
        raise error

    with left_as_it_was(policy):
        handle = policy.model.model.layers[1].register_forward_hook(fail)
        with pytest.raises((error, PolicyError)):
            sample(policy, PROBLEMS, max_new_tokens=8)
        handle.remove()
    # And no lock is held
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(sample(policy, PROBLEMS, max_new_tokens=8)),
        daemon=True,
    )
    thread.start()
    thread.join(60)
    assert len(found) == len(PROBLEMS)


def test_who_takes_the_answers_may_use_the_model_meanwhile():
    policy = tiny_policy()
    options = {"k": 2, "max_new_tokens": 8}
    plain = sample(policy, PROBLEMS, **options)
    groups = {}
    for index, group in sample_groups(policy, PROBLEMS, **options):
        groups[index] = group
        assert sample(policy, PROBLEMS, **options) == plain
    assert [r for index in range(4) for r in groups[index]] == plain

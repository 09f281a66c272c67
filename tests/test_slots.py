"""Slots: filled anew, never in each other's way, and a step that waits for nothing."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import PROBLEMS, tiny_policy
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlreason.policy import fused_norms, sampler, slot_engine
from rlreason.policy.forced import Forced
from rlreason.policy.load import make_policy
from rlreason.policy.passes import borrowed
from rlreason.policy.sampler import sample
from rlreason.policy.slot_engine import Part, SlotEngine, Slots
from rlreason.policy.slots import Held, SlotStore, attend

OPTIONS = {"k": 6, "max_new_tokens": 40, "temperature": 1.5, "seed": 3}


@pytest.fixture(autouse=True)
def slots_on_the_cpu(monkeypatch):
    monkeypatch.setitem(sampler.ENGINES, "cpu", SlotEngine)


def policy_that_ends(kind: str = "llama"):
    """Some of its samples are short."""
    return replace(tiny_policy(kind), eos_id=40)


def by_name(rollouts) -> dict:
    return {(r.problem_id, r.sample): r.tokens for r in rollouts}


@pytest.mark.parametrize("shared", [1, 3])
def test_attention_is_that_of_each_sequence_alone(shared):
    generator = torch.Generator().manual_seed(shared)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads, dim, width, columns = 2, 8, 5, 7
    prompts = random(3, heads, width, dim), random(3, heads, width, dim)
    own = random(4, heads, columns, dim), random(4, heads, columns, dim)
    group, pads = torch.tensor([2, 0, 0, 1]), torch.tensor([0, 3, 4])
    length = torch.tensor([0, 6, 2, 3])
    query = random(4, heads * shared, dim)
    key, value = random(4, heads, dim), random(4, heads, dim)
    held = Held(*prompts, *own, group, pads, length)
    found = attend(query, key, value, held, scaling=0.3)
    for row in range(4):
        g, n = group[row], length[row]
        keys, values = (
            torch.cat([p[g, :, pads[g] :], o[row, :, :n], new[row][:, None]], dim=1)
            for p, o, new in zip(prompts, own, (key, value), strict=True)
        )
        expected = scaled_dot_product_attention(
            query[row][:, None], keys, values, scale=0.3, enable_gqa=shared > 1
        )
        assert torch.allclose(found[row], expected[:, 0], atol=1e-5)
        assert torch.equal(own[0][row, :, n], key[row])  # kept for the next step


def kernels_run() -> bool:
    """On a GPU, or in an interpreter that works with today's numpy."""
    if importlib.util.find_spec("triton") is None:
        return False
    version = tuple(map(int, metadata.version("triton").split(".")[:2]))
    return torch.cuda.is_available() or version >= (3, 9)


@pytest.mark.skipif(not kernels_run(), reason="needs a GPU, or triton 3.9")
def test_the_kernel_computes_the_same():
    """In Triton's interpreter where there is no GPU, so in a process of its own."""
    gpu = torch.cuda.is_available()
    code = f"""
import torch
from rlreason.policy import slot_attention, slots
torch.manual_seed(0)
device, dtype = "{"cuda" if gpu else "cpu"}", torch.float32
for heads, shared, dim, width, columns in [(3, 3, 64, 37, 70), (2, 1, 24, 5, 33)]:
    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)
    prompts = random(3, heads, width, dim), random(3, heads, width, dim)
    own = random(5, heads, columns, dim), random(5, heads, columns, dim)
    same = tuple(slab.clone() for slab in own)
    rows = [[0, 0, 2, 1, 2], [0, 3, width - 1], [0, 1, columns - 1, 7, 9]]
    rows = [torch.tensor(numbers, device=device) for numbers in rows]
    new = random(5, heads * shared, dim), random(5, heads, dim), random(5, heads, dim)
    held, again = slots.Held(*prompts, *own, *rows), slots.Held(*prompts, *same, *rows)
    expected = slots.attend(*new, held, scaling=0.2)
    found = slot_attention.attend(*new, again, scaling=0.2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(map(torch.equal, own, same))
"""
    more = {} if gpu else {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | more)


def test_slots_are_filled_anew_and_places_too(monkeypatch):
    policy = policy_that_ends()
    whole = by_name(sample(policy, PROBLEMS, **OPTIONS))
    fills = []
    fill = Slots.fill

    def spy(slots, parts, **more):
        fills.append([slots.rows, *(part.slots for part in parts)])
        return fill(slots, parts, **more)

    monkeypatch.setattr(Slots, "fill", spy)
    few = by_name(sample(policy, PROBLEMS, byte_budget=220_000, **OPTIONS))
    assert few == whole
    (rows,) = {rows for rows, *_ in fills}
    used = [slot for _, *parts in fills for own in parts for slot in own]
    assert len(used) == 24 > 4 * rows
    assert {*used} == {*range(rows)}


@pytest.mark.parametrize("seed", range(3))
def test_one_question_may_have_more_samples_than_there_are_slots(seed):
    options = OPTIONS | {"k": 16, "seed": seed}
    whole = by_name(sample(policy_that_ends(), PROBLEMS, **options))
    few = sample(policy_that_ends(), PROBLEMS, byte_budget=250_000, **options)
    assert by_name(few) == whole


def test_wrong_what_a_slot_held_before_would_be_seen(monkeypatch):
    policy = policy_that_ends()
    whole = by_name(sample(policy, PROBLEMS, **OPTIONS))
    fill, advance = Slots.fill, Slots.advance

    def forgetful(slots, parts, **more):
        before = slots.store.length.clone()
        fill(slots, parts, **more)
        slots.store.length = before

    def ever_longer(slots):
        lengths = slots.store.length.clone()
        advance(slots)
        slots.store.length = (lengths + 1).clamp(max=slots.limit - 2)

    monkeypatch.setattr(Slots, "fill", forgetful)
    monkeypatch.setattr(Slots, "advance", ever_longer)
    found = by_name(sample(policy, PROBLEMS, byte_budget=220_000, **OPTIONS))
    assert found != whole


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_memory_stays_within_the_budget(kind, monkeypatch):
    held = []
    step = Slots.step

    def spy(slots):
        step(slots)
        kept = (*slots.store.slabs, slots.tokens, slots.logprobs)
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))

    monkeypatch.setattr(Slots, "step", spy)
    budget = 600_000
    sample(policy_that_ends(kind), PROBLEMS, byte_budget=budget, **OPTIONS)
    assert 0.1 * budget < max(held) <= budget


def test_few_that_are_left_move_together(monkeypatch):
    policy, options = policy_that_ends(), OPTIONS | {"max_new_tokens": 400}
    whole = by_name(sample(policy, PROBLEMS, **options))
    monkeypatch.setattr(slot_engine, "WORTH_SHRINKING", 8)
    rows = []
    keep = Slots.keep

    def spy(slots, kept):
        before = slots.rows
        keep(slots, kept)
        rows.append((before, slots.rows))

    monkeypatch.setattr(Slots, "keep", spy)
    assert by_name(sample(policy, PROBLEMS, **options)) == whole
    assert rows
    assert all(4 * after <= before for before, after in rows)


@pytest.mark.parametrize("k", [6, 40])
def test_out_of_memory_goes_on_with_half_and_draws_the_same(k, monkeypatch, capsys):
    policy, options = policy_that_ends(), OPTIONS | {"k": k}
    whole = by_name(sample(policy, PROBLEMS, **options))
    step = Slots.step
    refused = []

    def small(slots):
        step(slots)  # what it has done is there already
        if slots.rows > 9:
            refused.append(slots.rows)
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Slots, "step", small)
    found = sample(policy, PROBLEMS, byte_budget=2**21, **options)
    assert refused
    assert capsys.readouterr().err.count("sampling goes on with") == len(refused)
    assert by_name(found) == whole
    assert list(by_name(found)) == list(whole)


def test_a_step_that_is_no_graph_goes_on_without(monkeypatch, capsys):
    def waits(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    policy = policy_that_ends()
    whole = by_name(sample(policy, PROBLEMS, **OPTIONS))
    monkeypatch.setattr(slot_engine, "captured", waits)
    begin = Slots.__init__

    def on_gpu(slots, *args, **more):
        begin(slots, *args, **more)
        slots.captures = True

    monkeypatch.setattr(Slots, "__init__", on_gpu)
    assert by_name(sample(policy, PROBLEMS, **OPTIONS)) == whole
    assert capsys.readouterr().err.count("is no graph, but goes on") == 1


# A step as a graph

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "item",
    "is_nonzero",
    "equal",
}


class Operators(TorchDispatchMode):
    """Counts the operators that the host calls, and those that make it wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if func._schema.name.removeprefix("aten::") in WAITING:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def deep_policy():
    policy = tiny_policy()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=30, vocab_size=policy.model.config.vocab_size
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    return make_policy(model, policy.tokenizer, name="deep")


def filled(policy, forced: Forced | None = None) -> Slots:
    slots = Slots(
        policy.model,
        rows=4,
        places=2,
        width=6,
        limit=16,
        ends=policy.eos_ids,
        temperature=0.7,
        device=policy.device,
        forced=forced,
    )
    parts = [Part((5, 6, 7), 0, [0, 2], [11, 12]), Part((8, 9), 1, [1, 3], [13, 14])]
    slots.fill(parts, pad_id=policy.pad_id)
    return slots


def test_a_step_never_waits_and_a_replay_calls_next_to_nothing(monkeypatch):
    policy = deep_policy()

    class Graph:
        """Stands for a captured graph: what it does the host does not launch."""

        def __init__(self, step, device) -> None:
            self.kernels = step

        def replay(self) -> None:
            outside.__exit__(None, None, None)
            try:
                self.kernels()
            finally:
                outside.__enter__()

    monkeypatch.setattr(slot_engine, "captured", Graph)
    with torch.inference_mode(), borrowed(policy.model, SlotStore):
        slots = filled(policy)
        slots.captures = True
        with Operators() as step:
            slots.step()  # once as it is
        assert not step.waits
        assert step.count > 1000  # all of which are in the graph
        outside = Operators()
        with outside:
            slots.step()
            slots.step()
        assert slots.graph is not None
    assert outside.count <= 60
    assert slots.drawn.tolist() == [4] * 4


def test_putting_labels_does_not_wait_and_writes_where_a_graph_would_look():
    policy = deep_policy()
    forced = Forced.of(policy, token=30, draws=16)
    every = torch.ones_like(forced.newline)
    forced = replace(forced, newline=every, visible=every)  # a label after each
    with torch.inference_mode(), borrowed(policy.model, SlotStore):
        slots = filled(policy, forced)
        names = ("due", "seen", "left", "room")
        places = [getattr(slots.forcing, name).data_ptr() for name in names]
        with Operators() as step:
            slots.step()
        assert not step.waits
        now = [getattr(slots.forcing, name).data_ptr() for name in names]
        assert now == places
        slots.step()
    assert all(slots.tokens[:, 1] == 30)
    assert all(slots.logprobs[:, 1] == 0)
    assert slots.forcing.left.tolist() == [14] * 4


def test_the_first_look_that_waits_would_be_seen():
    policy = deep_policy()
    with torch.inference_mode(), borrowed(policy.model, SlotStore):
        slots = filled(policy)
        with Operators() as step:
            slots.step()
            int(slots.drawn.max())
    assert step.waits


def test_norms_are_fused_where_they_compute_the_same_and_left_elsewhere():
    policy = deep_policy()
    norm = policy.model.model.norm
    x = torch.randn(3, 16)
    expected = norm(x)

    class OddRMSNorm(type(norm)):
        def forward(self, hidden):
            return super().forward(hidden) * 1.01

    odd = OddRMSNorm(16)
    policy.model.model.layers[0].input_layernorm = odd
    with fused_norms.fused_norms(policy.model):
        assert "forward" in vars(norm)
        assert "forward" not in vars(odd)
        found = norm(x)
    assert "forward" not in vars(norm)
    norm.weight = torch.nn.Parameter(2 * norm.weight.data)  # another one
    with fused_norms.fused_norms(policy.model):
        assert torch.allclose(norm(x), 2 * expected, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)


def test_memory_that_runs_out_in_a_capture_is_no_model_that_waits(monkeypatch):
    def ends_in_an_error_of_its_own(step, device):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(slot_engine, "captured", ends_in_an_error_of_its_own)
    policy = deep_policy()
    with torch.inference_mode(), borrowed(policy.model, SlotStore):
        slots = filled(policy)
        slots.captures = True
        with pytest.raises(torch.OutOfMemoryError):
            slots.capture()
    assert slots.captures

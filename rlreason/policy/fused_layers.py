"""Layers of Llama in few operators while a model is sampled on a CPU.

transformers writes a layer as some forty operators in ten modules. Where a step of
decoding has few rows, calling them takes about as long as what they compute. Here the
products of one input are one product, rotation is done in place, and what is added is
added by the product before it. The weights are put together when a model is borrowed,
so they must not change meanwhile. ``check_model`` compares what comes of it, as
whatever the sampler does.

Left out: other families, and layers with biases, adapters or hooks, which stay as they
are; GPUs, where a step is one graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)

from rlreason.policy.kv_cache import DecodeCache, OpeningCache, PromptCache

ROOM = 64 * 2**20  # bytes of joined weights: a large model is not to be held twice


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Let the layers of a Llama on a CPU be computed here for a while."""
    layers = [m for m in model.modules() if type(m) is LlamaDecoderLayer]
    for layer in layers:  # of a copy that was made while its model was borrowed
        if getattr(vars(layer).get("forward"), "func", None) is _forward:
            del layer.forward
    layers = [layer for layer in layers if _is_plain(layer)]
    joined = [m.weight for layer in layers for m in _joined(layer)]
    if sum(weight.nbytes for weight in joined) > ROOM:
        layers = []
    try:
        for layer in layers:
            *to_heads, gate, up = (m.weight.detach() for m in _joined(layer))
            layer.forward = partial(
                _forward, layer, torch.cat(to_heads).t(), torch.cat([gate, up]).t()
            )
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _joined(layer: LlamaDecoderLayer) -> tuple[nn.Linear, ...]:
    attention, network = layer.self_attn, layer.mlp
    heads = attention.q_proj, attention.k_proj, attention.v_proj
    return *heads, network.gate_proj, network.up_proj


def _is_plain(layer: LlamaDecoderLayer) -> bool:
    """Whether a layer's own modules do what is done here, and nobody watches them."""
    attention, network = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    if (
        type(attention) is not LlamaAttention
        or type(network) is not LlamaMLP
        or not all(type(norm) is LlamaRMSNorm for norm in norms)
    ):
        return False
    weight = norms[0].weight
    linear = *_joined(layer), attention.o_proj, network.down_proj
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32  # the norms of others are in float32 too
        and all(type(m) is nn.Linear and m.bias is None for m in linear)
        and isinstance(network.act_fn, nn.SiLU | SiLUActivation)
        and not any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
            for m in layer.modules()
        )
    )


def _forward(
    layer: LlamaDecoderLayer,
    to_heads: Tensor,
    to_gates: Tensor,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    rollout_cache: DecodeCache | PromptCache | OpeningCache | None = None,
    **options,
) -> Tensor:
    """A layer's pass, (B, T, C) to (B, T, C).

    Args:
        to_heads: The weights of queries, keys and values, (C, (H + 2 * Hkv) * D).
        to_gates: Those of gate and up, (C, 2 * I).
    """
    if rollout_cache is None:  # not the sampler's call; attention will say so
        options["position_embeddings"] = position_embeddings
        return LlamaDecoderLayer.forward(layer, hidden_states, **options)
    attention = layer.self_attn
    rows, width, _ = hidden_states.shape
    x = hidden_states.flatten(0, 1)  # (N, C)
    heads = (_norm(layer.input_layernorm, x) @ to_heads).view(
        rows, width, -1, attention.head_dim
    )
    key_heads = attention.config.num_key_value_heads
    turned = heads.shape[2] - key_heads
    rotate(heads[:, :, :turned], *position_embeddings)
    query, key, value = heads.transpose(1, 2).split(
        [turned - key_heads, key_heads, key_heads], dim=1
    )
    key, value = rollout_cache.update(key, value, attention.layer_idx)
    seen = rollout_cache.attend(
        attention.layer_idx, query, key, value, attention.scaling
    )  # (B, T, H, D)
    x = torch.addmm(x, seen.reshape(len(x), -1), attention.o_proj.weight.t())
    both = _norm(layer.post_attention_layernorm, x) @ to_gates  # (N, 2 * I)
    gate, up = both.chunk(2, dim=1)
    x = torch.addmm(x, silu(gate).mul_(up), layer.mlp.down_proj.weight.t())
    return x.view(hidden_states.shape)


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn heads (B, T, H, D) in place, by angles (B, T, D) that repeat at D / 2."""
    half = heads.shape[-1] // 2
    cos, sin = (t[..., None, :half] for t in (cos, sin))
    left, right = heads.split(half, dim=-1)
    across = left * sin
    left.mul_(cos).addcmul_(right, sin, value=-1)
    right.mul_(cos).add_(across)

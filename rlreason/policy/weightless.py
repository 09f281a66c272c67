"""Policies without weights: what a model would take, known from its configuration.

On PyTorch's meta device tensors have shapes and no memory, so a model of any size is
built in a second, and the library's own code runs on it: forward, backward, adapters,
value function. ``LiveBytes`` counts what would be alive meanwhile. What no shape tells
is decided for the largest case: every mask is full, every number that is read is 1.

Left out: the workspace of kernels, and what an allocator loses between blocks.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx.experimental._config as meta_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
)

from rlreason.policy.load import CANNOT_LOAD, Policy, PolicyError, policy_path

_ATTENTION = "rlreason_weightless"
# The configurations of the models that the built-in profiles name, from the hub
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_KNOWN = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-2-13b-hf": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824}
    | {"num_hidden_layers": 40, "num_attention_heads": 40},
    "SmolLM2-135M-Instruct": {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a policy; its weights need not be there.

    Args:
        name: As in ``load_policy``, or a folder that holds config.json and no more.

    Raises:
        PolicyError: It is neither known by name nor found.
    """
    if name in _KNOWN:
        return LlamaConfig(**_KNOWN[name])
    path = policy_path(name)
    source, options = str(path if path.is_dir() else name), {}
    if path.suffix == ".gguf":
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        return AutoConfig.from_pretrained(source, **options)
    except CANNOT_LOAD as error:
        raise PolicyError(
            f"The configuration of {name!r} is not at hand: "
            f"{str(error).splitlines()[0]} -- Known by name are {', '.join(_KNOWN)}. "
            "Of any other, put its config.json into a folder (its weights need not be "
            "there) and name the folder as the policy."
        ) from None


def with_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same configuration with so many layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


class WeightlessPolicy(Policy):
    """A policy whose model has no weights; every text has one token for it."""

    def encode_prompt(self, text: str) -> list[int]:
        """One token."""
        return [1]


def weightless(config: PretrainedConfig, dtype: torch.dtype) -> WeightlessPolicy:
    """A policy of a configuration, on the meta device."""
    device = torch.device("meta")
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_ATTENTION
        ).eval()
    return WeightlessPolicy(
        model=model,
        tokenizer=None,
        device=device,
        name=config.name_or_path or config.model_type,
        eos_id=0,
        pad_id=0,
        bos_id=None,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take together; those that share memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of living tensors of the meta device.

    Attributes:
        now: Of those that were made within, or given to ``hold``.
        peak: The most that there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._all_of_a_mask = meta_config.patch(meta_nonzero_assume_all_nonzero=True)

    def __enter__(self) -> LiveBytes:
        """What is chosen by a mask is taken to be all of it."""
        self._all_of_a_mask.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._all_of_a_mask.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        """Called by PyTorch for every operator."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        to = kwargs.get("device")
        if function is aten._to_copy.default and args[0].is_meta and str(to) == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype"))  # to be read
        out = function(*args, **kwargs)
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if tensor.device.type == "meta" and key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _attention(module, query, key, value, attention_mask, *, scaling=None, **_) -> Any:
    """(B, H, L, D) to (B, L, H, D) without a matrix of scores, as on a real device.

    Left to choose for the meta device, PyTorch would take attention that keeps it.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, scale=scaling
    )[0]
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)

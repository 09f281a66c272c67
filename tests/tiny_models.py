"""Tiny random policies for tests: built in code, nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlreason.policy.load import Policy, make_policy
from rlreason.tasks.problem import Problem

KINDS = ("llama", "gpt2", "qwen2")

PROBLEMS = [
    Problem("p/0", "Tom has 3 pens and buys 4. How many pens has he?", "7", "7"),
    Problem("p/1", "2+2?", "4", "4"),
    Problem("p/2", "A box holds 12 eggs. How many eggs do 5 boxes hold?", "60", "60"),
    Problem("p/3", "Half of 10?", "5", "5"),
]


def tiny_tokenizer(*, bos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with one merge, ``A:``. Without ``pad``, there is no pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *alphabet, "A:"]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("A", ":")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """One of characters that takes spaces as Llama 2 does.

    A text gets a space before it, and one that is decoded alone loses it again.
    """
    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    ids = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def tiny_policy(kind: str = "llama", *, seed: int = 0, **tokenizer_options) -> Policy:
    """A random policy whose distributions are far from uniform.

    The qwen2 kind has two query heads to a key head.
    """
    tokenizer = tiny_tokenizer(**tokenizer_options)
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
    }
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **special)
    else:
        cls, key_heads = {"llama": (LlamaConfig, 4), "qwen2": (Qwen2Config, 2)}[kind]
        config = cls(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=key_heads,
            max_position_embeddings=512,
            **special,
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return make_policy(model, tokenizer, name=f"tiny-{kind}")


# What a configuration calls its sizes; each takes those of the names that it knows.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("initializer_range", "init_std"), 0.15),
    "attention_heads": 4,
    "rotary_dim": 8,
    "encoder_ffn_dim": 48,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "is_decoder": True,
}


def tiny_family(name: str, **changes) -> Policy:
    """A tiny random policy of any architecture that transformers has.

    Args:
        name: As transformers has it, ``model_type``.
        changes: Of its configuration; None leaves a field at its own default.
    """
    tokenizer = tiny_tokenizer()
    cls = CONFIG_MAPPING[name]
    own = cls()
    known = {*own.to_dict(), *own.attribute_map}
    words = len(tokenizer)
    sizes = {**_SIZES, "vocab_size": words, "vocab_size_per_layer_input": words}
    options = {key: value for key, value in sizes.items() if key in known} | changes
    config = cls(**{k: v for k, v in options.items() if v is not None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return make_policy(model, tokenizer, name=name)

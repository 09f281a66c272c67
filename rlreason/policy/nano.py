"""nano: Llama-2 in the small. Its sizes and its tokenizer.

The model is transformers' own ``LlamaForCausalLM``, so whatever works for nano works
for a Llama checkpoint. The tokenizer is lossless on any text: words that the
pretraining text uses are one token, digits are one token each (with or without the
space before them), everything else falls back to bytes.

The weights lie in ``rlreason/assets/`` and are made by ``rlreason train nano``.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlreason.tasks.pretraining_text import Kind, pretraining_documents

SIZES = {
    # name: hidden size, layers, heads, feed-forward size
    "nano": (128, 4, 4, 384),
    "nano-xs": (96, 3, 3, 256),
}
CONTEXT = 1024
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# A digit stands alone, a word takes the space before it, marks of the format are whole.
_PIECES = r"####| ?<<|>>| ?[A-Za-z]+| ?\d|\n| ?[^\sA-Za-z\d]|\s"


def build_tokenizer(sample_size: int = 20_000) -> PreTrainedTokenizerFast:
    """The tokenizer of both nanos: a function of the pretraining text alone.

    Args:
        sample_size: Documents from which the words are collected.
    """
    counts: Counter[str] = Counter()
    # All steps in every form, so that no word is missing since its documents are rare
    alike = {form: Kind(1.0, form, (1, 5)) for form in ("drill", "prose", "page")}
    for text in islice(pretraining_documents("vocabulary", alike), sample_size):
        counts.update(re.findall(_PIECES, text))
    # Made-up names are rare and stay spelled out in bytes.
    words = {piece for piece, count in counts.items() if count >= 10}
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = {to_bytes.pre_tokenize_str(word)[0][0] for word in words}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [PAD, BOS, EOS, *sorted(alphabet), *sorted(spelled - alphabet)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    # Without merges, a piece that is no token of its own falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of one of ``SIZES``; seed torch before calling."""
    hidden, layers, heads, feed_forward = SIZES[name]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=feed_forward,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

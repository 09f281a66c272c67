"""New tokens for a policy: words that only a program can say.

Return-conditioned RL tells the policy what is expected of it by a token, such as
``[GOOD]``, that its vocabulary does not have. ``add_tokens`` makes a policy that has
it: one more row in the input embedding and one in the output layer. Each begins as the
mean of the rows that were there, a word of no special meaning; the old tokens keep
their logits. In the input, a draw with the spread of the old rows is added: two tokens
that begin alike are told apart late or never, above all where the output layer is tied
and pulls both the same way (after 200 updates of nano, rows of two labels that began as
the plain mean still differed by 3% of their length, and the labels had no effect).

A new token is inserted as an id and never found in text: a question may hold the
letters ``[GOOD]``, and text is untrusted. Tokenizers look for their special tokens in
what they are given unless ``split_special_tokens`` is set, so the new policy's
tokenizer has it set. That holds for the older special tokens as well: a question that
spells ``</s>`` reads as five signs and not as EOS. All other text is encoded as before.

Left out: policies with adapters, whose embedding is wrapped (merge them first).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlreason.policy.load import Policy, PolicyError


def add_tokens(policy: Policy, names: Sequence[str]) -> Policy:
    """A clone of ``policy`` whose vocabulary has ``names`` in addition.

    ``token_id`` gives their ids. Decoding leaves them out, as it does EOS.

    Raises:
        ValueError: No names, an empty one, one given twice or one that exists already.
        PolicyError: The policy has adapters.
    """
    if isinstance(policy.model, PeftModel):
        raise PolicyError(
            f"{policy.name!r} has adapters, and new tokens are rows of its own "
            "embedding: merge them first (lora.merge_adapters), or add the tokens "
            "before the adapters"
        )
    known = policy.tokenizer.get_vocab()
    faults = [name for i, name in enumerate(names) if not name or name in names[:i]]
    faults += [name for name in names if name in known]
    if faults or not names:
        raise ValueError(
            f"cannot add the tokens {list(names)} to {policy.name!r}: give at least "
            "one, each once, and none that is empty or in the vocabulary already "
            f"(at fault: {sorted(set(faults))})"
        )
    tokenizer = _extended(policy.tokenizer, names)
    ids = [tokenizer.get_vocab()[name] for name in names]  # one behind another
    old_size, new_size = min(ids), max(ids) + 1
    clone = replace(policy.clone(), tokenizer=tokenizer)
    # Some models have more rows than their tokenizer has tokens, and room to spare
    rows = clone.model.get_input_embeddings().weight.shape[0]
    if new_size > rows:
        _resize(clone.model, new_size)
    for weights in _vocabulary_weights(clone.model):
        weights[old_size:new_size] = weights[:old_size].mean(0)
    table = clone.model.get_input_embeddings().weight.data  # (V, H)
    generator = torch.Generator().manual_seed(old_size)
    draw = torch.randn(len(names), table.shape[1], generator=generator)
    spread = table[:old_size].float().std(0)
    table[old_size:new_size] += (draw.to(table.device) * spread).to(table.dtype)
    return clone


def token_id(policy: Policy, name: str) -> int:
    """The id of the token that is called ``name``.

    Raises:
        ValueError: There is none.
    """
    found = policy.tokenizer.get_vocab().get(name)
    if found is None:
        raise ValueError(
            f"the vocabulary of {policy.name!r} has no token {name!r}; "
            "add_tokens makes a policy that has it"
        )
    return found


def _extended(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> PreTrainedTokenizerBase:
    """A copy with ``names`` as its last tokens, found in no text."""
    tokenizer = copy.deepcopy(tokenizer)
    added = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True  # what is saved with it
    return tokenizer


def _resize(model: PreTrainedModel, size: int) -> None:
    """Give the embedding and the output layer ``size`` rows, tied if they were."""
    device = next(model.parameters()).device
    # The new rows are drawn at random before we set them: from a stream of their own
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.resize_token_embeddings(size, mean_resizing=False)


def _vocabulary_weights(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token, without gradient; what is tied, once."""
    layer = model.get_output_embeddings()
    tensors = [model.get_input_embeddings().weight, layer.weight]
    if getattr(layer, "bias", None) is not None:
        tensors.append(layer.bias)
    return [t.data for t in {t.data_ptr(): t for t in tensors}.values()]

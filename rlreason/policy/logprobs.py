"""Log-probabilities of responses that exist already, by one full forward pass.

Training scores the tokens that were sampled, never a second tokenisation of their
text. Sequences go through the model end to end, without padding, see ``packing``; what
is told about them is laid out in rows. What belongs to a response is known from lengths
and never read off token ids, so a pad token that is also EOS, or that occurs in a
response, does no harm. Nothing here waits for a GPU.

The output layer is applied at the places that predict a response token and nowhere
else; for a prompt half as long as the sequence that halves its work. Where the
vocabulary is large it is applied to a chunk of those places at a time, and the backward
pass computes each chunk once more instead of keeping its logits.

Left out: kernels that fuse the output layer with the softmax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rlreason.policy.layout import Layout, lay_out
from rlreason.policy.packing import Inputs, check_lengths, moved, pack, packs, pad

# exp of it is 0 in float64 too, and it times 0 is 0, which minus infinity would not be.
_LOWEST_LOGPROB = -1e4


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts with their responses, padded on the right to one length.

    Attributes:
        input_ids: (B, L), prompt, response, padding.
        responses: The response tokens alone, (B, T), padded with 0.
        response_mask: True at response tokens, (B, T), from lengths.
        targets: The N response tokens, (N,), as in ``responses[response_mask]``.
        rows: Which sequence each of them belongs to, (N,).
        steps: Which token of its response it is, (N,).
        columns: The place in ``input_ids`` whose output predicts it, (N,).
        ends: The place of each sequence's last token, (B,).
        layout: What of the sequences goes through a model.
    """

    input_ids: Tensor
    responses: Tensor
    response_mask: Tensor
    targets: Tensor
    rows: Tensor
    steps: Tensor
    columns: Tensor
    ends: Tensor
    layout: Layout

    def inputs(self, model: PreTrainedModel) -> Inputs:
        """The batch as the model takes it: packed, or padded where it cannot be.

        Raises:
            PolicyError: The model would make of a sequence what depends on another.
        """
        trunk = trunk_of(model)
        check_lengths(trunk, self.layout.lengths)
        longest, total = self.input_ids.shape[1], len(self.layout.tokens)
        if packs(trunk, longest, total):
            return pack(self.layout, model.get_input_embeddings().weight)
        return pad(self.input_ids)

    def unpack(self, values: Tensor) -> Tensor:
        """Lay N values, one a response token, out as (B, T), with 0 elsewhere."""
        out = values.new_zeros(self.response_mask.shape)
        return out.index_put((self.rows, self.steps), values)


def pad_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> PaddedBatch:
    """Lay token lists out as tensors.

    Args:
        prompts: B lists of token ids, none empty: the first response token is
            predicted from the last prompt token.
        responses: B lists of token ids; an empty one is allowed.
        pad_id: What to fill up with. Any id will do, also one that occurs.
        device: Of the tensors.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses: give one response "
            "a prompt, and at least one pair."
        )
    if not all(prompts):
        raise ValueError("A prompt has no tokens, so its response has no first output.")
    # By numpy: a GPU waits for it, and lists or threads of torch would take 10 ms
    starts = np.array([len(prompt) for prompt in prompts])
    counts = np.array([len(response) for response in responses])
    pairs = zip(prompts, responses, strict=True)
    layout = lay_out([(*prompt, *response) for prompt, response in pairs])
    lengths = layout.lengths
    real = np.arange(lengths.max()) < lengths[:, None]  # (B, L)
    input_ids = np.where(real, layout.tokens[layout.places], pad_id)
    mask = np.arange(counts.max()) < counts[:, None]  # (B, T)
    rows, steps = mask.nonzero()
    columns = starts[rows] - 1 + steps
    padded = np.zeros(mask.shape, np.int64)
    padded[mask] = targets = input_ids[rows, columns + 1]
    arrays = {
        "input_ids": input_ids,
        "responses": padded,
        "response_mask": mask,
        "targets": targets,
        "rows": rows,
        "steps": steps,
        "columns": columns,
        "ends": lengths - 1,
    }
    tensors = {name: moved(array, device) for name, array in arrays.items()}
    return PaddedBatch(**tensors, layout=layout)


def response_logits(
    model: PreTrainedModel, batch: PaddedBatch, inputs: Inputs | None = None
) -> Tensor:
    """The logits that predict the response tokens, (N, V), differentiable.

    Row n belongs to the n-th of ``batch.targets``; ``batch.rows`` names its sequence.
    ``inputs`` are the batch's for the model, where they are known already.
    """
    inputs = inputs or batch.inputs(model)
    with output_layer_at(model, inputs.places[batch.rows, batch.columns]):
        return model(input_ids=inputs.input_ids, **inputs.options).logits[0]


def token_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of response tokens under softmax(logits / temperature).

    The full vocabulary, nothing truncated: what ``sample`` returns for the tokens that
    it drew at that temperature. The model is used in the mode it is in.

    Args:
        model: A causal language model.
        prompts: B lists of token ids.
        responses: B lists of token ids, EOS included where the response has one.
        temperature: Above 0.
        pad_id: What to fill up with; does not change the result.

    Returns:
        ``logprobs`` (B, T), float32, 0 outside the responses, differentiable; and
        ``response_mask`` (B, T), bool. T is the length of the longest response.
    """
    check_temperature(temperature)
    batch = pad_batch(prompts, responses, pad_id=pad_id, device=model.device)
    logits = response_logits(model, batch)
    logprobs = logprobs_of(logits, batch.targets, temperature=temperature)
    return batch.unpack(logprobs), batch.response_mask


def check_temperature(temperature: float) -> None:
    """Refuse a temperature at which nothing has a probability."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it divides the logits.")


def response_logprobs(
    model: PreTrainedModel,
    batch: PaddedBatch,
    inputs: Inputs | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies at the response tokens, by one forward pass.

    Args:
        model: A causal language model.
        batch: From ``pad_batch``.
        inputs: The batch's for the model, where they are known already.
        temperature: Above 0; of the distribution that both describe.
        entropy: Without it only log-probabilities are computed.
        chunk: Rows of logits held at once, (chunk, V) instead of (N, V). Costs the
            output layer once more in the backward pass. None: all at once.

    Returns:
        ``logprobs`` (N,) and ``entropy`` (N,) in nats, or None, in the order of
        ``batch.targets``; float32, differentiable.
    """
    of_logits = logprobs_and_entropy if entropy else _logprobs_alone
    of_logits = partial(of_logits, temperature=temperature)
    targets = batch.targets
    if chunk is None:
        return of_logits(response_logits(model, batch, inputs), targets)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: hold the logits of at least one token.")
    inputs = inputs or batch.inputs(model)
    pieces = _chunk_by_chunk(model, batch, inputs, chunk=chunk, of_logits=of_logits)
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def logprobs_of(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature).

    Args:
        logits: (N, V), any floating type; upcast to float32 before they are divided,
            since bfloat16 would be off by hundredths of a nat.
        targets: (N,), int64.

    Returns:
        (N,), float32 (float64 for logits in float64), differentiable.
    """
    # Cross-entropy is minus the log-probability, without keeping a log-softmax (N, V).
    return -cross_entropy(_tempered(logits, temperature), targets, reduction="none")


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``logprobs_of``, and the entropy of the same distribution over all tokens.

    A token of probability zero adds nothing to the entropy.

    Returns:
        Log-probabilities (N,) and entropies (N,) in nats, float32 (float64 for logits
        in float64), both differentiable.
    """
    all_logprobs = _tempered(logits, temperature).log_softmax(-1)  # (N, V)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    surprise = all_logprobs.clamp(min=_LOWEST_LOGPROB)
    return logprobs, -(all_logprobs.exp() * surprise).sum(-1)


def _logprobs_alone(
    logits: Tensor, targets: Tensor, *, temperature: float
) -> tuple[Tensor, None]:
    return logprobs_of(logits, targets, temperature=temperature), None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model without its output layer, also where it carries a peft adapter.

    A trunk is its own.
    """
    causal = causal_of(model)
    trunk = causal.get_decoder()
    if trunk is causal:  # or it was looked for by a name that it does not have
        parts = (m for m in causal.children() if isinstance(m, PreTrainedModel))
        trunk = next(parts, causal)
    return trunk


def hidden_width(model: PreTrainedModel) -> int:
    """Numbers that the trunk gives of a token; within, its layers may have others."""
    return causal_of(model).get_output_embeddings().weight.shape[1]


def causal_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers in a wrapper of peft, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _chunk_by_chunk(
    model: PreTrainedModel,
    batch: PaddedBatch,
    inputs: Inputs,
    *,
    chunk: int,
    of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Apply ``of_logits`` to the logits of one chunk of response tokens at a time.

    What lies behind the trunk is the model's own forward with the trunk's part given,
    so that logits which a model scales or caps are scaled and capped here too.
    """
    trunk = trunk_of(model)
    with first_call(trunk) as seen, output_layer_at(model, batch.rows[:0]):
        model(input_ids=inputs.input_ids, **inputs.options)
    output: BaseModelOutput = seen["output"]
    hidden = output.last_hidden_state.flatten(0, 1)
    places = hidden[inputs.places[batch.rows, batch.columns]]  # (N, H)

    def of_places(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        part = copy.copy(output)
        part.last_hidden_state = hidden[None]
        with _trunk_gives(trunk, part):
            logits = model(input_ids=batch.input_ids[:1, :1], use_cache=False).logits
        return of_logits(logits[0], targets)

    targets = batch.targets
    # An empty batch still gives one piece, of no rows.
    for hidden, ids in zip(places.split(chunk), targets.split(chunk), strict=True):
        yield checkpoint(
            of_places, hidden, ids, use_reentrant=False, preserve_rng_state=False
        )


@contextmanager
def first_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """See what a module is given and what it makes of it, the first time it is called.

    Yields:
        A dictionary, filled by that call: ``args``, ``kwargs``, ``output``. Nothing is
        copied or detached.
    """
    seen: dict[str, Any] = {}

    def look(_, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        handle.remove()
        seen.update(args=args, kwargs=kwargs, output=output)

    handle = module.register_forward_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _trunk_gives(trunk: nn.Module, output: BaseModelOutput) -> Iterator[None]:
    """Let the trunk return ``output`` instead of computing."""
    own = vars(trunk).get("forward")  # what an extension may have put there
    trunk.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del trunk.forward
        if own is not None:
            trunk.forward = own


@contextmanager
def output_layer_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Let the output layer see the hidden states at some places alone.

    Places are counted row by row, (N,).

    A hook rather than a call of the layer by hand, because some architectures scale or
    cap the logits behind it. The logits come out as (1, N, V).
    """

    def select(_, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = inputs
        return (hidden.flatten(0, 1)[places][None], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()

"""Value functions for PPO: what is expected to be earned from a state on.

V(s_t) is read where the policy decides on token t, before it is drawn: at the place
whose output predicts it. There are three kinds:

=======  ===========================================================================
head     a linear layer on the trunk's last hidden state
branch   L more layers, copies of the trunk's top L to begin with, fed with what
         enters those, then norm and a linear layer (Havrilla et al. 2024 have L = 4
         and stop the gradient into the trunk)
network  a linear layer on a copy of the whole trunk, which shares nothing
=======  ===========================================================================

The linear layer starts at zero, so V = 0 before the first update, whatever the scale of
the rewards. ``score`` gives log-probabilities, entropies and values of responses by one
forward pass of the trunk. The value after the last response token is given too: a
learner needs it where the length limit cut a response, and puts 0 where EOS ended it.

Left out: value functions of another base model than the policy's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlreason.policy.limits import rounding
from rlreason.policy.load import Policy, PolicyError
from rlreason.policy.logprobs import (
    PaddedBatch,
    check_temperature,
    first_call,
    hidden_width,
    pad_batch,
    response_logprobs,
    trunk_of,
)
from rlreason.policy.memory import out_of_memory
from rlreason.policy.packing import Inputs, allow_packing, pad
from rlreason.settings import Settings, paper


class ValueSettings(Settings):
    """Which value function. The defaults are the paper's."""

    kind: Literal["head", "branch", "network"] = paper(
        "branch", "Linear layer, copied top layers, or a whole copy."
    )
    layers: int = paper(
        4, "Layers of the branch; at most as many as the trunk has.", ge=1
    )
    detach: bool = paper(
        True,
        "Stop the gradient of head or branch before the trunk. A network is apart from "
        "the trunk anyway.",
    )


class ValueFunction(nn.Module):
    """V of every place of a batch. Holds its own weights and none of the trunk's.

    Args:
        policy: Whose values; the linear layer is in float32 at least.
        settings: Its kind, and whether the gradient into the trunk stops.
        body: The layers below the linear one; None for a head.
    """

    def __init__(
        self, policy: Policy, settings: ValueSettings, body: PreTrainedModel | None
    ) -> None:
        super().__init__()
        self.kind, self.detach = settings.kind, settings.detach
        self.body = body
        dtype = torch.promote_types(policy.model.dtype, torch.float32)
        options = {"dtype": dtype, "device": policy.device}
        # Made of zeros rather than by nn.Linear, which would draw random numbers.
        width = hidden_width(policy.model)
        self.weight = nn.Parameter(torch.zeros(width, **options))
        self.bias = nn.Parameter(torch.zeros((), **options))

    def source(self, model: PreTrainedModel) -> nn.Module | None:
        """The module of the policy's model whose call ``forward`` must be shown."""
        if self.kind == "branch":
            _, layers = _named_layers(trunk_of(model))
            return layers[-self.body.config.num_hidden_layers]
        return trunk_of(model) if self.kind == "head" else None

    def forward(self, inputs: Inputs, seen: dict) -> Tensor:
        """V of each place: the state that consists of all tokens up to it.

        Args:
            inputs: Of a batch.
            seen: What ``first_call`` saw at ``source``; unused by a network.

        Returns:
            V of all places, row by row, float32 at least.
        """
        if self.kind == "head":
            hidden = self._cut(seen["output"].last_hidden_state)
        elif self.kind == "branch":
            entering = self._cut(_hidden_given(seen))
            hidden = _run(self.body, inputs, inputs_embeds=entering)
        else:
            hidden = _run(self.body, inputs, input_ids=inputs.input_ids)
        return hidden.flatten(0, 1).to(self.weight.dtype) @ self.weight + self.bias

    def _cut(self, hidden: Tensor) -> Tensor:
        return hidden.detach() if self.detach else hidden


def new_value_function(policy: Policy, settings: ValueSettings) -> ValueFunction:
    """Make a value function for a policy; V = 0 everywhere to begin with.

    A branch and a network start from the policy's weights and train all of their own.

    Raises:
        PolicyError: The policy has adapters; its trunk has fewer layers than the branch
            shall have, or does something beside them that a branch would not do.
    """
    if isinstance(policy.model, PeftModel):
        raise PolicyError(f"{policy.name!r} has adapters: merge them first")
    trunk, body = trunk_of(policy.model), None
    if settings.kind == "branch":
        body = _top_layers(trunk, settings.layers, name=policy.name)
    elif settings.kind == "network":
        body = copy.deepcopy(trunk).requires_grad_()
    function = ValueFunction(policy, settings, body)
    if settings.kind == "branch":
        _check_branch(policy, function)
    return function


@dataclass(frozen=True)
class Scores:
    """What ``score`` found. T is the length of the longest response.

    Attributes:
        logprobs: Of the response tokens, (B, T), float32, 0 outside the mask.
        entropy: Of the distributions that they came from, in nats, likewise; or None.
        values: V of the state before each response token, likewise; or None.
        last_values: V of the state after the last response token, (B,); or None. What
            a truncated response could still earn; meaningless after EOS.
        response_mask: True at response tokens, (B, T).
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    last_values: Tensor | None
    response_mask: Tensor


def score(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    value_function: ValueFunction | None = None,
    entropy: bool = True,
    chunk: int | None = None,
) -> Scores:
    """Log-probabilities, entropies and values of responses, by one pass of the trunk.

    Differentiable; call it under ``torch.no_grad`` for the numbers alone. The model is
    used in the mode it is in.

    Args:
        policy: Whose probabilities.
        prompts: B lists of token ids, none empty.
        responses: B lists of token ids, EOS included where the response has one.
        temperature: Above 0; divides the logits.
        value_function: From ``new_value_function``. None: no values.
        entropy: Whether to compute it.
        chunk: Rows of logits that are held at once; None for all.
    """
    check_temperature(temperature)
    batch = pad_batch(prompts, responses, pad_id=policy.pad_id, device=policy.device)
    inputs = batch.inputs(policy.model)
    options = {"temperature": temperature, "entropy": entropy, "chunk": chunk}
    source = value_function and value_function.source(policy.model)
    with first_call(source) if source else nullcontext({}) as seen:
        logprobs, entropies = response_logprobs(policy.model, batch, inputs, **options)
    values = last_values = None
    if value_function is not None:
        values, last_values = _values_at(batch, inputs, value_function(inputs, seen))
    return Scores(
        logprobs=batch.unpack(logprobs),
        entropy=None if entropies is None else batch.unpack(entropies),
        values=values,
        last_values=last_values,
        response_mask=batch.response_mask,
    )


def score_values(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    value_function: ValueFunction,
) -> tuple[Tensor, Tensor]:
    """V before each response token, and the mask: (B, T), (B, T), as ``score`` has it.

    Differentiable in the value function's own weights, and in no other's: the trunk is
    read without a gradient, whether detached or not, and a network does without it.
    """
    batch = pad_batch(prompts, responses, pad_id=policy.pad_id, device=policy.device)
    inputs = batch.inputs(policy.model)
    source, seen = value_function.source(policy.model), {}
    if source is not None:
        with torch.no_grad(), first_call(source) as seen:
            _run(trunk_of(policy.model), inputs, input_ids=inputs.input_ids)
    values, _ = _values_at(batch, inputs, value_function(inputs, seen))
    return values, batch.response_mask


def _values_at(
    batch: PaddedBatch, inputs: Inputs, everywhere: Tensor
) -> tuple[Tensor, Tensor]:
    """From V of all places: before each response token (B, T), at the end (B,).

    V of a place is that of the state with its token, so the state before token t is
    found one place to the left of it, as its log-probability is.
    """
    before = inputs.places[batch.rows, batch.columns]
    ends = inputs.places.gather(1, batch.ends[:, None])[:, 0]
    return batch.unpack(everywhere[before]), everywhere[ends]


def _run(body: PreTrainedModel, inputs: Inputs, **entering: Tensor) -> Tensor:
    """Last hidden states of a body at all places of ``inputs``."""
    if "packed" in inputs.options:
        allow_packing(body)
    return body(**inputs.options, **entering).last_hidden_state


def _hidden_given(seen: dict) -> Tensor:
    """The hidden states that a layer was called with."""
    return seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"]


def _named_layers(trunk: nn.Module) -> tuple[str, nn.ModuleList]:
    count = trunk.config.num_hidden_layers
    for name, child in trunk.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise PolicyError(
        f"{type(trunk).__name__} has no list of {count} "
        "layers, so there is no telling where a value branch starts. Use the kind "
        "'head' or 'network'."
    )


def _top_layers(trunk: PreTrainedModel, count: int, *, name: str) -> PreTrainedModel:
    """A trunk with copies of the top ``count`` layers, to be fed with hidden states."""
    attribute, layers = _named_layers(trunk)
    if count > len(layers):
        raise PolicyError(
            f"A value branch of {count} layers, but the policy {name!r} has "
            f"{len(layers)}. Set layers={len(layers)} or less."
        )
    # What the copy does without is replaced before it is copied, not afterwards: half
    # of the weights of a large model may be at stake.
    unneeded = [*layers[: len(layers) - count]]
    unneeded += [m for m in trunk.children() if isinstance(m, nn.Embedding)]
    unneeded.append(trunk.get_input_embeddings())
    body = copy.deepcopy(trunk, {id(module): _Nothing() for module in unneeded})
    setattr(body, attribute, getattr(body, attribute)[-count:])
    body.config.num_hidden_layers = count
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = body.config.layer_types[-count:]
    return body.requires_grad_()


class _Nothing(nn.Module):
    """Stands where a branch has no module. As a position embedding it adds zero: the
    hidden states that enter the branch hold their positions already."""

    def forward(self, *_, **__) -> Tensor:
        return torch.zeros(())


@torch.no_grad()
def _check_branch(policy: Policy, function: ValueFunction) -> None:
    """See that the branch makes of its input what the trunk makes of it.

    Some architectures scale or normalise the embeddings inside the trunk; a branch of
    such a one would begin with other hidden states than the trunk's.
    """
    ids = torch.arange(8, device=policy.device)[None] % policy.model.config.vocab_size
    trunk = trunk_of(policy.model)
    inputs = pad(ids)
    with first_call(function.source(policy.model)) as seen:
        expected = _run(trunk, inputs, input_ids=ids)
    fault = None
    try:
        found = _run(function.body, inputs, inputs_embeds=_hidden_given(seen))
    except Exception as error:  # an unknown family may raise anything
        if out_of_memory(error):
            raise
        fault = error
    if fault or not _alike(found, expected):
        raise PolicyError(
            f"A value branch does not fit the policy {policy.name!r}: its "
            f"{type(trunk).__name__} does more to embeddings than to add positions. "
            "Use the kind 'head' or 'network'."
        ) from fault


def _alike(found: Tensor, expected: Tensor) -> bool:
    gap = (found - expected).norm()
    return bool(gap <= rounding(expected.dtype) * expected.norm())

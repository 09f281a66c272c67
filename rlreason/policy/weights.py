"""Weights as the named tensors of a checkpoint, and back, wholly or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, named ``model.*``; ``load_model_tensors`` undoes it."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors named ``model.*``; others are passed over."""
    given = {name: t for name, t in tensors.items() if name.startswith("model.")}
    load_tensors(model_tensors(model), given, of=model)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name: all that a checkpoint need hold."""
    named = model.named_parameters()
    return {name: weight.detach() for name, weight in named if weight.requires_grad}


@torch.no_grad()
def load_tensors(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, of: nn.Module
) -> None:
    """Copy tensors into a model's own of the same names.

    Raises:
        ValueError: Not exactly these names and shapes; the model is left as it was.
    """
    shapes, found = ({n: t.shape for n, t in ts.items()} for ts in (own, given))
    if wrong := sorted({name for name, _ in shapes.items() ^ found.items()}):
        raise ValueError(
            f"{len(given)} tensors for {len(own)} weights of {type(of).__name__}; "
            f"missing, unknown or of another shape: {', '.join(wrong[:5])}. Load what "
            "was saved from the same model with the same settings"
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])

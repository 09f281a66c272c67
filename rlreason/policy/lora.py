"""LoRA through peft: a policy that trains small adapters, and its own reference.

With the adapters off the model is what it was before they were added, so that no second
copy is needed for the KL penalty. That holds only if whatever the policy had learnt by
then is in the weights: an adapter that it brings along from SFT is merged first, since
otherwise "adapters off" would be the base model from before SFT.

Left out: other kinds of adapters, several adapters at a time, and dropout in adapters,
which would make the probabilities of training differ from those of sampling.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlreason.policy.load import Policy, PolicyError
from rlreason.settings import Settings, ours, paper, precursor


class LoraSettings(Settings):
    """Adapters, through peft."""

    rank: int = paper(128, "Of the update of each weight matrix.", ge=1)
    alpha: float = ours(128.0, "The update counts alpha / rank.", gt=0)
    targets: Literal["all-linear"] | tuple[str, ...] | None = precursor(
        "all-linear", "Which layers; None: peft's choice for the model."
    )


def with_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str | None = None,
    new_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Policy:
    """Put new adapters on a policy; it acts as before until they are trained.

    Takes the policy's model over rather than copying it: go on with what is returned.
    All weights but the adapters' are frozen. Adapters have the model's number format:
    in half precision it is the optimiser that keeps small updates from being rounded
    away, and a product of float32 matrices would cost more than the frozen layer.

    Args:
        policy: May carry an adapter, which is merged into its weights.
        rank: Of the update of each weight matrix.
        alpha: The update is multiplied by alpha / rank.
        targets: Names of the modules to adapt; ``"all-linear"`` for all linear layers
            but the output layer; None for peft's choice for the architecture.
        new_tokens: Ids whose rows of the embedding are trained whole.
        seed: Of the adapters' first factors; the second ones are zero.

    Raises:
        PolicyError: There are no such modules, or peft has no choice to offer.
    """
    model = merge_adapters(policy).model
    is_conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets
        if targets is None or targets == "all-linear"
        else [*targets],
        trainable_token_indices=[*new_tokens] or None,
        lora_dropout=0.0,
        fan_in_fan_out=is_conv1d,  # GPT-2 stores its matrices the other way round
    )
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers for an attribute by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise PolicyError(
            f"Cannot put LoRA with targets={targets!r} on {policy.name!r}: {error} "
            'Give targets="all-linear" or names of its linear layers.'
        ) from error
    return replace(policy, model=adapted.eval())


def merge_adapters(policy: Policy) -> Policy:
    """The same policy as a plain model: adapters merged into the weights.

    Its model is taken over, not copied. Weights are trainable afterwards.
    """
    if not isinstance(policy.model, PeftModel):
        return policy
    model = policy.model.merge_and_unload().requires_grad_()
    return replace(policy, model=model)


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Make the model its own reference for a while; nothing in it gets a gradient.

    Adapters are on again afterwards, also after an exception.
    """
    with torch.no_grad(), model.disable_adapter():
        yield


def trainable_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training changes, in the model's order."""
    return [weight for weight in model.parameters() if weight.requires_grad]

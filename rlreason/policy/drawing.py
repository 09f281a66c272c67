"""Draws from the model's own distribution: all of the vocabulary, at a temperature."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw tokens from softmax(logits / temperature), all of the vocabulary.

    By inversion: the first token at which the cumulative probability exceeds the
    uniform number. A token of probability zero is never drawn.

    Args:
        logits: (R, V), any floating type; upcast to float32 before they are divided.
        uniforms: One for each token to draw, (S,), float64, in [0, 1).
        temperature: 0 takes the most likely token.
        rows: The row of the logits that each token is drawn from, (S,), int64; by
            default one from each.

    Returns:
        Tokens (S,), int64, and their log-probabilities (S,), float32; at temperature
        0 those of the distribution at temperature 1.
    """
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)
    every = torch.arange(len(probs), device=probs.device)
    rows = every if rows is None else rows
    begins = rows * probs.shape[1]  # places in all rows as one line
    total = torch.zeros((), device=probs.device)
    if temperature == 0:
        tokens = logits.argmax(-1)[rows]
    else:
        # Row r climbs from 2r to 2r + 1, so that one search serves all; what float64
        # resolves there, 1e-12 in a thousand rows, is beyond the float32 of the logits.
        floor = 2.0 * every.double()
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1].clone()
        cumulative += floor[:, None]
        # Rounding can lift a number just below 1 to the total itself, which no entry
        # exceeds; the last token of positive probability is meant.
        below = torch.nextafter(cumulative[:, -1], floor)
        target = torch.minimum((floor[rows] + uniforms * total[rows]), below[rows])
        places = torch.searchsorted(cumulative.view(-1), target, right=True)
        tokens = (places - begins).clamp_(0, probs.shape[1] - 1)  # NaN is out of order
    # What is drawn is likely enough for the logarithm of float32 to be exact to 1e-6.
    # One row of NaN can lead the search for the others astray, so that all become NaN.
    logprobs = probs.view(-1)[begins + tokens].log() + 0 * total.sum().float()
    return tokens, logprobs

"""Reasoning as a Markov decision process (Havrilla et al. 2024, section 3).

===========  ==========================================================================
state        the prompt and the response so far: ``State``
action       one token, or one step (a line of the solution): a tuple of tokens
transition   append the action; nothing is random but the policy: ``append``
reward       paid with the action that earns it; the sparse one, with the last action
end          *terminal* when the policy chose EOS, *truncated* when the length limit cut
===========  ==========================================================================

EOS is an action like any other: it is sampled, has a log-probability, belongs to the
last step and may carry the reward. Padding is no action: it is never in a trajectory,
earns nothing, and no time passes over it. After a terminal state nothing follows, so
its value is 0; a truncated one would have gone on, so a learner with a value function
may put its estimate there. The returns here hold what was paid and nothing else.

Left out: the prompts' distribution (the tasks) and the policy's probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:  # it stands above
    from rlreason.policy.rollout import Rollout

Tokens = tuple[int, ...]
Span = tuple[int, int]
Rewards = TypeVar("Rewards", list[float], Tensor)


@dataclass(frozen=True, slots=True)
class State:
    """All that the next action may depend on."""

    prompt: Tokens
    response: Tokens = ()


def append(state: State, action: Tokens) -> State:
    """The transition: taking ``a`` and then ``b`` is taking ``a + b`` at once."""
    return State(state.prompt, state.response + action)


@dataclass(frozen=True, slots=True)
class Transition:
    """One action. ``terminal`` and ``truncated`` are false before the last one."""

    state: State
    action: Tokens
    reward: float
    next_state: State
    terminal: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An episode: the actions taken from one prompt and what each was paid."""

    prompt: Tokens
    actions: tuple[Tokens, ...]
    rewards: tuple[float, ...]
    terminal: bool

    def transitions(self) -> Iterator[Transition]:
        state, last = State(self.prompt), len(self.actions) - 1
        pairs = zip(self.actions, self.rewards, strict=True)
        for i, (action, reward) in enumerate(pairs):
            after = append(state, action)
            end, eos = i == last, self.terminal
            yield Transition(state, action, reward, after, end and eos, end and not eos)
            state = after

    def returns(self, gamma: float = 1.0) -> list[float]:
        """Reward-to-go of every action; the first is the return of the episode."""
        return discounted_returns(list(self.rewards), gamma)


def trajectory(
    rollout: Rollout,
    reward: float | Sequence[float],
    *,
    spans: Sequence[Span] | None = None,
) -> Trajectory:
    """See a rollout as an episode, of tokens or, with ``step_spans``, of steps.

    ``reward`` is one number for the last action, or one number for each action.
    """
    tokens = rollout.tokens
    if not tokens:
        raise ValueError("a rollout without tokens has no action to pay for")
    spans = [(t, t + 1) for t in range(len(tokens))] if spans is None else spans
    actions = tuple(tokens[start:end] for start, end in spans)
    if not all(actions) or [t for a in actions for t in a] != list(tokens):
        raise ValueError(f"spans {spans} do not cut {len(tokens)} tokens into actions")
    if not isinstance(reward, Sequence):
        reward = [0.0] * (len(actions) - 1) + [float(reward)]
    if len(reward) != len(actions):
        raise ValueError(f"{len(reward)} rewards for {len(actions)} actions")
    return Trajectory(rollout.prompt_tokens, actions, tuple(reward), rollout.finished)


def step_spans(pieces: Sequence[str]) -> list[Span]:
    r"""Group T tokens, given as decoded pieces, into steps: ``[start, end)`` each.

    A step ends with the token that holds its newline. Blank lines join the step after
    them; what is blank at the end (EOS decodes to ``""``) joins the last step.

    >>> step_spans(["2+", "2=4", "\n", "####", " 4", ""])
    [(0, 3), (3, 6)]
    """
    spans: list[Span] = []
    start, text = 0, ""
    for t, piece in enumerate(pieces):
        text += piece
        if "\n" in piece and text.strip():
            spans.append((start, t + 1))
            start, text = t + 1, ""
    if start < len(pieces):
        if not text.strip() and spans:
            start, _ = spans.pop()
        spans.append((start, len(pieces)))
    return spans


def token_rewards(
    lengths: Sequence[int], rewards: Sequence[float], *, width: int | None = None
) -> Tensor:
    """Put the reward of each response on its last token, EOS where there is one: (B, T)

    Rows are padded on the right to ``width`` (default: the longest); padding gets 0.

    >>> token_rewards([2, 3], [1.0, 0.5]).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]
    """
    if min(lengths, default=1) < 1:
        raise ValueError("a response without tokens has no place for its reward")
    placed = torch.zeros(len(lengths), width or max(lengths, default=0))  # (B, T)
    last = torch.as_tensor(lengths, dtype=torch.long)[:, None] - 1
    values = torch.as_tensor(rewards, dtype=placed.dtype)[:, None]
    return placed.scatter_(1, last, values)


def discounted_returns(
    rewards: Rewards, gamma: float, mask: Tensor | None = None
) -> Rewards:
    r"""Reward-to-go :math:`G_t = r_t + \gamma G_{t+1}`, with 0 after the last action.

    Over steps and over tokens the two agree at each step's first token when gamma is 1
    and rewards stand at the ends of steps; below 1, time runs per action.

    Args:
        rewards: A list, or a tensor (..., T).
        mask: For tensors: true on actions. Elsewhere rewards are ignored, even NaN, no
            discount applies and the return is 0, whichever side the padding is on.

    >>> discounted_returns([0.0, 0.0, 1.0], 0.5)
    [0.25, 0.5, 1.0]
    """
    if not isinstance(rewards, Tensor):
        returns, running = [], 0.0
        for reward in reversed(rewards):
            running = reward + gamma * running
            returns.append(running)
        return returns[::-1]
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    returns, running = torch.zeros_like(rewards), rewards.new_zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        paid = rewards[..., t] + gamma * running
        running = torch.where(mask[..., t], paid, running)
        returns[..., t] = running * mask[..., t]
    return returns

"""What the policy is asked, and what it answers: tokens, and how likely they were."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A state to go on from: a question, with or without the start of a response.

    Attributes:
        problem_id: The ``Problem.id`` that is asked.
        tokens: All that the policy reads, BOS included where the model has one.
        stream: Tells the random streams of two prompts of one problem apart.
        stop: A text that ends a continuation as EOS does, or none.
    """

    problem_id: str
    tokens: tuple[int, ...]
    stream: str = ""
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer to one problem.

    Token in, token out: ``prompt_tokens + tokens`` is what is scored and trained on,
    ``text`` is for reading and for the answer check alone and is never tokenised again.

    Attributes:
        problem_id: The ``Problem.id`` that was asked.
        sample: Index of the sample within its problem, 0 to K-1.
        prompt_tokens: Token ids of the prompt, BOS included where the model has one.
        tokens: Sampled ids. They end with EOS where ``finished`` is true, and hold no
            EOS where it is false. (The ``stop`` of a prompt ends a rollout as EOS does;
            what was drawn of it stays.)
        logprobs: Log-probability of each token (nats) under the distribution it was
            drawn from: full vocabulary, temperature applied. As long as ``tokens``.
            0.0 of a label that was put there.
        text: The decoded ``tokens`` without EOS.
        finished: False where the length limit cut the sample (truncated, which is not
            the same as a terminal state).
    """

    problem_id: str
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool

"""The text around a problem: what the policy reads, and what it is to write.

One format serves every task and every policy, with or without examples:

    Q: <question of an example>
    A: <its solution>

    Q: <question>
    A: <the response>

The boundary between prompt and response is a place where mistakes hide, so it is
fixed here. The prompt ends right after ``A:``, with no space behind it. The
response begins with one space. A tokenizer of words glues a space to the word that
follows it; were the space at the end of the prompt, the policy would be asked to go
on from a token that it has hardly ever seen, and the tokens of prompt and response
would differ from those of the whole text.

The end of a response is the EOS *token*, appended by the code that tokenises and
sampled by the policy like any other. It is never written here as text, because a
question could hold that text too. A policy that was trained in this format stops with
EOS alone: a response that goes on with a ``Q:`` of its own has not stopped, and is
scored as it stands. One that only reads the format off examples in its prompt goes on
as they do, with the next question, so there an answer ends where that begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlreason.tasks.problem import Problem

RESPONSE_BEGINS = "\nA:"  # the end of every prompt; no space: see above
NEXT_QUESTION = "\n\nQ:"  # what follows the response of an example


def format_prompt(problem: Problem, shots: Sequence[Problem] = ()) -> str:
    """The text before the response; it ends in ``A:`` without a space behind.

    Args:
        problem: Whose question is asked. Its solution and answer are not read.
        shots: Solved examples to stand first, in this order. Take them from the
            training split: an example from the test split would be leaked.
    """
    examples = "".join(
        f"{_ask(shot)}{format_response(shot.solution)}\n\n" for shot in shots
    )
    return examples + _ask(problem)


def end_of_response(shots: Sequence[Problem] | int) -> str:
    """The text that ends a response as EOS does: after examples there is one."""
    return NEXT_QUESTION if shots else ""


def format_response(solution: str) -> str:
    """The response that states ``solution``; it begins with the one space.

    EOS is not part of the text: see above.
    """
    return " " + solution


def _ask(problem: Problem) -> str:
    return f"Q: {problem.question}{RESPONSE_BEGINS}"

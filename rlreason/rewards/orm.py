r"""The outcome reward model: p(the final answer will be right | question, prefix).

Havrilla et al. (2024), section 3; Cobbe et al. (2021) call it a verifier. A transformer
of its own, a copy of the policy, with a linear layer in place of the output layer: one
logit at every token of the response, from that token and what stands before it. So each
prefix has a score, and the score of the last token is the one of the solution.

1. *Score*: ``score_tokens``, a probability after every token; ``score_responses``, the
   last one.
2. *Rerank*: a model is a scorer of ``evaluate(..., orm=orm)``.
3. *Reward*: ``sparse_orm_reward`` gives the score of the solution on its last token,
   ``dense_orm_reward`` the score of the prefix at the end of every step.

The paper leaves open how large the rewards are. Here a dense reward is the score
divided by the number of steps, so that the return is the mean score over steps: it lies
in [0, 1] as the sparse ones do, and more steps do not earn more by being more. (The sum
without the division would reward every line that still looks right.)

With ``likelihood`` the logit also holds the log-probability of the response so far
under the model's own output layer, times a learned number. That is not in the paper: a
verifier of a million parameters learns from some thousand samples which *questions* are
hard, and hardly which of a question's samples are right; how likely it finds a sample
tells it that from the start (see the log of what was tried).

A score is a guess, and a policy rewarded by it learns what the model likes, right or
not; watch the true accuracy beside it. The model reads tokens as they were sampled,
prompt included: whoever asks with worked examples has it score what it was not trained
on. Training is ``rlreason.algorithms.reward_modelling``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlreason.mdp import step_spans
from rlreason.policy.layout import Text, alike_batches
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import (
    PaddedBatch,
    first_call,
    hidden_width,
    logprobs_of,
    pad_batch,
    response_logits,
    trunk_of,
)
from rlreason.policy.lora import merge_adapters
from rlreason.policy.parallel import gathered, my_alike_share
from rlreason.policy.rollout import Rollout
from rlreason.policy.value import ValueSettings, new_value_function
from rlreason.policy.weights import load_model_tensors, model_tensors
from rlreason.rewards.base import RewardFunction, last_token_reward, problems_of
from rlreason.tasks.problem import Problem

if TYPE_CHECKING:  # it stands above
    from rlreason.algorithms.batching import Example

    Response = Rollout | Example  # whatever has a prompt and a response


class LikelihoodNetwork(nn.Module):
    """logit_t = w . h_t + b + beta * log p(a_1 ... a_t | q), all of it trained.

    Args:
        policy: Its model is copied whole, output layer and all, adapters merged.
    """

    BETA = 0.3  # to begin with; training brought it to 0.1-0.2 for nano

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = merge_adapters(policy.clone()).model
        width = hidden_width(self.model)
        options = {
            "dtype": torch.promote_types(policy.model.dtype, torch.float32),
            "device": policy.device,
        }
        self.weight = nn.Parameter(torch.zeros(width, **options))
        self.bias = nn.Parameter(torch.zeros((), **options))
        self.beta = nn.Parameter(torch.full((), self.BETA, **options))

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Logits after the N response tokens, (N,)."""
        inputs = batch.inputs(self.model)
        with first_call(trunk_of(self.model)) as seen:
            lm_logits = response_logits(self.model, batch, inputs)  # (N, V)
        hidden = seen["output"].last_hidden_state.flatten(0, 1)
        so_far = batch.unpack(logprobs_of(lm_logits, batch.targets)).cumsum(1)  # (B, T)
        after = inputs.places[batch.rows, batch.columns + 1]
        here = hidden[after].to(self.weight.dtype)
        likelihood = so_far[batch.rows, batch.steps]
        return here @ self.weight + self.bias + self.beta * likelihood


class OutcomeRewardModel:
    """Tells how likely a solution, finished or not, is to end in the right answer.

    Attributes:
        network: A full copy of the policy's transformer, adapters merged, with a linear
            layer: what PPO calls a value function that shares nothing. Its value of a
            state is the logit of the prefix that ends there. Or a
            ``LikelihoodNetwork``.
        tokenizer: The policy's.
    """

    def __init__(self, policy: Policy, *, likelihood: bool = False) -> None:
        """Start from the weights of ``policy``, which is left as it is.

        Until the model is trained or ``load_tensors`` was called, every score is 0.5;
        with ``likelihood``, the likelier one is the higher.
        """
        if likelihood:
            network = LikelihoodNetwork(policy).requires_grad_()
        else:
            network = new_value_function(policy, ValueSettings(kind="network"))
        self.network = network.eval()
        self.tokenizer = policy.tokenizer
        self.vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        self.device = policy.device

    def head(self) -> list[nn.Parameter]:
        """What is new on top of the transformer, and starts from nothing."""
        return [p for name, p in self.network.named_parameters() if "." not in name]

    def logits(self, responses: Sequence[Response]) -> tuple[Tensor, PaddedBatch]:
        """Logits after the N response tokens, (N,), differentiable, and their batch.

        Raises:
            ValueError: A response is empty, or holds a token that the model lacks.
        """
        self._check(responses)
        batch = pad_batch(
            [response.prompt_tokens for response in responses],
            [response.tokens for response in responses],
            device=self.device,
        )
        if isinstance(self.network, LikelihoodNetwork):
            return self.network(batch), batch
        inputs = batch.inputs(self.network.body)
        # ``columns`` predict the tokens; the tokens themselves stand one further on.
        after = inputs.places[batch.rows, batch.columns + 1]
        return self.network(inputs, {})[after], batch

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text; EOS is empty."""
        return self.tokenizer.batch_decode(
            [[token] for token in tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, for a safetensors file; ``load_tensors`` undoes it."""
        return model_tensors(self.network)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of ``tensors``, which may hold others beside them."""
        load_model_tensors(self.network, tensors)

    def __call__(self, problem: Problem, rollouts: Sequence[Rollout]) -> list[float]:
        """Score the samples of one problem: the ``orm`` of ``evaluate``."""
        problems_of(rollouts, [problem])
        return score_responses(self, rollouts)

    def _check(self, responses: Sequence[Response]) -> None:
        known = self.vocabulary
        for response in responses:
            if not response.tokens:
                raise ValueError("a response without tokens has no score")
            largest = max(*response.prompt_tokens, *response.tokens)
            if largest >= known:
                raise ValueError(
                    f"token {largest} is not among the {known} of the reward model; "
                    "score samples of a policy with the same tokenizer"
                )


@torch.no_grad()
def score_tokens(
    orm: OutcomeRewardModel,
    responses: Sequence[Response],
    *,
    micro_tokens: int = 8192,
) -> list[tuple[float, ...]]:
    """Probability of being right after each token of each response.

    A score depends on its own prompt and prefix alone: not on the batch, the padding or
    what comes later (up to rounding, about 1e-6).

    Args:
        orm: The model.
        responses: Rollouts, in any order; truncated ones are scored like others.
        micro_tokens: Tokens that go through the model at once, common beginnings
            once. A single longer response goes alone.

    Returns:
        One tuple a response, as long as its ``tokens``.
    """
    # Of the 96 samples of an easy question most are repeats
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, response in enumerate(responses):
        places.setdefault((response.prompt_tokens, response.tokens), []).append(i)
    scores: list[tuple[float, ...]] = [()] * len(responses)
    own = []  # of several processes each scores its share

    def text(same: list[int]) -> Text:
        return responses[same[0]].prompt_tokens, responses[same[0]].tokens

    share = my_alike_share([*places.values()], text)
    for mb in alike_batches(share, max_tokens=micro_tokens, text=text):
        logits, _ = orm.logits([responses[same[0]] for same in mb])
        rows = logits.sigmoid().cpu().split([len(responses[s[0]].tokens) for s in mb])
        own += [(same, row.tolist()) for same, row in zip(mb, rows, strict=True)]
    for part in gathered(own):
        for same, row in part:
            for i in same:
                scores[i] = tuple(row)
    return scores


def score_responses(
    orm: OutcomeRewardModel, responses: Sequence[Response]
) -> list[float]:
    """Probability that each response is right, read at its last token."""
    return [scores[-1] for scores in score_tokens(orm, responses)]


def sparse_orm_reward(orm: OutcomeRewardModel) -> RewardFunction:
    """Give the score of the whole solution on its last token."""

    def reward(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        problems_of(rollouts, problems)
        scores = score_responses(orm, rollouts)
        pairs = zip(rollouts, scores, strict=True)
        return [last_token_reward(rollout, score) for rollout, score in pairs]

    return reward


def dense_orm_reward(orm: OutcomeRewardModel) -> RewardFunction:
    """Give the score of the prefix on the last token of each step, over their number.

    Steps are those of ``mdp.step_spans``; the last one ends with the last token. The
    return is the mean score over steps.
    """

    def reward(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        problems_of(rollouts, problems)
        rewards = []
        for r, scores in zip(rollouts, score_tokens(orm, rollouts), strict=True):
            ends = [end - 1 for _, end in step_spans(orm.pieces(r.tokens))]
            row = [0.0] * len(r.tokens)
            for end in ends:
                row[end] = scores[end] / len(ends)
            rewards.append(tuple(row))
        return rewards

    return reward

"""PPO: its equations against loops and known answers, its phases against a hand count.

Tests named ``test_pNN_`` hold a pitfall of the field: the wrong version stands beside
the right one and is seen to fail.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from itertools import combinations, product
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from margins import effect
from pydantic import ValidationError
from tiny_models import tiny_policy
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    same_bits,
    toy_policy,
    weights,
)

from rlreason import sample
from rlreason.algorithms import ppo as algorithm
from rlreason.algorithms.credit import (
    best_of_k,
    best_of_k_advantages,
    bootstrapped,
    explained_variance,
    gae,
    group_ids,
    response_advantages,
    whiten,
)
from rlreason.algorithms.experience import Experience, agree, warn_of_mismatch
from rlreason.algorithms.losses import kl_estimate, policy_loss, value_loss
from rlreason.algorithms.optim import DivergedError
from rlreason.algorithms.ppo import Learner, ppo
from rlreason.algorithms.ppo_settings import (
    BaselineSettings,
    GaeSettings,
    KlSettings,
    LoraSettings,
    PpoSettings,
)
from rlreason.evaluation.metrics import pass_at_k
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.lora import merge_adapters, with_lora
from rlreason.policy.reference import Reference
from rlreason.policy.rollout import Rollout
from rlreason.policy.value import Scores, ValueSettings
from rlreason.rewards.base import last_token_reward
from rlreason.rewards.sparse import sparse_rewards, sparse_token_rewards

HEAD = ValueSettings(kind="head", layers=1, detach=False)
QUICK = PpoSettings(
    phases=3,
    rollouts=12,
    n=2,
    temperature=1.0,
    max_new_tokens=24,
    epochs=2,
    batch_size=6,
    lr=1e-3,
    lr_floor=1e-4,
    lora=None,
    micro_tokens=150,
    credit=GaeSettings(lam=1.0, value=HEAD),
)


def quick(**changes) -> PpoSettings:
    return PpoSettings.model_validate({**dict(QUICK), **changes})


def run(recorder=None, *, start=None, settings=QUICK, **options):
    return ppo(
        start or toy_policy(), TOY_PROBLEMS, settings, recorder=recorder, **options
    )


@lru_cache(maxsize=8)
def plain_run(settings: PpoSettings) -> tuple[dict[str, Tensor], list[dict]]:
    """The weights and rows of an undisturbed run, for others to be compared with."""
    recorder = Memory()
    return weights(run(recorder, settings=settings)), recorder.rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.tensor([5, 1, 4])
MASK = torch.arange(5) < LENGTHS[:, None]  # (3, 5)


# Generalised advantage estimation


def gae_by_definition(rewards, values, gamma, lam):
    """Equation 16 as a double sum over one row of T tokens; V = 0 behind the last."""
    after = [*values[1:], 0.0]
    length = len(rewards)
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
        for t in range(length)
    ]


@given(
    rewards=hnp.arrays(float, (3, 5), elements=st.floats(-5, 5)),
    values=hnp.arrays(float, (3, 5), elements=st.floats(-5, 5)),
    gamma=st.sampled_from([0.9, 0.999, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_gae_is_its_definition(rewards, values, gamma, lam):
    rewards, values = torch.from_numpy(rewards), torch.from_numpy(values)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = gae_by_definition(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(returns, (advantages + values) * MASK)
    assert not advantages[~MASK].any()


def test_p23_returns_are_the_reward_to_go_when_nothing_is_discounted():
    rewards, values = random(3, 5, seed=1) * MASK, random(3, 5, seed=2)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * MASK
    assert torch.allclose(returns, to_go, atol=1e-6)
    # Wrong: returns made from advantages that are whitened already
    wrong = (whiten(advantages, MASK) + values) * MASK
    assert not torch.allclose(wrong, to_go, atol=1e-2)


def test_p24_nothing_leaks_from_padding_on_either_side_or_between():
    rewards, values = random(1, 4, seed=1), random(1, 4, seed=2)
    whole, _ = gae(rewards, values, torch.ones(1, 4), 0.9, 0.8)
    for places in ([0, 1, 2, 3], [3, 4, 5, 6], [1, 2, 5, 6]):
        wide = torch.full((2, 1, 7), math.nan)
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[:, places] = True
        wide[0, :, places], wide[1, :, places] = rewards, values
        found, returns = gae(wide[0], wide[1], mask, 0.9, 0.8)
        assert torch.equal(found[:, places], whole)
        assert found.isfinite().all()
        assert returns.isfinite().all()
    # Wrong: values of padding taken for V of the state after the end
    values = torch.cat([values, torch.ones(1, 1)], 1)
    rewards = torch.cat([rewards, torch.zeros(1, 1)], 1)
    wrong, _ = gae(rewards, values, torch.ones(1, 5), 0.9, 0.8)
    assert not torch.allclose(wrong[:, :4], whole)


def test_p17_a_cut_response_is_bootstrapped_once_and_an_ended_one_never():
    rewards = random(3, 5) * MASK
    cut = torch.tensor([True, False, True])
    last = torch.tensor([2.0, 3.0, 4.0])
    found = bootstrapped(rewards, MASK, last_values=last, truncated=cut, gamma=0.5)
    extra = found - rewards
    assert extra.count_nonzero() == 2
    assert extra[0, 4] == pytest.approx(1.0)
    assert extra[2, 3] == pytest.approx(2.0)
    # With V everywhere the true value of a reward of 1 a token for ever, a row that
    # was cut shows no advantage; taken for terminal, it seems to have failed
    gamma, length = 0.9, 6
    forever = torch.full((1, length), 1 / (1 - gamma))
    ones, full = torch.ones(1, length), torch.ones(1, length, dtype=torch.bool)
    with_v = bootstrapped(
        ones,
        full,
        last_values=forever[:, 0],
        truncated=torch.tensor([True]),
        gamma=gamma,
    )
    assert gae(with_v, forever, full, gamma, 0.95)[0].abs().max() < 1e-5
    assert gae(ones, forever, full, gamma, 0.95)[0][0, -1] < -1


# Whitening and baselines


def test_p22_whitening_is_over_the_mask_alone():
    values = random(3, 5) * 3 + 7
    white = whiten(values, MASK)
    assert white[MASK].mean() == pytest.approx(0, abs=1e-6)
    assert white[MASK].var(unbiased=False) == pytest.approx(1, abs=1e-5)
    assert not white[~MASK].any()
    padded = torch.nn.functional.pad(values, (0, 100), value=1e6)
    wide = torch.nn.functional.pad(MASK, (0, 100))
    assert torch.allclose(whiten(padded, wide)[:, :5], white, atol=1e-5)
    # Wrong: zeros of the padding in mean and variance; the mean added back
    everywhere = values * MASK
    wrong = (everywhere - everywhere.mean()) / everywhere.std()
    assert abs(wrong[MASK].mean()) > 0.1
    assert abs((white + values[MASK].mean())[MASK].mean()) > 1


def kept_advantages(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Of the tokens of all responses of a phase, and of the best that are kept."""
    seen = []

    class Noted(Learner):
        def kept(self, experience):
            kept = super().kept(experience)
            advantages, mask = experience.advantages, experience.response_mask
            seen.append([advantages[rows][mask[rows]] for rows in (slice(None), kept)])
            return kept

    changes = {} if kind == "gae" else {"credit": BaselineSettings(kind=kind)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "Learner", Noted)
        run(settings=quick(phases=1, rollouts=48, n=8, keep=1, seed=seed, **changes))
    return seen[0]


BEST = {
    kind: effect(above=0.2, name=f"the_best_are_above_the_mean_of_all_by_{kind}")(
        lambda seed, kind=kind: float(kept_advantages(kind, seed)[1].mean())
    )
    for kind in ("gae", "rloo")
}


@pytest.mark.learning
@pytest.mark.parametrize("kind", BEST)
def test_p22_credit_is_given_and_whitened_over_all_before_the_best_are_kept(kind):
    everything, best = kept_advantages(kind, seed=0)
    assert everything.mean().item() == pytest.approx(0, abs=1e-4)
    assert everything.std().item() == pytest.approx(1, abs=1e-2)
    assert len(best) < len(everything)
    BEST[kind].check()  # the wrong version whitens the best alone: nothing special


@pytest.mark.parametrize("count", [1, 4])
def test_p22_equal_values_whiten_to_zero(count):
    mask = torch.arange(5) < count
    assert whiten(torch.full((1, 5), 3.3), mask[None]).tolist() == [[0.0] * 5]
    # Of large values, the rounding of their mean is no spread
    many = torch.full((1, 1000), 100.3)
    assert not whiten(many, torch.ones(1, 1000)).any()
    assert many.mean() != many[0, 0]


def test_response_advantages_are_their_definitions():
    totals = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    rloo = response_advantages(totals, groups, "rloo")
    grpo = response_advantages(totals, groups, "grpo")
    for i, total in enumerate(totals):
        same = [j for j in range(6) if groups[j] == groups[i]]
        others = torch.stack([totals[j] for j in same if j != i])
        assert rloo[i] == pytest.approx(float(total - others.mean()))
        group = totals[same]
        expected = (total - group.mean()) / (group.std() + 1e-6)
        assert grpo[i] == pytest.approx(float(expected), abs=1e-5)
    plain = response_advantages(totals, groups, "reinforce")
    assert torch.allclose(plain, totals - 0.5)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_p29_groups_go_by_question_and_not_by_place(kind):
    totals, groups = random(8), torch.tensor([3, 3, 3, 5, 5, 5, 9, 9])
    order = torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])
    expected = response_advantages(totals, groups, kind)
    shuffled = response_advantages(totals[order], groups[order], kind)
    assert torch.allclose(shuffled, expected[order], atol=1e-6)
    # Wrong: rows cut into groups by their place
    by_place = response_advantages(totals[order], torch.arange(8) // 3, kind)
    assert not torch.allclose(by_place, expected[order], atol=1e-2)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_p29_a_group_of_equals_or_of_one_teaches_nothing(kind):
    totals = torch.tensor([1.0, 1.0, 1.0, 5.0])
    groups = torch.tensor([0, 0, 0, 1])
    assert not response_advantages(totals, groups, kind).any()
    # Shares, such as dense rewards pay, have a mean that is rounded
    for reward in (0.7, 2 / 3, 10.1):
        equal = torch.full((7,), reward)
        found = response_advantages(equal, torch.zeros(7, dtype=torch.int64), kind)
        assert found.abs().max() < 1e-5


def test_p29_grpo_does_not_blow_up_the_penalty_where_all_rewards_are_equal():
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    penalties = torch.tensor([0.010, 0.012, 0.011, 0.013, 0.010, 0.012, 0.011, 0.013])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = response_advantages(rewards, groups, "grpo", penalties=penalties)
    centred = penalties[:4].mean() - penalties[:4]
    assert torch.allclose(found[:4], centred, atol=1e-6)  # as dear as it is, no more
    alone = response_advantages(rewards, groups, "grpo")
    assert torch.allclose(found[4:], alone[4:] + centred, atol=1e-6)
    # Wrong: the whole return over its deviation. A question that taught nothing weighs
    # as much as one that was solved once
    wrong = response_advantages(rewards - penalties, groups, "grpo")
    assert float(wrong[:4].abs().max()) > 1
    assert float(found[:4].abs().max()) < 0.01
    # The others have no divisor, and take the return as it is
    for kind in ("reinforce", "rloo"):
        assert torch.allclose(
            response_advantages(rewards, groups, kind, penalties=penalties),
            response_advantages(rewards - penalties, groups, kind),
        )


def best_of_k_by_counting(rewards: Tensor, k: int) -> Tensor:
    """Of each response: the mean best of the sets with it less that of those without"""
    found = []
    for i in range(len(rewards)):
        sides = {True: [], False: []}
        for chosen in combinations(range(len(rewards)), k):
            sides[i in chosen].append(max(float(rewards[j]) for j in chosen))
        found.append(fmean(sides[True]) - fmean(sides[False]))
    return torch.tensor(found)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_best_of_k_is_counted_over_all_sets(k, right):
    binary = (torch.arange(6) < right).float()
    for rewards in (binary, random(6), random(6).round()):
        found = best_of_k_advantages(rewards, k)
        assert torch.allclose(found, best_of_k_by_counting(rewards, k), atol=1e-5)
        assert float(found.sum()) == pytest.approx(0, abs=1e-5)
    assert best_of_k(binary, k) == pytest.approx(pass_at_k(6, right, k))


def test_best_of_one_is_rloo_and_of_more_pays_rare_answers():
    groups = torch.tensor([0, 1]).repeat(6)  # two questions, mixed
    hard = torch.tensor([1.0, 0, 0, 0, 0, 0])
    easy = torch.tensor([1.0, 1, 1, 1, 1, 0])
    rewards, penalties = torch.stack([hard, easy], dim=1).flatten(), random(12)

    def credited(k: int) -> Tensor:
        return response_advantages(rewards, groups, "rloo", penalties=penalties, k=k)

    for k in (2, 5):
        paid = credited(k) - response_advantages(-penalties, groups, "rloo")
        assert torch.allclose(paid[groups == 0], best_of_k_advantages(hard, k))
        assert torch.allclose(paid[groups == 1], best_of_k_advantages(easy, k))
    assert torch.allclose(
        credited(1), response_advantages(rewards - penalties, groups, "rloo")
    )
    # A right answer: of the mean it earns 1 less the others' mean, of the best of five
    # nothing where others are right as well
    assert best_of_k_advantages(hard, 5)[0] == 1
    assert best_of_k_advantages(easy, 5)[0] == 0


def gradient_of_the_best_of_k(p: float, n: int, k: int, credit) -> float:
    """Its expectation over n answers, each right with chance p, along the logit of p"""
    total = 0.0
    for outcome in product((0.0, 1.0), repeat=n):
        chance = math.prod(p if right else 1 - p for right in outcome)
        scores = torch.tensor(outcome) - p  # d log-probability / d logit
        total += chance * float((credit(torch.tensor(outcome), k) * scores).sum())
    return total


def test_the_best_of_k_is_climbed_without_bias():
    p, n, k = 0.3, 5, 3
    exact = k * (1 - p) ** (k - 1) * p * (1 - p)  # of 1 - (1 - p)^k; once a response
    found = gradient_of_the_best_of_k(p, n, k, best_of_k_advantages) * k / n
    assert found == pytest.approx(exact, rel=1e-4)

    # Wrong: the baseline is the best of k of all, the response's own among them
    def shrunk(rewards, k):
        without = [best_of_k(rewards[torch.arange(n) != i], k) for i in range(n)]
        joined = best_of_k_advantages(rewards, k) + torch.stack(without)
        return joined - best_of_k(rewards, k)

    wrong = gradient_of_the_best_of_k(p, n, k, shrunk) * k / n
    assert abs(wrong / exact - 1) > 0.2


def test_p29_two_questions_of_one_text_are_two_groups():
    def rollout(problem_id):
        return Rollout(problem_id, 0, (1, 2), (3,), (0.0,), "", True)

    ids = group_ids([rollout("a"), rollout("b"), rollout("a")])
    assert ids.tolist() == [0, 1, 0]


# KL


def test_kl_estimates_are_the_kl_in_expectation():
    logits, other = random(5, seed=1), random(5, seed=2)
    policy, reference = Categorical(logits=logits), Categorical(logits=other)
    exact = float(kl_divergence(policy, reference))
    for kind in ("k1", "k3"):
        estimate = kl_estimate(policy.logits, reference.logits, kind)
        assert float((policy.probs * estimate).sum()) == pytest.approx(exact, abs=1e-6)
    assert (kl_estimate(policy.logits, reference.logits, "k3") >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(policy.logits, policy.logits, kind).any()


def test_p20_only_k2_has_the_gradient_of_the_kl():
    logits = random(5, seed=1).requires_grad_()
    reference = random(5, seed=2).log_softmax(0)
    exact = kl_divergence(Categorical(logits=logits), Categorical(logits=reference))
    (right,) = torch.autograd.grad(exact, logits)

    def as_loss(kind):
        """Gradient of an estimate's mean over samples that are held fixed."""
        logprobs = logits.log_softmax(0)
        fixed = logprobs.detach().exp()
        loss = (fixed * kl_estimate(logprobs, reference, kind)).sum()
        return torch.autograd.grad(loss, logits)[0]

    assert torch.allclose(as_loss("k2"), right, atol=1e-6)
    assert as_loss("k1").abs().max() < 1e-6  # wrong: none at all
    assert not torch.allclose(as_loss("k3"), right, atol=1e-2)  # wrong: KL(ref || pi)


def penalised_rows(seed: int) -> list[dict]:
    recorder = Memory()
    kl = KlSettings(coef=0.3)
    run(recorder, settings=quick(phases=2, kl=kl, lr=3e-3, max_kl=50.0, seed=seed))
    return recorder.rows


@effect(above=-3.0)
def log10_of_the_kl_after_a_phase(seed: int) -> float:
    return math.log10(abs(penalised_rows(seed)[1]["kl"]))


@pytest.mark.learning
def test_p20_what_is_taken_off_the_reward_is_what_is_reported():
    rows = penalised_rows(seed=0)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    log10_of_the_kl_after_a_phase.check()  # else there is nothing to be seen
    for row in rows:
        penalty = row["reward"] - row["penalised_reward"]
        assert penalty == pytest.approx(0.3 * row["kl"], abs=1e-5)


def test_an_adaptive_coefficient_follows_ziegler():
    settings = quick(kl=KlSettings(coef=0.1, target=2.0, horizon=100))
    learner = Learner(toy_policy(), TOY_PROBLEMS, settings)
    for kl, factor in ((2.0, 1.0), (2.2, 1 + 0.1 * 0.12), (99.0, 1 + 0.2 * 0.12)):
        before = learner.kl_coef
        learner.adapt_kl(kl)
        assert learner.kl_coef == pytest.approx(before * factor)
    learner.adapt_kl(0.0)
    assert learner.kl_coef < before * (1 + 0.2 * 0.12)


# Losses


def losses_in_a_loop(new, old, advantages, mask, clip):
    total = 0.0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(float(new[b, t] - old[b, t]))
        a = float(advantages[b, t])
        total -= min(ratio * a, max(min(ratio, 1 + clip), 1 - clip) * a)
    return total


def test_the_clipped_surrogate_is_its_definition():
    new, old, advantages = (random(3, 5, seed=s) for s in (1, 2, 3))
    loss, metrics = policy_loss(new, old, advantages, MASK, 0.2)
    expected = losses_in_a_loop(new, old, advantages, MASK, 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    outside = ((new - old).exp() - 1).abs() > 0.2
    assert metrics["clip_fraction"] == (outside & MASK).sum()


def test_a_ratio_beyond_the_clip_in_the_good_direction_gets_no_gradient():
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, _ = policy_loss(new, old, advantages, torch.ones(1, 4), 0.2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient != 0).tolist() == [[False, True, True, False]]


def test_p21_losses_and_metrics_do_not_see_padding():
    tensors = [random(3, 5, seed=s) for s in range(4)]
    wide = [torch.nn.functional.pad(t, (0, 100), value=9.0) for t in tensors]
    mask = torch.nn.functional.pad(MASK, (0, 100))
    loss, metrics = policy_loss(*tensors[:3], MASK, 0.2)
    wide_loss, wide_metrics = policy_loss(*wide[:3], mask, 0.2)
    assert wide_loss == pytest.approx(float(loss), rel=1e-5)
    for name, value in metrics.items():
        assert float(wide_metrics[name]) == pytest.approx(float(value), rel=1e-5)
    small = value_loss(*tensors[:3], MASK, 0.2)
    assert float(value_loss(*wide[:3], mask, 0.2)) == pytest.approx(float(small))
    # Wrong: a mean over all places of the tensor
    ratio = (wide[0] - wide[1]).exp()
    assert ratio.mean() != pytest.approx(float(ratio[mask].mean()), rel=0.05)


def test_p26_a_ratio_that_overflows_gives_finite_losses_and_gradients():
    new = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for advantage in (1.0, -1.0):
        advantages = torch.full((1, 2), advantage)
        loss, metrics = policy_loss(
            new, torch.zeros(1, 2), advantages, torch.ones(1, 2), 0.2
        )
        (gradient,) = torch.autograd.grad(loss, new)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
    assert new.exp()[0, 0].isinf()  # wrong: without the clamp


def test_p28_the_value_loss_is_the_larger_of_both_and_half_the_square():
    new, old, returns = (random(3, 5, seed=s) for s in (1, 2, 3))
    expected, wrong = 0.0, 0.0
    for b, t in MASK.nonzero().tolist():
        v, o, r = (float(x[b, t]) for x in (new, old, returns))
        near = o + max(-0.2, min(0.2, v - o))
        expected += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        wrong += 0.5 * min((v - r) ** 2, (near - r) ** 2)
    assert float(value_loss(new, old, returns, MASK, 0.2)) == pytest.approx(expected)
    assert abs(wrong - expected) > 0.1
    plain = 0.5 * ((new - returns).square() * MASK).sum()
    assert value_loss(new, old, returns, MASK, None) == pytest.approx(float(plain))
    # Nothing is clipped while the values are those of the sampling time
    unmoved = value_loss(old, old, returns, MASK, 0.2)
    assert unmoved == pytest.approx(float(value_loss(old, old, returns, MASK, None)))


def test_p18_without_a_token_the_losses_are_zero_with_zero_gradients():
    new = random(2, 3).requires_grad_()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss, _ = policy_loss(new, random(2, 3, seed=1), random(2, 3, seed=2), nothing, 0.2)
    loss = loss + value_loss(new, random(2, 3), random(2, 3, seed=4), nothing, 0.2)
    assert loss == 0
    assert not torch.autograd.grad(loss, new)[0].any()


def test_explained_variance():
    returns = random(50)
    assert explained_variance(returns + 3.0, returns) == pytest.approx(1)
    assert explained_variance(torch.zeros(50), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3, abs=1e-4)
    assert explained_variance(returns, torch.ones(50)) == 0


# A phase


def test_the_start_waits_on_the_cpu_while_its_copies_work(monkeypatch):
    """On a GPU it would take the place of one model more."""
    start, moves, seen = toy_policy(), [], []
    monkeypatch.setattr(start.model, "to", lambda device: moves.append(str(device)))
    look = lambda *_: seen.append(len(moves)) or {}  # noqa: E731
    ppo(start, TOY_PROBLEMS, QUICK, on_phase=look)
    assert seen == [1] * QUICK.phases  # moved once, before the first phase
    assert moves == ["cpu", str(start.device)]


@pytest.fixture(scope="module")
def scored():
    """A learner that has scored, paid and credited twelve rollouts, some cut."""
    settings = quick(max_new_tokens=20, kl=KlSettings(coef=0.1))
    learner = Learner(toy_policy(), TOY_PROBLEMS, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after some phases: V and policy have moved
        for module in (learner.policy.model, learner.value_function):
            for weight in module.parameters():
                weight.add_(0.002 * torch.randn(weight.shape, generator=generator))
    rollouts = sample(learner.policy, TOY_PROBLEMS, k=2, max_new_tokens=20, seed=1)
    paid = sparse_token_rewards(rollouts, TOY_PROBLEMS)
    experience = learner.pay(learner.score(rollouts), paid)
    return learner, learner.credit(experience), paid


def test_p17_what_goes_on_at_a_cut_keeps_what_it_was_paid_there(scored):
    """Of shaping, the last change of the potential was taken away."""
    rollouts = scored[1].rollouts
    cut = [i for i, rollout in enumerate(rollouts) if not rollout.finished]
    paid = [(0.0,) * (len(rollout.tokens) - 1) + (0.5,) for rollout in rollouts]

    def shaped(rollouts, problems):
        return paid

    settings = quick(max_new_tokens=20, credit=BOOTSTRAPPED)
    for goes_on, kept in ((False, 0.0), (True, 0.5)):
        shaped.goes_on = goes_on
        learner = Learner(toy_policy(), TOY_PROBLEMS, settings, reward=shaped)
        rewards = learner.pay(learner.score(rollouts), paid).rewards
        last = [rewards[i, len(rollouts[i].tokens) - 1].item() for i in cut]
        assert last == [kept] * len(cut)


def test_the_fixture_has_cut_and_ended_and_right_and_wrong_ones(scored):
    _, experience, paid = scored
    assert {r.finished for r in experience.rollouts} == {True, False}
    assert {sum(numbers) for numbers in paid} == {0.0, 1.0}


def test_p19_the_reward_stands_on_the_last_token_and_nowhere_else(scored):
    _, experience, paid = scored
    task = experience.rewards
    for row, (rollout, numbers) in enumerate(
        zip(experience.rollouts, paid, strict=True)
    ):
        places = task[row].abs() > 1e-6
        last = len(rollout.tokens) - 1
        assert places.nonzero().flatten().tolist() == [last] * (sum(numbers) == 1.0)
    # Wrong: in the last column, which is padding for all but the longest
    lengths = experience.response_mask.sum(1)
    assert (lengths < task.shape[1]).any()


def test_p03_before_the_first_update_the_ratio_is_one_at_every_temperature():
    for temperature in (0.5, 0.7, 1.0, 1.3):
        recorder = Memory()
        run(recorder, settings=quick(temperature=temperature, phases=1))
        assert recorder.rows[0]["ratio_error"] < 1e-4
    # Wrong: scored at another temperature than sampled
    policy = toy_policy()
    learner = Learner(policy, TOY_PROBLEMS, quick(temperature=1.0))
    rollouts = sample(policy, TOY_PROBLEMS, k=2, temperature=0.7, max_new_tokens=19)
    found = learner.score(rollouts)
    worst = max(
        abs(float(found.logprobs[i, t]) - logprob)
        for i, rollout in enumerate(rollouts)
        for t, logprob in enumerate(rollout.logprobs)
    )
    assert worst > 1e-2


def test_p10_what_was_sampled_is_what_is_trained(monkeypatch):
    seen = []
    score = algorithm.score

    def spy(policy, prompts, responses, **options):
        seen.extend(zip(prompts, responses, strict=True))
        return score(policy, prompts, responses, **options)

    asked = []
    sample_prompts = algorithm.sample_prompts

    def note(*args, **options):
        rollouts = sample_prompts(*args, **options)
        asked.extend((r.prompt_tokens, r.tokens) for r in rollouts)
        return rollouts

    monkeypatch.setattr(algorithm, "score", spy)
    monkeypatch.setattr(algorithm, "sample_prompts", note)
    run(settings=quick(phases=2))
    assert set(seen) == set(asked)


def test_p12_padding_that_is_eos_does_no_harm(scored):
    learner, experience, _ = scored
    eos = replace(learner.policy, pad_id=learner.policy.eos_id)
    assert learner.policy.pad_id != eos.pad_id
    other = Learner(eos, TOY_PROBLEMS, learner.settings)
    other.policy, other.value_function = eos, learner.value_function
    found = other.score(experience.rollouts)
    for name in ("response_mask", "logprobs", "values", "last_values"):
        assert torch.allclose(
            getattr(found, name), getattr(experience, name), atol=1e-5
        )


def gradients(learner) -> Tensor:
    groups = learner.optimizer.param_groups
    parts = [p.grad.flatten() for group in groups for p in group["params"]]
    learner.optimizer.zero_grad()
    return torch.cat(parts)


@pytest.mark.parametrize("micro_tokens", [1, 100, 100_000])
def test_p25_the_gradient_does_not_depend_on_how_a_mini_batch_is_cut(
    micro_tokens, scored, monkeypatch
):
    learner, experience, _ = scored
    rows = [7, 0, 3, 10, 5]
    learner.accumulate(experience, rows)
    expected = gradients(learner)
    monkeypatch.setattr(learner, "micro_tokens", micro_tokens)
    learner.accumulate(experience, rows)
    assert torch.allclose(gradients(learner), expected, atol=1e-5)
    # Wrong: the mean of the means of the micro-batches
    for row in rows:
        learner.accumulate(experience, [row])
    wrong = gradients(learner) / len(rows)
    assert not torch.allclose(wrong, expected, atol=1e-3)


# What is not computed


def without_value(**changes) -> Learner:
    """A learner of a group's baseline, which nothing but advantages teaches."""
    changes = {
        "credit": BaselineSettings(kind="grpo"),
        "whiten": False,
        "kl": KlSettings(coef=0.0),
        "n": 4,
    } | changes
    return Learner(toy_policy(), TOY_PROBLEMS, quick(**changes))


def two_groups(learner: Learner) -> list[Rollout]:
    """Four samples of two questions; those of the second will all be paid alike."""
    return sample(learner.policy, TOY_PROBLEMS[:2], k=4, max_new_tokens=20, seed=1)


PAID = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def credited_without_value(learner: Learner, rollouts: list[Rollout]):
    pairs = zip(rollouts, PAID, strict=True)
    paid = [last_token_reward(rollout, reward) for rollout, reward in pairs]
    return learner.credit(learner.pay(learner.score(rollouts), paid))


def test_groups_without_a_signal_are_left_out_and_the_gradient_is_the_same(monkeypatch):
    learner = without_value()
    experience = credited_without_value(learner, two_groups(learner))
    rows = list(range(8))
    assert learner.taught(experience, rows) == [0, 1, 2, 3]
    metrics = learner.accumulate(experience, rows)
    found = gradients(learner)
    monkeypatch.setattr(learner, "taught", lambda experience, rows: rows)
    learner.accumulate(experience, rows)
    expected = gradients(learner)
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
    # Wrong: a mean over those that are left
    learner.accumulate(experience, rows[:4])
    assert not torch.allclose(gradients(learner), expected, rtol=0.1)
    # What is told of the update is of the tokens that are learned from
    assert metrics["entropy"] == pytest.approx(
        learner.accumulate(experience, rows[:4])["entropy"], rel=1e-5
    )
    learner.optimizer.zero_grad()


def test_where_no_group_has_a_signal_the_moments_still_move_the_weights():
    learner = without_value()
    experience = credited_without_value(learner, two_groups(learner))
    assert learner.taught(experience, [5, 4, 7]) == [5]
    learner.accumulate(experience, [5, 4, 7])
    grads = [w.grad for weights in learner.trained for w in weights]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "changes",
    [
        {"credit": GaeSettings(value=HEAD)},
        {"entropy_coef": 0.01},
        {"stop_kl": 1.0},
        {"whiten": True},
        {"kl": KlSettings(coef=0.1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_all_are_learned_from_where_anything_else_teaches(changes):
    learner = without_value(**changes)
    with torch.no_grad():  # away from the reference
        learner.policy.model.get_input_embeddings().weight.mul_(1.01)
    experience = credited_without_value(learner, two_groups(learner))
    if learner.settings.whiten:
        white = whiten(experience.advantages, experience.response_mask)
        experience = replace(experience, advantages=white)
    assert learner.taught(experience, [*range(8)]) == [*range(8)]


@pytest.mark.parametrize("credit", ["grpo", "gae"])
def test_the_sampler_s_probabilities_are_the_old_ones_where_they_agree(credit):
    settings = {"credit": GaeSettings(value=HEAD)} if credit == "gae" else {}
    learner = without_value(**settings, kl=KlSettings(coef=0.0), max_kl=None)
    learner.micro_tokens = 40  # several parts
    rollouts = two_groups(learner)
    passes = []
    learner.policy.model.register_forward_hook(lambda *_: passes.append(1))
    expected, mask = token_logprobs(
        learner.policy.model,
        [r.prompt_tokens for r in rollouts],
        [r.tokens for r in rollouts],
    )
    passes.clear()
    experience = learner.score(rollouts)
    parts = len([*learner.parts(rollouts)])
    assert parts > 2
    assert len(passes) == (parts if credit == "gae" else 1)
    assert (experience.logprobs - expected).abs()[mask].max() < 1e-4
    # A sampler that says something else is not believed
    passes.clear()
    other = [replace(r, logprobs=tuple(x + 0.01 for x in r.logprobs)) for r in rollouts]
    found = learner.score(other).logprobs
    assert len(passes) == parts
    assert (found - expected).abs()[mask].max() < 1e-4


@pytest.mark.parametrize("half", [False, True])
def test_a_sampler_at_another_temperature_does_not_agree(half):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, 8, 50, generator=generator)

    dtype = torch.bfloat16 if half else torch.float32

    def scored(temperature: float) -> tuple[Scores, Tensor]:
        """By a pass and by a sampler that draws, and tells, at some temperature."""
        drawn = torch.distributions.Categorical(logits=logits / temperature).sample()
        at = [
            (logits / t).log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            for t in (1.0, temperature)
        ]
        mask = torch.ones_like(drawn, dtype=torch.bool)
        return Scores(at[0], None, None, None, mask), at[1]

    torch.manual_seed(0)
    scores, sampled = scored(1.0)
    assert agree(scores, sampled, dtype)
    rounded = sampled + 0.005 * torch.randn(sampled.shape, generator=generator)
    assert agree(scores, rounded, dtype) == half
    scores, sampled = scored(0.9)
    assert not agree(scores, sampled, dtype)
    # Wrong: the mean of the ratios, which is 1 for any two distributions
    assert abs((scores.logprobs - sampled).exp().mean() - 1) < 0.02


REFERENCES = {
    "copy": {},
    "swap": {"kl": KlSettings(reference="swap")},
    "lora": {"lora": LoraSettings(rank=4, alpha=8.0)},
}


def rows_beside(kind: str, seed: int, start: Policy | None = None) -> list[dict]:
    changes = {"phases": 2, "lr": 5e-3, "lr_floor": 5e-3, "max_kl": None, "seed": seed}
    recorder = Memory()
    run(recorder, start=start, settings=quick(**changes, **REFERENCES[kind]))
    return recorder.rows


LEFT = {
    kind: effect(above=-5.0, name=f"log10_of_the_kl_from_a_reference_by_{kind}")(
        lambda seed, kind=kind: math.log10(rows_beside(kind, seed)[-1]["kl_token"])
    )
    for kind in REFERENCES
}


@pytest.mark.learning
@pytest.mark.parametrize("kind", REFERENCES)
def test_p34_the_reference_is_the_start_and_stays_it(kind):
    start = toy_policy()
    before = weights(start)
    first = rows_beside(kind, 0, start)[0]
    assert abs(first["kl"]) < 1e-5
    assert first["kl_token"] < 1e-6
    assert same_bits(weights(start), before)
    LEFT[kind].check()


def test_copy_and_swap_are_the_same_run():
    copied = quick(phases=2, kl=KlSettings(reference="copy"))
    swapped = quick(phases=2, kl=KlSettings(reference="swap"))
    assert same_bits(weights(run(settings=swapped)), plain_run(copied)[0])


def test_a_start_with_adapters_is_kept_as_the_weights_that_it_amounts_to():
    start = with_lora(tiny_policy(), rank=2, alpha=4.0, seed=0)
    plain = tiny_policy(seed=1)
    for name, weight in start.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    merged = weights(merge_adapters(start.clone()))
    with Reference(start, plain, "swap").lent() as lent:
        assert same_bits(weights(lent), merged)


def test_weights_that_are_swapped_come_back_after_an_error():
    start, policy = tiny_policy(), tiny_policy(seed=1)
    before = weights(policy)
    reference = Reference(start, policy, "swap")

    def fail_within():
        with reference.lent() as lent:
            assert same_bits(weights(lent), weights(start))
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert same_bits(weights(policy), before)


def test_p27_values_are_zero_in_the_first_phase_alone():
    recorder = Memory()
    credit = GaeSettings(lam=1.0, value=HEAD, value_coef=1.0)
    run(recorder, settings=quick(phases=2, credit=credit))
    assert recorder.rows[0]["value"] == 0
    assert recorder.rows[1]["value"] != 0


def credited(learner, rollouts):
    paid = sparse_token_rewards(rollouts, TOY_PROBLEMS)
    return learner.credit(learner.pay(learner.score(rollouts), paid))


@pytest.mark.parametrize("kind", ["head", "branch", "network"])
def test_epochs_of_v_alone_bring_v_nearer_and_leave_the_policy_to_the_bit(kind, scored):
    """After updates of the policy, whose moments would otherwise move it on."""
    value = ValueSettings(kind=kind, layers=1, detach=False)
    credit = GaeSettings(lam=1.0, value=value, value_clip=None, value_epochs=6)
    learner = Learner(toy_policy(), TOY_PROBLEMS, quick(credit=credit))
    rollouts = scored[1].rollouts
    experience = credited(learner, rollouts)
    learner.learn(experience, 0)
    before, mask = weights(learner.policy), experience.response_mask

    def error() -> float:
        misses = learner.score(rollouts).values - experience.returns
        return float((misses * mask).square().sum())

    far = error()
    learner.learn_values(experience, 1)
    assert same_bits(weights(learner.policy), before)
    assert error() < far
    # A gradient that is none is told as the policy's is, and makes no step
    kept = weights(learner.policy)
    spoilt = replace(experience, returns=experience.returns * math.nan)
    assert not math.isfinite(learner.learn_values(spoilt, 1))
    assert same_bits(weights(learner.policy), kept)
    # Wrong: a gradient of zero in place of none, and AdamW goes on by its moments
    for weight in learner.trained[0]:
        weight.grad = torch.zeros_like(weight)
    learner.optimizer.step()
    assert not same_bits(weights(learner.policy), before)


def test_v_alone_is_taught_each_token_s_own_return(scored):
    learner, experience, _ = scored
    function, rows = learner.value_function, list(range(len(experience.rollouts)))
    assert len(list(learner.parts(experience.rollouts))) > 1
    learner.accumulate_values(experience, rows)
    found = function.weight.grad.clone()
    learner.optimizer.zero_grad()

    def by(returns: Tensor) -> Tensor:
        for rows, new in learner._scores(experience.rollouts):
            width = new.response_mask.shape[1]
            misses = (new.values - returns[rows, :width]) * new.response_mask
            (0.5 * misses.square().sum() / experience.response_mask.sum()).backward()
        gradient = function.weight.grad.clone()
        learner.optimizer.zero_grad()
        return gradient

    assert torch.allclose(found, by(experience.returns), atol=1e-5)
    # Wrong: the returns of another response
    assert not torch.allclose(found, by(experience.returns.roll(1, 0)), atol=1e-3)


def test_v_alone_is_taught_with_fewer_tokens_at_once_where_memory_ends(
    scored, monkeypatch
):
    learner, experience, _ = scored
    function, rows = learner.value_function, list(range(len(experience.rollouts)))
    learner.accumulate_values(experience, rows)
    expected = function.weight.grad.clone()
    learner.optimizer.zero_grad()
    whole = algorithm.score_values

    def small(policy, prompts, *given):
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(policy, prompts, *given)

    monkeypatch.setattr(algorithm, "score_values", small)
    monkeypatch.setattr(learner, "micro_tokens", 10_000)
    learner.accumulate_values(experience, rows)
    assert learner.micro_tokens < 10_000
    assert torch.allclose(function.weight.grad, expected, atol=1e-5)
    learner.optimizer.zero_grad()


def test_what_v_is_to_become_has_a_lambda_of_its_own(scored):
    rollouts = scored[1].rollouts

    def by(**lambdas):
        credit = GaeSettings(value=HEAD, **lambdas)
        learner = Learner(toy_policy(), TOY_PROBLEMS, quick(credit=credit))
        with torch.no_grad():
            learner.value_function.bias.fill_(0.3)  # or every lambda is alike
        return credited(learner, rollouts)

    both, short, full = by(lam=0.5, value_lam=1.0), by(lam=0.5), by(lam=1.0)
    assert torch.equal(both.advantages, short.advantages)
    assert torch.equal(both.returns, full.returns)
    assert not torch.allclose(short.returns, full.returns, atol=0.01)
    assert not torch.allclose(short.advantages, full.advantages, atol=0.01)


@effect(above=6.0)
def updates_that_an_early_stop_leaves_out(seed: int) -> float:
    plain, stopped = Memory(), Memory()
    for recorder, stop_kl in ((plain, None), (stopped, 1e-3)):
        changes = {"epochs": 6, "lr": 2e-2, "phases": 1, "seed": seed}
        run(recorder, settings=quick(**changes, stop_kl=stop_kl))
    assert plain.rows[0]["updates"] == 12
    assert stopped.rows[0]["updates"] > 0
    return 12 - stopped.rows[0]["updates"]


@pytest.mark.learning
def test_an_early_stop_makes_fewer_updates():
    updates_that_an_early_stop_leaves_out.check()


def test_rollouts_are_counted_and_every_question_gets_n(monkeypatch):
    recorder, asked = Memory(), []
    sample_prompts = algorithm.sample_prompts

    def note(policy, prompts, **options):
        asked.append([p.problem_id for p in prompts])
        return sample_prompts(policy, prompts, **options)

    monkeypatch.setattr(algorithm, "sample_prompts", note)
    run(recorder, settings=quick(rollouts=8, n=2))
    assert [row["rollouts"] for row in recorder.rows] == [8, 16, 24]
    # Six questions, four a phase: all are asked twice in three phases
    assert sorted(problem_id for ids in asked for problem_id in ids) == sorted(
        [p.id for p in TOY_PROBLEMS] * 2
    )


def test_a_question_that_comes_again_gets_other_samples():
    seen = []

    def note(rollouts, problems):
        seen.append({(r.problem_id, r.sample): r.logprobs for r in rollouts})
        return sparse_token_rewards(rollouts, problems)

    run(settings=quick(phases=2, lr=0.0, lr_floor=0.0), reward=note)
    assert seen[0].keys() == seen[1].keys()
    assert any(seen[0][key] != seen[1][key] for key in seen[0])


# Canaries


def test_p51_a_rate_of_zero_leaves_everything_as_it_was():
    recorder = Memory()
    settings = quick(phases=2, lr=0.0, lr_floor=0.0, weight_decay=0.0)
    assert same_bits(weights(run(recorder, settings=settings)), weights(toy_policy()))
    for row in recorder.rows:
        assert row["stop_kl"] < 1e-9
        assert row["clip_fraction"] == 0
        assert abs(row["kl"]) < 1e-5


# Three questions, all with the answer 2, which half of the first answers are
TWOS = [problem for problem in TOY_PROBLEMS if problem.answer == "2"]
LEARN = quick(
    phases=6,
    rollouts=48,
    n=16,
    batch_size=24,
    lr=5e-4,
    warmup=0.2,
    micro_tokens=2000,
    credit=GaeSettings(lam=1.0, value=HEAD, value_coef=0.1, value_clip=None),
    kl=KlSettings(coef=0.01),
    max_kl=50.0,
)
BOOTSTRAPPED = LEARN.credit.model_copy(update={"bootstrap": True, "gamma": 0.98})


def learn(seed: int, *, credit: GaeSettings | BaselineSettings = LEARN.credit):
    settings = LEARN.model_copy(update={"credit": credit, "seed": seed})
    return ppo(toy_policy(), TWOS, settings)


def accuracy(policy) -> float:
    rollouts = sample(policy, TWOS, k=32, max_new_tokens=24, seed=99)
    return sum(sparse_rewards(rollouts, TWOS)) / len(rollouts)


@lru_cache(maxsize=1)
def accuracy_of_the_start() -> float:
    return accuracy(toy_policy())


def rise(credit: GaeSettings | BaselineSettings, seed: int) -> float:
    return accuracy(learn(seed, credit=credit)) - accuracy_of_the_start()


CREDITS = {"gae": LEARN.credit, "bootstrapped": BOOTSTRAPPED} | {
    kind: BaselineSettings(kind=kind) for kind in ("reinforce", "rloo", "grpo")
}
RISES = {
    name: effect(above=0.2, name=f"ppo_raises_the_accuracy_by_{name}")(
        partial(rise, credit)
    )
    for name, credit in CREDITS.items()
}


@pytest.mark.learning
@pytest.mark.parametrize("credit", RISES)
def test_p52_it_learns_which_of_two_answers_is_right(credit):
    RISES[credit].check()


@effect(above=0.2)
def a_flipped_advantage_lowers_the_accuracy(seed: int) -> float:
    right = algorithm.policy_loss

    def flipped(new_logprobs, logprobs, advantages, mask, clip):
        return right(new_logprobs, logprobs, -advantages, mask, clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "policy_loss", flipped)
        return accuracy_of_the_start() - accuracy(learn(seed))


@pytest.mark.learning
def test_p52_a_flipped_advantage_unlearns():
    a_flipped_advantage_lowers_the_accuracy.check()


class Knowing(Learner):
    """V is right from the start: whatever is answered is paid 1."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        torch.nn.init.ones_(self.value_function.bias)


class PaidTwice(Knowing):
    """Wrong: pays for the text where it was cut, though V of going on comes on top."""

    def pay(self, experience, paid):
        settings, self.settings = self.settings, LEARN
        experience = super().pay(experience, paid)
        self.settings = settings
        return experience


def truncated_last(learner: type[Learner], seed: int) -> float:
    """The share of responses that are cut in the last phases, a third in the first."""
    changes = {"credit": BOOTSTRAPPED, "max_new_tokens": 20, "seed": seed}
    changes |= {"phases": 10, "rollouts": 96, "n": 32, "batch_size": 48}
    recorder = Memory(save_every=10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "Learner", learner)
        ppo(
            toy_policy(),
            TWOS,
            LEARN.model_copy(update=changes),
            reward=lambda rollouts, _: [last_token_reward(r, 1.0) for r in rollouts],
            recorder=recorder,
        )
    return sum(row["truncated"] for row in recorder.rows[-3:]) / 3


@effect(above=0.4)
def a_cut_response_that_is_paid_twice_learns_not_to_stop(seed: int) -> float:
    return truncated_last(PaidTwice, seed) - truncated_last(Knowing, seed)


@pytest.mark.learning
def test_p17_a_cut_response_that_is_paid_twice_learns_never_to_stop():
    a_cut_response_that_is_paid_twice_learns_not_to_stop.check()


# Resuming

EVERYTHING = quick(
    phases=4,
    credit=GaeSettings(
        value=ValueSettings(kind="branch", layers=1),
        value_lr_scale=2.0,
        value_epochs=1,
        value_lam=1.0,
    ),
    kl=KlSettings(coef=0.1, target=0.5, horizon=50),
    lora=LoraSettings(rank=4, alpha=8.0),
)


@pytest.mark.parametrize(
    "settings",
    [QUICK, EVERYTHING, quick(credit=BaselineSettings(kind="grpo"))],
    ids=["full", "lora-branch-adaptive", "grpo"],
)
def test_p47_a_run_that_stops_anywhere_and_goes_on_equals_an_undisturbed_one(settings):
    expected, rows = plain_run(settings)
    for die_at in range(settings.phases):
        recorder = Memory(die_at=die_at)
        with pytest.raises(InterruptedRunError):
            run(recorder, settings=settings)
        assert same_bits(weights(run(recorder, settings=settings)), expected), die_at
        assert recorder.rows == rows, die_at


@pytest.fixture(scope="module")
def killed() -> Memory:
    """What a run of EVERYTHING left that died in its last phase but one."""
    recorder = Memory(die_at=2)
    with pytest.raises(InterruptedRunError):
        run(recorder, settings=EVERYTHING)
    return recorder


@pytest.mark.parametrize("lost", [None, "value.", "adamw.", "kl_coef"])
def test_p47_what_a_checkpoint_must_hold(lost, killed):
    """Forgetting value function, optimiser or KL coefficient: another run."""
    tensors, state, rows = killed.saved
    fresh = Learner(toy_policy(), TOY_PROBLEMS, EVERYTHING)
    if lost == "value.":
        own = {f"value.{k}": v for k, v in fresh.value_function.state_dict().items()}
        tensors = tensors | own
    elif lost == "adamw.":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("adamw.")}
    elif lost == "kl_coef":
        state = state.replace('"kl_coef": ', '"kl_coef": 0.1, "was": ')
    recorder = Memory()
    recorder.rows, recorder.saved = list(killed.rows), (tensors, state, rows)
    run(recorder, settings=EVERYTHING)
    assert (recorder.rows == plain_run(EVERYTHING)[1]) == (lost is None)


# Settings and faults

VARIED = quick(phases=2, max_new_tokens=18, lr=2e-3, clip=0.05, max_kl=50.0)
CHANGED = {
    "phases": 1,
    "rollouts": 8,
    "n": 1,
    "keep": 1,
    "temperature": 0.5,
    "max_new_tokens": 19,
    "epochs": 1,
    "batch_size": 12,
    "lr": 1e-3,
    "lr_floor": 1e-5,
    "warmup": 0.9,
    "betas": (0.5, 0.5),
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "clip": 1e-3,
    "entropy_coef": 0.5,
    "whiten": False,
    "stop_kl": 1e-9,
    "seed": 1,
    "credit": GaeSettings(lam=0.5, value=HEAD),
    "kl": KlSettings(coef=3.0),
    "lora": LoraSettings(rank=2, alpha=4.0),
}
# These change speed and memory, not the result; max_kl only stops a run
OTHERS = {
    "micro_tokens",
    "logit_rows",
    "compile",
    "gradient_checkpointing",
    "max_kl",
    "curriculum",
}


@pytest.mark.parametrize("name", CHANGED)
def test_p49_every_setting_changes_the_result(name):
    changed = VARIED.model_validate({**dict(VARIED), name: CHANGED[name]})
    assert changed != VARIED
    assert not same_bits(weights(run(settings=changed)), plain_run(VARIED)[0])


def test_p49_no_setting_is_left_out():
    assert set(CHANGED) | OTHERS == set(PpoSettings.model_fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_rows": 7},
        {"gradient_checkpointing": True},
        {"micro_tokens": 60},
        {"micro_tokens": None},
    ],
)
def test_p50_saving_memory_changes_nothing_but_rounding(changes):
    saving = Memory()
    run(saving, settings=quick(phases=1, **changes))
    for name, value in plain_run(quick(phases=1))[1][0].items():
        if name not in ("kind", "ratio_error"):
            assert saving.rows[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (
                name
            )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollouts": 9, "n": 2}, "no multiple of n"),
        ({"n": 2, "keep": 3}, "keep=3 is more than n=2"),
        ({"n": 1, "credit": BaselineSettings(kind="rloo")}, "set n to 2 or more"),
        ({"credit": BaselineSettings(kind="grpo", k=2)}, "grpo has no best of k"),
        ({"credit": BaselineSettings(kind="rloo", k=2)}, "set n .now 2. above k"),
        ({"top_k": 5}, "Extra inputs"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        quick(**values)
    with pytest.raises(ValidationError, match="start above 0"):
        KlSettings(coef=0.0, target=1.0)


def test_the_defaults_are_the_papers():
    settings = PpoSettings()
    assert (settings.rollouts, settings.n, settings.epochs) == (1024, 4, 4)
    assert (settings.batch_size, settings.lr, settings.temperature) == (256, 1e-6, 0.7)
    assert (settings.kl.coef, settings.lora.rank, settings.clip) == (0.05, 128, 0.2)
    assert (settings.gae.gamma, settings.gae.lam) == (1.0, 0.95)
    assert settings.gae.value == ValueSettings(kind="branch", layers=4, detach=True)
    updates = settings.epochs * settings.rollouts // settings.batch_size
    assert settings.phases * updates == 4000


def test_numbers_that_are_none_stop_the_run_and_name_the_phase(monkeypatch):
    right, phases = algorithm.policy_loss, []

    def broken(*args):
        loss, metrics = right(*args)
        return loss * (math.nan if len(phases) == 1 else 1.0), metrics

    monkeypatch.setattr(algorithm, "policy_loss", broken)
    recorder = Memory()
    with pytest.raises(DivergedError, match=r"phase 2: .*not a finite.*after phase 1"):
        run(recorder, on_phase=lambda phase, _: phases.append(phase) or {})
    kept = recorder.saved[0]
    assert all(tensor.isfinite().all() for tensor in kept.values())


RUN_AWAY = quick(lr=5e-2, lr_floor=5e-2, epochs=4, max_kl=1e-3)


@effect(above=math.log10(RUN_AWAY.max_kl))
def log10_of_the_kl_of_a_run_away(seed: int) -> float:
    recorder = Memory()
    changes = {"max_kl": None, "phases": 2, "seed": seed}
    run(recorder, settings=RUN_AWAY.model_copy(update=changes))
    return math.log10(recorder.rows[1]["kl_token"])


@pytest.mark.learning
def test_a_run_away_from_the_reference_is_stopped():
    message = r"phase 2: .*max_kl=0.001.*Raise kl.coef"
    with pytest.raises(DivergedError, match=message):
        run(Memory(), settings=RUN_AWAY)


def test_p33_what_is_handed_back_is_what_was_trained_in_half_precision_too():
    start = toy_policy()
    start.model.bfloat16()
    lora = LoraSettings(rank=4, alpha=4.0)
    learner = Learner(start, TOY_PROBLEMS, quick(lora=lora))
    generator = torch.Generator().manual_seed(0)
    for name, weight in learner.policy.model.named_parameters():
        if "lora_B" in name:  # about what the paper's rate leaves after some updates
            weight.data.normal_(std=2e-4, generator=generator)
    adapters = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in learner.policy.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    learned = {n: m.get_delta_weight("default").detach() for n, m in adapters.items()}
    finished = learner.finished().model
    before = start.model.state_dict()
    assert finished.dtype == torch.float32
    for name, delta in learned.items():
        old = before[f"{name}.weight"].float()
        merged = finished.state_dict()[f"{name}.weight"] - old
        assert torch.allclose(merged, delta.float(), atol=1e-6)
        # Wrong: merged in bfloat16
        rounded = (old + delta).bfloat16().float() - old
        assert float((rounded - delta).norm() / delta.norm()) > 0.5


def test_in_half_precision_the_mean_tells_a_mismatch_and_no_single_token():
    def experience(off: list[float]) -> Experience:
        logprobs = torch.full((1, len(off)), -1.0)
        told = tuple((logprobs[0] - torch.tensor(off)).tolist())
        rollout = Rollout("p", 0, (1,), (2,) * len(off), told, "", True)
        empty, mask = torch.zeros(1, len(off)), torch.ones(1, len(off)).bool()
        parts = (logprobs, logprobs, empty, empty[:, 0], *[empty] * 4)
        return Experience((rollout,), mask, *parts)

    policy = tiny_policy()
    half = replace(policy, model=policy.model.bfloat16())
    rounding, wrong = [0.5, *[0.001] * 99], [0.05] * 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_mismatch(experience(rounding), half, 0)
        with pytest.raises(UserWarning, match=r"on average .* more than 0\.02"):
            warn_of_mismatch(experience(wrong), half, 0)
    with pytest.warns(UserWarning, match=r"disagree by 6\.5e-01 on the probability"):
        warn_of_mismatch(experience(rounding), tiny_policy(), 0)

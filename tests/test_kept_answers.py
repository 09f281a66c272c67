"""Kept answers: what was sampled comes back as it was, and only where it belongs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import KINDS, PROBLEMS, tiny_policy
from toys import TOY_PROBLEMS, toy_policy, toy_recipe

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.evaluate import answer_groups
from rlreason.policy.vocabulary import add_tokens
from rlreason.runs import kept_rollouts as module
from rlreason.runs.evaluate import evaluate_recipe
from rlreason.runs.folder import RunFolder
from rlreason.runs.kept_rollouts import kept_answers, weights_digest
from rlreason.runs.steps import train_expert_iteration

OPTIONS = {"k": 3, "temperature": 0.9, "max_new_tokens": 12, "seed": 4}


def asked(monkeypatch) -> list[tuple[str, ...]]:
    """The problems of each call that samples, from now on."""
    calls = []

    def noted(policy, problems, **options):
        calls.append(tuple(problem.id for problem in problems))
        return answer_groups(policy, problems, **options)

    monkeypatch.setattr(module, "answer_groups", noted)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": 1, "temperature": 0.0},
        {"shots": PROBLEMS[3:]},
        {"label": BAD},
        {"max_new_tokens": 2},
    ],
    ids=["plain", "greedy", "shots", "label", "cut"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_back_as_they_were_sampled(kind, changes, monkeypatch):
    policy = add_tokens(tiny_policy(kind), [GOOD, BAD])
    options = OPTIONS | changes
    fresh = dict(answer_groups(policy, PROBLEMS, **options))
    calls = asked(monkeypatch)
    for _ in range(2):
        kept = dict(kept_answers(policy, PROBLEMS, **options))
        assert kept == fresh
    assert len(calls) == 1


def test_a_copy_of_the_weights_is_the_same_policy(monkeypatch):
    calls = asked(monkeypatch)
    policy = tiny_policy()
    for each in (policy, policy.clone(), replace(policy, name="by another name")):
        list(kept_answers(each, PROBLEMS, **OPTIONS))
    assert len(calls) == 1


def test_greedy_answers_are_the_same_for_every_seed(monkeypatch):
    calls = asked(monkeypatch)
    for seed in (0, 1):
        options = OPTIONS | {"k": 1, "temperature": 0.0, "seed": seed}
        list(kept_answers(tiny_policy(), PROBLEMS, **options))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 2},
        {"temperature": 0.8},
        {"max_new_tokens": 11},
        {"seed": 5},
        {"shots": PROBLEMS[3:]},
        {"label": GOOD},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_the_answers_names_the_folder(changes, monkeypatch):
    calls = asked(monkeypatch)
    policy = add_tokens(tiny_policy(), [GOOD, BAD])
    list(kept_answers(policy, PROBLEMS, **OPTIONS))
    list(kept_answers(policy, PROBLEMS, **OPTIONS | changes))
    assert len(calls) == 2


def test_so_do_the_problems_and_their_ids(monkeypatch):
    calls = asked(monkeypatch)
    renamed = [replace(PROBLEMS[0], id="another"), *PROBLEMS[1:]]
    for problems in (PROBLEMS, PROBLEMS[:2], PROBLEMS[::-1], renamed):
        list(kept_answers(tiny_policy(), problems, **OPTIONS))
    assert len(calls) == 4


def test_so_do_the_weights_their_type_the_configuration_and_what_ends_an_answer():
    policies = [tiny_policy() for _ in range(4)]
    with torch.no_grad():
        next(policies[1].model.parameters())[0, 0] += 1e-6
    policies[2].model.to(torch.bfloat16)
    policies[3].model.config.rms_norm_eps = 1e-3
    policies.append(replace(policies[0], eos_id=5))  # of another tokenizer
    policies.append(replace(policies[0], more_eos_ids=(5,)))
    assert len({weights_digest(policy) for policy in policies}) == 6
    # Where a model came from is not what it is
    policies[0].model.config._name_or_path = "elsewhere"
    assert weights_digest(policies[0]) == weights_digest(tiny_policy())


def test_a_killed_run_goes_on_with_the_questions_that_it_lacks(monkeypatch, capsys):
    policy = toy_policy()
    whole = dict(answer_groups(policy, TOY_PROBLEMS, **OPTIONS))
    taken = partial(kept_answers, policy, TOY_PROBLEMS, **OPTIONS)

    def breaks(*args, **options):
        groups = answer_groups(*args, **options)
        for _ in range(4):
            yield next(groups)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_groups", breaks)
        patch.setattr(RunFolder, "due", lambda run: True)
        with pytest.raises(KeyboardInterrupt):
            list(taken())
    capsys.readouterr()
    found = dict(taken())
    assert "4 of 6 questions are sampled" in capsys.readouterr().err
    assert found.keys() == whole.keys()
    for i, rollouts in found.items():
        assert [r.tokens for r in rollouts] == [r.tokens for r in whole[i]]


def test_what_was_sampled_is_logged(runs):
    rollouts = dict(kept_answers(tiny_policy(), PROBLEMS, **OPTIONS))
    (folder,) = runs.iterdir()
    assert folder.name.startswith("answers-")
    row = json.loads((folder / "metrics.jsonl").read_text())
    flat = [r for group in rollouts.values() for r in group]
    assert row == {
        "kind": "answers",
        "problems": len(PROBLEMS),
        "samples": len(flat),
        "tokens": sum(len(r.tokens) for r in flat),
        "truncated": pytest.approx(sum(not r.finished for r in flat) / len(flat)),
    }


def test_a_recipe_samples_once_and_keeps_nothing_of_a_policy_on_its_way(
    tmp_path, runs, monkeypatch
):
    recipe = toy_recipe(tmp_path)
    trained = train_expert_iteration(recipe)
    assert any("validation_maj_1" in row for row in trained.rounds)
    assert not list(runs.glob("answers-*"))
    first = evaluate_recipe(recipe, trained.policy)
    calls = asked(monkeypatch)
    assert evaluate_recipe(recipe, trained.policy) == first
    assert not calls
    evaluate_recipe(recipe, trained.policy, seed=1)
    assert calls

"""Reports on scripted rollouts: what is counted, paired, warned of and stored."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlreason.evaluation.evaluate import compare, evaluate, grade_greedy, grade_samples
from rlreason.evaluation.metrics import maj_at_k, pass_at_k, rerank_at_k
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import prompt_groups, sample_groups
from rlreason.rewards import sparse_reward, sparse_rewards
from rlreason.tasks.problem import Problem

PROBLEMS = [Problem(f"t/{i}", f"What is {i}+1?", "", str(i + 1)) for i in range(4)]


def solve(operation, answer):
    return f"So <<{operation}={answer}>>{answer}.\n#### {answer}"


def rollout(problem, text, *, number=0, finished=True):
    tokens = (5, 0) if finished else (5, 6)
    return Rollout(problem.id, number, (1,), tokens, (-0.1, -0.2), text, finished)


@dataclass
class Script:
    """Stands for a policy: what it says greedily and in its samples, by problem."""

    greedy: dict[str, str]
    samples: dict[str, list[str]]
    unfinished: tuple[str, ...] = ()
    name: str = "script"


def play(script, problems, *, label, **options):
    """Sampling reads the script, last problem first; the real signature is checked."""
    assert label is None
    call = inspect.signature(sample_groups).bind(script, problems, **options)
    settings = call.arguments["settings"]
    inspect.signature(prompt_groups).bind(script, problems, **settings)
    greedy = settings["temperature"] == 0
    for i in reversed(range(len(problems))):
        texts = [script.greedy[problems[i].id]]
        if not greedy:
            texts = script.samples[problems[i].id][: settings["k"]]
        yield (
            i,
            [
                rollout(
                    problems[i], text, number=j, finished=text not in script.unfinished
                )
                for j, text in enumerate(texts)
            ],
        )


played = partial(evaluate, sampler=play)


@pytest.fixture
def script():
    right = [solve(f"{i}+1", i + 1) for i in range(4)]
    other = [solve(f"1+{i}", i + 1) for i in range(4)]
    wrong = [solve(f"{i}+2", i + 2) for i in range(4)]
    none = "I do not know."
    samples = [
        [right[0], right[0], other[0], wrong[0]],
        [wrong[1], wrong[1], wrong[1], right[1]],
        [none, none, none, right[2]],
        [wrong[3], none, wrong[3], none],
    ]
    greedy = [right[0], wrong[1], none, wrong[3]]
    return Script(
        {p.id: text for p, text in zip(PROBLEMS, greedy, strict=True)},
        {p.id: texts for p, texts in zip(PROBLEMS, samples, strict=True)},
    )


@pytest.fixture(scope="module")
def tiny_policy():
    """An untrained Llama of one layer over single characters."""
    torch.manual_seed(0)
    alphabet = "\n !#.+?0123456789:=AQWachist"
    vocabulary = {c: i for i, c in enumerate(["<eos>", *alphabet])}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    characters.pre_tokenizer = Split(Regex("(?m)."), "isolated")
    characters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<eos>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    return Policy(model.eval(), tokenizer, torch.device("cpu"), "tiny", 0, 0, None)


@pytest.mark.filterwarnings("ignore:.*of the solutions were cut:UserWarning")
def test_a_real_policy_is_sampled_and_graded_and_the_seed_decides(tiny_policy):
    def report_of(seed):
        return evaluate(tiny_policy, PROBLEMS, k=3, max_new_tokens=24, seed=seed)

    report = report_of(0)
    assert (report.policy, report.k, len(report.results)) == ("tiny", 3, 4)
    assert all(len(r.finished) == 3 for r in report.results)
    assert report.truncated_sampled == np.mean(
        [not f for r in report.results for f in r.finished]
    )
    assert report_of(0) == report
    finished = {tuple(r.finished for r in report_of(s).results) for s in range(4)}
    assert len(finished) > 1


def test_metrics_are_the_means_over_problems(script):
    report = played(script, PROBLEMS, k=4)
    assert report.maj_1.mean == 1 / 4
    assert report.maj_k.mean == 2 / 4  # problem 0, and 2 where nothing else votes
    assert report.pass_k.mean == 3 / 4
    assert report.accuracy.mean == (3 + 1 + 1 + 0) / 16
    assert report.diversity.mean == (2 + 1 + 1 + 0) / 4
    assert report.rerank_k is None
    assert list(report.metrics) == ["maj@1", "maj@4", "pass@4", "accuracy", "diversity"]
    for interval in report.metrics.values():
        assert interval.low <= interval.mean <= interval.high
        assert interval.low < interval.high
        assert interval.n == 4


def test_results_stand_in_the_order_of_the_problems_whatever_finishes_first(script):
    report = played(script, PROBLEMS[::-1], k=4)
    assert [r.id for r in report.results] == [p.id for p in PROBLEMS[::-1]]
    assert report.values("maj@1").tolist() == [0, 0, 0, 1]


def test_smaller_k_from_the_same_samples_are_the_exact_metrics(script):
    report = played(script, PROBLEMS, k=4, orm=lambda p, rollouts: [0.1, 0.2, 0.4, 1])
    for i, r in enumerate(report.results):
        for k in (1, 2, 3, 4):
            passed = pass_at_k(4, sum(r.correct), k)
            voted = maj_at_k(r.answers, r.gold, k)
            ranked = rerank_at_k(r.scores, r.correct, k)
            assert report.values(f"pass@{k}")[i] == passed
            assert report.values(f"rerank@{k}")[i] == ranked
            if k > 1:  # maj@1 is greedy
                assert report.values(f"maj@{k}")[i] == voted
    assert list(report.curve("pass")) == [1, 2, 4]
    assert report.curve("maj", [1])[1].mean == pytest.approx(report.accuracy.mean)
    assert report.curve("maj")[4] == report.maj_k


def test_scores_choose_the_sample_and_see_one_problem_with_its_samples(script):
    calls = []

    def oracle(problem, rollouts):
        calls.append((problem.id, [r.problem_id for r in rollouts]))
        return sparse_rewards(rollouts, [problem])

    report = played(script, PROBLEMS, k=4, orm=oracle)
    assert report.rerank_k.mean == report.pass_k.mean == 3 / 4
    assert sorted(calls) == [(p.id, [p.id] * 4) for p in PROBLEMS]
    inverted = played(
        script, PROBLEMS, k=4, orm=lambda p, r: [-s for s in oracle(p, r)]
    )
    assert inverted.rerank_k.mean == 0.0
    with pytest.raises(ValueError, match="orm gave 1 scores for the 4 samples"):
        played(script, PROBLEMS, k=4, orm=lambda p, r: [0.5])


@pytest.mark.parametrize("k", [0, None])
def test_without_samples_the_report_is_greedy(script, k):
    report = played(script, PROBLEMS, k=k)
    assert list(report.metrics) == ["maj@1"]
    assert report.k == 0
    assert report.truncated_sampled is None
    for value in (report.maj_k, report.pass_k, report.accuracy, report.diversity):
        assert value is None
    assert "greedy only" in str(report)
    with pytest.raises(ValueError, match="does not follow from 0 samples"):
        report.values("accuracy")


def test_one_sample_is_its_accuracy_and_not_the_greedy_solution(script):
    report = played(script, PROBLEMS, k=1)
    assert report.maj_1.mean == 1 / 4
    assert report.maj_k == report.accuracy == report.pass_k
    assert report.accuracy.mean == 1 / 4


def test_truncated_share_is_reported_and_warned_of_above_two_percent(script):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert played(script, PROBLEMS, k=4).truncated_sampled == 0
    script.unfinished = (script.samples["t/3"][0],)
    with pytest.warns(UserWarning, match="cut at 64 tokens.*raise max_new_tokens"):
        report = played(script, PROBLEMS, k=4, max_new_tokens=64)
    assert report.truncated_greedy == 1 / 4
    assert report.truncated_sampled == 2 / 16
    assert "truncated: greedy 25.0%, sampled 12.5%" in str(report)


def test_report_reads_well(script):
    report = played(script, PROBLEMS, k=4, seed=7)
    markdown = report._repr_markdown_().splitlines()
    assert markdown[0] == "| metric | mean | 95% interval |"
    assert "| maj@1 | 0.250 |" in markdown[2]
    assert "maj@1      0.250 [" in str(report)


def test_two_reports_are_compared_problem_by_problem(script):
    before = played(script, PROBLEMS, k=4)
    script.greedy = {p.id: solve("0+0", p.answer) for p in PROBLEMS}
    after = played(script, PROBLEMS, k=4)
    gain = compare(before, after, "maj@1")
    assert gain.mean == 3 / 4
    assert gain.excludes(0.0)
    assert compare(before, after, "pass@2").mean == 0
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(before, played(script, PROBLEMS[::-1], k=0), "maj@1")


def test_unknown_metrics_are_errors_that_name_those_that_exist(script):
    report = played(script, PROBLEMS, k=4)
    with pytest.raises(ValueError, match=r"no metric 'f1'.*maj@1, maj@4, pass@4"):
        report.values("f1")
    with pytest.raises(ValueError, match="no metric 'best'"):
        report.values("best@2")
    with pytest.raises(ValueError, match="does not follow from 4 samples"):
        report.values("pass@8")
    with pytest.raises(ValueError, match="give evaluate an `orm`"):
        report.values("rerank@2")


def test_no_problems_and_shared_ids_are_clear_errors(script):
    with pytest.raises(ValueError, match="the list is empty"):
        played(script, [])
    with pytest.raises(ValueError, match="share an id"):
        played(script, [PROBLEMS[0], PROBLEMS[0]])
    with pytest.raises(TypeError, match="unexpected keyword"):
        played(script, PROBLEMS, top_p=0.3)


def test_rollouts_that_are_there_can_be_graded_again():
    problem = PROBLEMS[1]
    result = grade_greedy(problem, rollout(problem, "#### 2"))
    samples = [rollout(problem, f"#### {n}", number=n) for n in range(4)]
    graded = grade_samples(result, problem, samples, orm=lambda p, r: np.arange(4))
    assert graded.greedy_correct
    assert graded.answers == ("0", "1", "2", "3")
    assert graded.correct == (False, False, True, False)
    assert graded.scores == (0.0, 1.0, 2.0, 3.0)


def test_sparse_reward_is_one_for_the_right_number_and_belongs_to_its_problem():
    problem = PROBLEMS[1]  # its answer is 2
    assert sparse_reward(rollout(problem, "1+1=3\n#### 2.0"), problem) == 1.0
    assert sparse_reward(rollout(problem, "1+1=2\n#### 3"), problem) == 0.0
    assert sparse_reward(rollout(problem, "the answer is 2"), problem) == 0.0
    # The text decides: cut after the answer is right, cut within the number is not
    assert sparse_reward(rollout(problem, "#### 2", finished=False), problem) == 1.0
    long = Problem("t/x", "", "", "1080")
    assert sparse_reward(rollout(long, "#### 10", finished=False), long) == 0.0
    with pytest.raises(ValueError, match="t/x"):
        sparse_reward(rollout(problem, "#### 2"), long)


def test_sparse_rewards_match_rollouts_to_problems_by_id():
    rollouts = [rollout(p, f"#### {p.answer}") for p in PROBLEMS[:2]]
    rollouts.append(rollout(PROBLEMS[0], "#### 9"))
    assert sparse_rewards(rollouts, PROBLEMS[::-1]) == [1.0, 1.0, 0.0]
    assert sparse_rewards([], PROBLEMS) == []
    with pytest.raises(ValueError, match="t/0"):
        sparse_rewards(rollouts, PROBLEMS[1:])

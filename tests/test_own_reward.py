"""A reward from a user's own file: what is accepted, and each refusal in one line."""

from __future__ import annotations

import pytest
from tiny_models import tiny_policy

from rlreason.policy.rollout import Rollout
from rlreason.rewards import load_reward, sparse_token_rewards
from rlreason.rewards.base import RememberingReward, goes_on
from rlreason.rewards.own import RewardError, lasting_spec, split_spec
from rlreason.rewards.shaping import shaped_reward
from rlreason.tasks.problem import Problem

PROBLEMS = [Problem("p/0", "?", "#### 2", "2")]
ROLLOUTS = [
    Rollout("p/0", 0, (1,), (5, 6, 2), (-1.0,) * 3, "#### 2", True),
    Rollout("p/0", 1, (1,), (5,), (-1.0,), "#### 3", False),
]


@pytest.fixture
def own(tmp_path):
    """Writes the user's file; returns its specification."""

    def write(source: str, function: str = "reward") -> str:
        file = tmp_path / "mine.py"
        file.write_text(source)
        return f"{file}:{function}"

    return write


def test_a_function_of_ones_own_file_rewards_as_the_librarys_do(own):
    spec = own(
        "from rlreason.rewards import sparse_token_rewards\n"
        "SCALE = 2.0\n"
        "def reward(rollouts, problems):\n"
        "    rows = sparse_token_rewards(rollouts, problems)\n"
        "    return [[SCALE * number for number in row] for row in rows]\n"
    )
    expected = [
        tuple(2 * n for n in row) for row in sparse_token_rewards(ROLLOUTS, PROBLEMS)
    ]
    assert load_reward(spec)(ROLLOUTS, PROBLEMS) == expected == [(0, 0, 2), (0,)]
    assert split_spec(spec)[0].name == "mine.py"


def test_what_a_reward_of_ones_own_remembers_is_kept_with_the_run(own):
    spec = own(
        "from rlreason.rewards.novelty import NoveltyReward\nreward = NoveltyReward()"
    )
    reward = load_reward(spec)
    assert isinstance(reward, RememberingReward)
    shaped = shaped_reward(tiny_policy(), gamma=1.0, reward=reward)
    assert isinstance(shaped, RememberingReward)
    assert shaped.state() == reward.state()
    # And goes on where V does, as the one in the file
    spec = own(
        "from rlreason.rewards.shaping import shaped_reward\n"
        "from tiny_models import tiny_policy\n"
        "reward = shaped_reward(tiny_policy(), gamma=1.0, bootstrap=True)"
    )
    assert goes_on(load_reward(spec))
    assert not goes_on(shaped)
    assert not isinstance(
        load_reward(own("def reward(rollouts, problems): return []")), RememberingReward
    )


def test_a_file_may_lie_in_the_home_folder(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own(
        "def reward(rollouts, problems):\n"
        "    return [(0.0,) * len(r.tokens) for r in rollouts]"
    )
    spec = "~/mine.py:reward"
    assert load_reward(spec)(ROLLOUTS[:1], PROBLEMS) == [(0.0,) * 3]
    assert lasting_spec(spec) == f"{tmp_path / 'mine.py'}:reward"


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        ("def other(r, p): pass", "reward", "has no function 'reward'; it has other"),
        ("reward = 3", "reward", "has no function 'reward'; it has none"),
        ("def reward(rollouts): pass", "reward", r"must take \(rollouts, problems\)"),
        ("1 / 0", "reward", "running .*mine.py failed with ZeroDivisionError"),
        ("def reward(", "reward", "running .*mine.py failed with SyntaxError"),
        ("import sys; sys.exit(0)", "reward", "running .* failed with SystemExit: 0"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(own, source, function, message):
    with pytest.raises(RewardError, match=message) as refused:
        load_reward(own(source, function))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "spec", ["mine.py", "mine:reward", "mine.py:", "mine.py:1+1", "missing.py:reward"]
)
def test_what_names_no_function_of_a_file_is_refused(spec):
    with pytest.raises(RewardError, match=r"names no function|there is no file"):
        load_reward(spec)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[1.0, 0.0]", "no rows of numbers"),
        ("None", "no rows of numbers"),
        ("[('a', 'b', 'c'), (0,)]", "no rows of numbers"),
        ("[(0, 0, 1)]", "1 rows for 2 rollouts"),
        ("[(0, 1), (0,)]", "2 numbers for the 3 tokens of rollout 0"),
        ("[(0, 0, 1), (float('nan'),)]", "not finite for rollout 1"),
    ],
)
def test_rewards_of_a_wrong_shape_or_that_are_no_numbers_are_refused(
    own, rows, message
):
    reward = load_reward(own(f"def reward(rollouts, problems): return {rows}"))
    with pytest.raises(RewardError, match=rf"mine.py:reward' returned .*{message}"):
        reward(ROLLOUTS, PROBLEMS)


@pytest.mark.parametrize("fails", ["1 / 0", "raise SystemExit(0)", "len(3)"])
def test_a_function_that_fails_is_a_fault_of_the_users_file(own, fails):
    """It was shown as one of the library's; what ended itself ended well."""
    reward = load_reward(own(f"def reward(rollouts, problems):\n    {fails}"))
    with pytest.raises(RewardError, match=r"mine.py:reward' failed .*mine.py, line 2"):
        reward(ROLLOUTS, PROBLEMS)

"""What a run's inputs hold: a run is named after that, and not after where they lie.

A folder that moves makes the same run; a file that changes makes another one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlreason.policy.load import policy_path
from rlreason.rewards.own import split_spec
from rlreason.runs.files import file_digest, sha256_of
from rlreason.settings import HASH_LENGTH, Settings, ours
from rlreason.tasks import task_digest

__all__ = ["Contents", "file_digest", "policy_digest", "sha256_of", "task_digest"]

UNKNOWN = "unknown"  # the revision of what cannot be had
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")


class Contents(Settings):
    """Digests of all that a run reads and its settings only point at.

    Attributes:
        policy: Of the base's weights, configuration and tokenizer.
        task: Of the problems; of a procedural task its name, since code and knobs make
            the problems.
        reward: Of the file of the user's own reward function, and its name, where one
            rewards. What that file imports or reads is not in it.
    """

    policy: str
    task: str
    reward: str | None = ours(None, neutral=None)


def policy_digest(name: str) -> str:
    """Name what a policy holds: by its files, or by its revision on the hub."""
    path = policy_path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _MODEL_FILES)
        parts = [f"{file.name} {file_digest(file)}" for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:HASH_LENGTH]
    if path.is_file():
        return file_digest(path)
    return f"{name}@{_hub_revision(name)}"


def reward_digest(function: str | None) -> str | None:
    """Name what FILE.py:NAME holds; None where no function of one's own rewards.

    Raises:
        RewardError: It is not of this form, or there is no such file.
    """
    if function is None:
        return None
    path, name = split_spec(function)
    return f"{file_digest(path)}:{name}"


def is_at_hand(policy: str) -> bool:
    """Whether a policy lies on this machine, so that no network is asked of it."""
    return policy_path(policy).exists() or _hub_revision(policy, ask=False) != UNKNOWN


def _hub_revision(name: str, *, ask: bool = True) -> str:
    """The commit of a model on the hub: of the copy in the cache, else today's."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The hub's error is one of its HTTP library, which has changed between versions
    unreachable = (*HfHubHTTPError.__bases__, HFValidationError)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}" if repository else owner
    try:
        cached = try_to_load_from_cache(repository, file or "config.json")
        if isinstance(cached, str):
            return Path(cached).parent.name[:HASH_LENGTH]
        return ((ask and model_info(repository).sha) or UNKNOWN)[:HASH_LENGTH]
    except unreachable:
        return UNKNOWN  # loading it says what is wrong

"""Two processes of one job, as torchrun would start them: gloo, on the CPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from forked import run_all


def side_by_side(arguments: Sequence[str], **environment: str) -> list[str]:
    """What each of two processes of Python prints; both must come to a good end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        **environment,
    }
    environments = [{**whole, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    # Each has a seed of hashes of its own, as under torchrun: what is gone through in
    # the order of a set must not differ
    return run_all([arguments] * 2, environments, fresh=[1])

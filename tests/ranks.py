"""Two processes of one job, as torchrun would start them: gloo, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


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
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**whole, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [each.communicate() for each in started]
    assert [each.returncode for each in started] == [0, 0], said[0][1] + said[1][1]
    return [out for out, _ in said]

"""Nothing asks for the network: not the library, not its command line."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_python(
    program: str, environment: dict[str, str]
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80))",
        "import socket; socket.socket().connect(('192.0.2.1', 80))",
        "import urllib.request; urllib.request.urlopen('http://example.org')",
        "import subprocess, sys\n"
        "code = 'import socket; socket.getaddrinfo(\"example.org\", 80)'\n"
        "subprocess.run([sys.executable, '-c', code], check=True)",
    ],
)
def test_the_cut_holds_for_every_way_out_and_for_processes_of_processes(
    program, cut_network, tmp_path
):
    # The cut itself: without this, the tests below could not fail
    log = tmp_path / "attempts"
    done = run_python(program, {**cut_network.environment, "CUT_NETWORK_LOG": str(log)})
    assert done.returncode
    assert "the network is cut off" in done.stderr
    assert log.read_text()


def test_the_cut_leaves_this_machine_reachable(cut_network):
    program = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1])).close()"
    )
    assert run_python(program, cut_network.environment).returncode == 0


def test_problems_policy_samples_and_evaluation_need_no_network(cut_network):
    program = (
        "from rlreason import evaluate, load_policy, load_problems\n"
        "problems = load_problems('gsm-mini', split='test', limit=2)\n"
        "policy = load_policy('nano')\n"
        "evaluate(policy, problems, k=2, max_new_tokens=8)"
    )
    done = run_python(program, cut_network.environment)
    assert done.returncode == 0, done.stderr
    assert cut_network.attempts == []

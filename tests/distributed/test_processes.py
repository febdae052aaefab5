"""Real processes: the same bits as simulated, and the account of bytes against the operating system's counters."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent / "scripts"
MAIN = "import sys; from fallline.cli import main; sys.exit(main(sys.argv[1:]))"
# A network of its own, where nobody else sends anything: its loopback interface has to be switched on.
ALONE = """
import fcntl, socket, struct
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
"""


def run(script, processes, *, alone=False):
    """What the processes print, one list of lines for each."""
    line = [sys.executable, "-c", (ALONE if alone else "") + MAIN, "launch", str(processes), str(SCRIPTS / script)]
    done = subprocess.run(["unshare", "-rn"] * alone + line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r"\[(\d)\] (.*)", text) for text in done.stdout.splitlines()]
    return [[m[2] for m in lines if m and int(m[1]) == rank] for rank in range(processes)]


@pytest.fixture(scope="module")
def namespaces():
    """Whether a process may have a network of its own here."""
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


def test_the_transport_account_is_what_the_operating_system_counts(namespaces):
    for line in run("transport.py", 2, alone=namespaces)[0]:
        exchange, ratio = line.split()
        assert 1.0 <= float(ratio) <= 1.02, (exchange, ratio)


def test_five_methods_simulated_and_in_two_and_four_processes_give_the_same_bits():
    alone = subprocess.run(
        [sys.executable, str(SCRIPTS / "five_methods.py")], capture_output=True, text=True, check=True
    )
    expected = alone.stdout.splitlines()
    assert len(expected) == 5
    for processes in (2, 4):
        assert run("five_methods.py", processes) == [expected] * processes

"""`fallline launch`: who dies or freezes is named, the rest is stopped, and the run goes on to the same bits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "distributed" / "scripts"
COMMAND = [sys.executable, "-c", "import sys; from fallline.cli import main; sys.exit(main())"]


def launch(processes, script, *arguments, flags=()):
    line = [*COMMAND, "launch", *flags, str(processes), str(script), *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def script(tmp_path, text):
    file = tmp_path / "script.py"
    file.write_text(text)
    return file


def bits(output):
    return re.findall(r"step limit at step \d+ ([0-9a-f]{64})", output)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def pid(folder, rank):
    return int((folder / f"{rank}.pid").read_text())


def running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().split(")")[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


STEPS = 1500


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The same script alone: the simulated run."""
    folder = tmp_path_factory.mktemp("alone")
    line = [sys.executable, str(SCRIPTS / "resumable.py"), str(folder), str(STEPS)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return bits(done.stdout)[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_and_the_run_goes_on_to_the_same_bits(tmp_path, unbroken, victim):
    run = launch(2, SCRIPTS / "resumable.py", tmp_path, STEPS)
    wait_for(lambda: any((tmp_path / "run").glob("*.checkpoint")))
    pids = [pid(tmp_path, rank) for rank in (0, 1)]
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert run.returncode == 4
    assert f"fallline: process {victim} of 2 was killed by SIGKILL; the other 1 are stopped" in said
    assert not any(map(running, pids))
    again = launch(2, SCRIPTS / "resumable.py", tmp_path, STEPS)
    output, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert bits(output) == [unbroken, unbroken]


def test_a_frozen_process_is_named_within_the_heartbeat(tmp_path):
    run = launch(2, SCRIPTS / "resumable.py", tmp_path, 10**6, flags=("--heartbeat", "3"))
    wait_for(lambda: any((tmp_path / "run").glob("*.checkpoint")))
    pids = [pid(tmp_path, rank) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    frozen = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - frozen < 3 + 10
    assert run.returncode == 4
    assert "process 1 of 2 is frozen: no sign of life for 3 s" in said
    assert not any(map(running, pids))


def test_output_has_the_number_of_its_process_and_arguments_are_passed(tmp_path):
    file = script(tmp_path, "import sys\nprint(sys.argv[1:])\nprint('wrong', file=sys.stderr)\n")
    run = launch(3, file, "--steps", "7")
    output, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert sorted(output.splitlines()) == [f"[{rank}] ['--steps', '7']" for rank in range(3)]
    assert sorted(said.splitlines()) == [f"[{rank}] wrong" for rank in range(3)]


def test_a_script_that_fails_gives_its_own_exit_code_and_ends_the_rest(tmp_path):
    text = "import os, sys, time\nif os.environ['FALLLINE_LAUNCH_RANK'] == '1':\n    sys.exit(7)\ntime.sleep(600)\n"
    began = time.monotonic()
    run = launch(2, script(tmp_path, text))
    _, said = run.communicate(timeout=60)
    assert run.returncode == 7
    assert "process 1 of 2 ended with exit code 7" in said
    assert time.monotonic() - began < 30


def test_ctrl_c_lets_the_processes_end_by_themselves(tmp_path):
    text = (
        "import signal, sys, time\n"
        "def handler(*_):\n    print('ending'); sys.exit(0)\n"
        "signal.signal(signal.SIGINT, handler)\nprint('ready')\ntime.sleep(600)\n"
    )
    line = [*COMMAND, "launch", "2", str(script(tmp_path, text))]
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    assert {run.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    os.killpg(run.pid, signal.SIGINT)
    output, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert sorted(output.splitlines()) == ["[0] ending", "[1] ending"]
    assert "interrupted" in said


def test_processes_end_when_their_launcher_is_gone(tmp_path):
    run = launch(2, SCRIPTS / "resumable.py", tmp_path, 10**6)
    wait_for(lambda: any((tmp_path / "run").glob("*.checkpoint")))
    pids = [pid(tmp_path, rank) for rank in (0, 1)]
    run.kill()
    run.communicate(timeout=60)
    wait_for(lambda: not any(map(running, pids)), 15)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("0", __file__), "processes: got 0; expected"),
        (("2", "nowhere.py"), "script: got nowhere.py; expected a Python file"),
        (("--heartbeat", "1", "2", __file__), "--heartbeat: got 1.0; expected at least 2 seconds"),
    ],
)
def test_bad_input(arguments, said):
    done = subprocess.run([*COMMAND, "launch", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr

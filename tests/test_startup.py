"""How a process of halfbyte's begins and ends: nothing that was to be done at its end is lost by ending it at once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.startup import COLLECT_EVERY, collect_less

ENDING = """
import atexit, sys, threading, time
from halfbyte.startup import end_process

atexit.register(lambda: print("handlers ran"))
print("said", end=" ")
if sys.argv[1] == "working":
    threading.Thread(target=lambda: (time.sleep(0.5), print("worked", end=" "))).start()
end_process(3)
print("went on", end=" ")
"""

# A command line whose command leaves a thread behind, and a status.
BUSY = """
import sys, threading, time
from halfbyte.cli import main

def entry_point():
    threading.Thread(target=lambda: (time.sleep(0.5), print("worked"))).start()
    sys.exit(2)

main.entry_point = entry_point
main.process()
"""


@pytest.fixture
def buffered() -> dict[str, str]:
    """An environment in which Python keeps output back until it is flushed, as it does unless told otherwise."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(("state", "status", "out"), [("idle", 3, "said"), ("working", 0, "said went on worked")])
def test_handlers_run_and_output_is_flushed(state: str, status: int, out: str, buffered: dict[str, str]) -> None:
    words = [sys.executable, "-c", ENDING, state]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=buffered)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, f"{out} handlers ran\n", "")


def test_a_status_is_kept_while_a_thread_works(buffered: dict[str, str]) -> None:
    ended = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, check=False, env=buffered)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "worked\n", "")


def test_modules_are_not_taken_apart(buffered: dict[str, str]) -> None:
    program = (
        "import sys\nfrom halfbyte.startup import end_process\n"
        "class Slow:\n    def __del__(self):\n        print('taken apart', flush=True)\n"
        "kept = Slow()\n"
        "if len(sys.argv) > 1:\n    end_process(0)\n"
    )
    plain, ended = (
        subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True, check=True, env=buffered)
        for more in ((), ("end",))
    )
    assert (plain.stdout, ended.stdout) == ("taken apart\n", "")


WRITING = "import sys\nfrom halfbyte.startup import end_process\nprint('a result')\nend_process(int(sys.argv[1]))\n"


@pytest.mark.parametrize("status", [0, 1])
def test_output_that_nobody_reads_is_no_error(status: int, buffered: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as out:
        words = [sys.executable, "-c", WRITING, str(status)]
        ended = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, check=False, env=buffered)
    assert (ended.returncode, ended.stderr) == (status, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 1)])
def test_output_that_is_lost_is_an_error(before: int, after: int, buffered: dict[str, str]) -> None:
    with open("/dev/full", "wb") as out:
        words = [sys.executable, "-c", WRITING, str(before)]
        ended = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert ended.returncode == after
    assert ended.stderr == "halfbyte: output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "status"), [("--version", 0), ("--version >&-", 0), ("frobnicate", 2), ("verify absent", 2)]
)
def test_statuses_are_the_command_lines(words: str, status: int, buffered: dict[str, str]) -> None:
    command = f'"{sys.executable}" -m halfbyte {words}'
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=buffered)
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr


def test_the_collector_looks_less_often() -> None:
    before = gc.get_threshold()
    try:
        collect_less()
        assert gc.get_threshold() == (COLLECT_EVERY, *before[1:])
    finally:
        gc.set_threshold(*before)

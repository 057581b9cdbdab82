"""How a process of halfbyte's begins and ends: nothing that was to be done at its end is lost by ending it at once."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from halfbyte.startup import COLLECT_EVERY, collect_less

ENDING = """
import atexit, os, sys, threading, time
from halfbyte.startup import end_process

atexit.register(lambda: print("handlers ran"))
print("said", end=" ")
if sys.argv[1] == "working":
    threading.Thread(target=lambda: (time.sleep(0.5), print("worked", end=" "))).start()
end_process(3)
print("went on", end=" ")
"""


@pytest.mark.parametrize(("state", "status", "out"), [("idle", 3, "said"), ("working", 0, "said went on worked")])
def test_handlers_run_and_output_is_flushed(state: str, status: int, out: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING, state], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, f"{out} handlers ran\n", "")


def test_modules_are_not_taken_apart() -> None:
    program = (
        "import sys\nfrom halfbyte.startup import end_process\n"
        "class Slow:\n    def __del__(self):\n        print('taken apart', flush=True)\n"
        "kept = Slow()\n"
        "if len(sys.argv) > 1:\n    end_process(0)\n"
    )
    plain, ended = (
        subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True, check=True)
        for more in ((), ("end",))
    )
    assert (plain.stdout, ended.stdout) == ("taken apart\n", "")


def test_output_that_nobody_reads_ends_quietly() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "halfbyte", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    program.stdout.close()
    _, err = program.communicate()
    assert err == ""


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["frobnicate"], 2), (["verify", "absent"], 2)])
def test_statuses_are_the_command_lines(words: list[str], status: int) -> None:
    ended = subprocess.run([sys.executable, "-m", "halfbyte", *words], capture_output=True, check=False)
    assert ended.returncode == status


def test_the_collector_looks_less_often() -> None:
    before = gc.get_threshold()
    try:
        collect_less()
        assert gc.get_threshold() == (COLLECT_EVERY, *before[1:])
    finally:
        gc.set_threshold(*before)

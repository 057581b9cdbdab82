"""Memory that the kernel refuses in the middle of a run: a message, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import Models
from halfbyte.heap import is_out_of_memory

# The limit comes when the first Linear is solved: by then everything is imported and compiled, and what is left is too
# little for the Hessian of down_proj, 6,144 wide (151 MB), alone.
LIMITED = """
import resource

from halfbyte import pipeline, solver
from halfbyte.cli.main import entry_point

solve = solver.quantize_gptq

def solve_and_limit(*arguments):
    result = solve(*arguments)
    status = open("/proc/self/status").read()
    used = 1024 * int(status.split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + 96 * 2**20, resource.RLIM_INFINITY))
    solver.quantize_gptq = solve
    return result

solver.quantize_gptq = solve_and_limit
entry_point()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's RLIMIT_DATA")
def test_a_run_that_gets_no_memory_says_so_and_can_be_resumed(
    tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    source, out = tiny_model("llama", intermediate_size=6144, num_hidden_layers=1), tmp_path / "out"
    words = ["quantize", str(source), str(out), "--group-size", "32", "--calibration", f"text:{text_file}"]
    words += ["--samples", "2", "--seq-len", "32", "--effort", "low"]
    limited = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True)
    assert limited.returncode == 2, limited.stderr
    last = limited.stderr.strip().splitlines()[-1]
    assert last.startswith(f"halfbyte: {out}: no more memory was to be had after 0 finished blocks (the plan expects")
    assert "--resume" in last
    assert "Traceback" not in limited.stderr
    free = subprocess.run([sys.executable, "-m", "halfbyte", *words, "--resume"], capture_output=True, text=True)
    assert free.returncode == 0, free.stderr
    assert (out / "halfbyte.json").exists()


# So many bytes more than what is imported holds; what a plan does not see of them is small.
CHOOSING = """
import resource
import sys

from halfbyte import pipeline
from halfbyte.cli.main import entry_point

used = 1024 * int(open("/proc/self/status").read().split("VmData:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv.pop(1)), resource.RLIM_INFINITY))
entry_point()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's RLIMIT_DATA")
@pytest.mark.parametrize(("allowed", "on_disk"), [(700 << 20, True), (4 << 30, False)])
def test_hidden_states_go_to_disk_where_the_process_is_limited(
    allowed: int, on_disk: bool, tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    """The run is reckoned to need 620 MB and a little, of which 0.8 must be free."""
    source, out = tiny_model("llama"), tmp_path / "out"
    words = ["quantize", str(source), str(out), "--group-size", "32", "--calibration", f"text:{text_file}"]
    words += ["--samples", "2", "--seq-len", "32", "--effort", "low", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", CHOOSING, str(allowed), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("note: hidden states stay on disk, because they would not fit in memory" in done.stderr) is on_disk
    assert json.loads((out / "halfbyte.json").read_text())["run"]["offload"] is on_disk


def test_refusals_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(other.value)

"""A run may be killed at any moment, any number of times: ``--resume`` ends in the bytes of a run that was left alone.

Kills come at random times, at chosen stages, and before (or in the middle of) every kind of write that a run makes.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import halfbyte
import tiny
from conftest import Models
from halfbyte.errors import CheckpointError, OutputError, ResumeError, counted
from halfbyte.progress import Silent
from halfbyte.records import read_json
from interrupted import finish, start
from pictures import save_pictured_rows

LAYERS = 8
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tiny_model: Models) -> Path:
    return tiny_model("gemma3", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def options(text_file: Path) -> dict[str, Any]:
    return {"scheme": "W4A16", "group_size": 32, "calibration": f"text:{text_file}", "samples": 8, "seq_len": 40}


@pytest.fixture(scope="module")
def whole(source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finish(start(source, out, **options)) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest all but ``run``."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    manifest = json.loads(found.pop("halfbyte.json"))
    del manifest["run"]
    return found | {"halfbyte.json": json.dumps(manifest).encode()}


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stage_of(out: Path) -> int:
    """What the journal says; -2 where there is none yet."""
    try:
        return int(json.loads((partial_of(out) / "state" / "journal.json").read_text())["stage"])
    except FileNotFoundError:
        return -2


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    while not condition() and process.exitcode is None:
        time.sleep(0.001)


def complete(source: Path, out: Path, options: dict[str, Any]) -> None:
    """Run to the end, continuing what there is."""
    resume = partial_of(out).exists()
    if not out.exists() or resume:
        assert finish(start(source, out, resume=resume, **options)) == 0
    assert not partial_of(out).exists()


# Killed


@pytest.mark.parametrize("offload", [False, True])
def test_killed_at_random_moments(
    offload: bool, source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", options | {"offload": offload}
    chance = random.Random(20 + offload)
    begun = time.monotonic()
    assert finish(start(source, tmp_path / "timed", **options)) == 0
    length = time.monotonic() - begun
    stages = []
    for _ in range(6):
        process = start(source, out, resume=partial_of(out).exists(), **options)
        time.sleep(chance.uniform(0.2, 0.9) * length)
        process.kill()
        finish(process)
        stages.append(stage_of(out))
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
        assert not out.exists() or not (partial_of(out) / "checkpoint").exists()
    complete(source, out, options)
    assert contents(out) == contents(whole), f"killed at stages {stages}"


@pytest.mark.parametrize("offload", [False, True])
def test_killed_after_chosen_stages(
    offload: bool, source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", options | {"offload": offload}
    reached = []
    for stage in (0, 1, 4, LAYERS - 1):
        process = start(source, out, resume=partial_of(out).exists(), **options)
        wait_for(lambda stage=stage: stage_of(out) >= stage, process)
        process.kill()
        assert finish(process) == KILLED
        assert not out.exists()
        reached.append(stage_of(out))
        assert reached[-1] >= stage
    assert reached == sorted(reached)
    complete(source, out, options)
    assert contents(out) == contents(whole)


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_that_sees_pictures_is_killed_after_every_stage(
    tiny_model: Models, text_file: Path, tmp_path: Path
) -> None:
    """Experts are written before their block is finished, and pictures are prepared anew."""
    layers = 4
    source, rows, out = tiny_model("qwen3-vl-moe", num_hidden_layers=layers), tmp_path / "rows.jsonl", tmp_path / "out"
    save_pictured_rows(rows, 3)
    options: dict[str, Any] = {"scheme": "W4A16", "group_size": 32, "samples": 6, "seq_len": 120}
    options["calibration"] = f"vlm:{rows}*0.5+text:{text_file}*0.5"
    assert finish(start(source, tmp_path / "whole", **options)) == 0
    for stage in range(layers):
        process = start(source, out, resume=partial_of(out).exists(), **options)
        wait_for(lambda stage=stage: stage_of(out) >= stage, process)
        process.kill()
        assert finish(process) == KILLED
    complete(source, out, options)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "offload"), [("kill", False), ("tear", True)])
def test_killed_at_writes_of_every_kind(
    kind: str, offload: bool, source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Each run dies at another write, from the first to the removal of the state; all but the first resume."""
    out, log, options = tmp_path / "out", tmp_path / "writes", options | {"offload": offload}
    assert finish(start(source, tmp_path / "counted", trap=("count", 0, log), **options)) == 0
    writes = log.read_text().split()
    assert {"pwrite", "replace", "rename", "unlink", "posix_fallocate", "rmdir"} == set(writes)

    # A chain of kills, each a little further into what is left to do.
    died = 0
    for number in (3, 9, 20, 41, 35, 64, 33):
        process = start(source, out, resume=partial_of(out).exists(), trap=(kind, number), **options)
        died += finish(process) == KILLED
        assert not out.exists()
    assert died == 7
    complete(source, out, options)
    assert contents(out) == contents(whole)

    # The last writes of all: config, manifest, the final name, the removal of the state.
    last = writes.index("rename")
    for number in (last - 2, last - 1, last, last + 1, len(writes) - 1):
        out = tmp_path / f"end-{number}"
        assert finish(start(source, out, trap=(kind, number), **options)) == KILLED
        assert out.exists() is (number > last)
        complete(source, out, options)
        assert contents(out) == contents(whole)


def test_the_command_line_killed_and_resumed(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(out), "--group-size", "32"]
    command += ["--calibration", options["calibration"], "--samples", "8", "--seq-len", "40", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while stage_of(out) < 2 and first.poll() is None:
        time.sleep(0.002)
    first.kill()
    assert first.wait() == KILLED
    assert not out.exists()
    second = subprocess.run([*command, "--resume", "--json"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "resuming: " in second.stderr
    assert json.loads(second.stdout)["run"]["threads"] == 1
    assert contents(out) == contents(whole)


def test_a_run_without_calibration_resumes(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "W8A8", "method": "rtn"}
    assert finish(start(source, tmp_path / "whole", **options)) == 0
    out = tmp_path / "out"
    assert finish(start(source, out, trap=("kill", 60), **options)) == KILLED
    assert 0 <= stage_of(out) < LAYERS
    complete(source, out, options)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_loses_nothing(source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Where the disk fills up half-way, the finished blocks are kept and the run continues when there is space."""
    out = tmp_path / "out"
    said = tmp_path / "said"
    assert finish(start(source, out, trap=("full", 120), said=said, **options)) == 1
    assert not out.exists()
    stage = stage_of(out)
    assert stage > 0
    assert said.read_text().endswith(
        "Free space or choose another folder, then run again. "
        f"With --resume it continues after {counted(stage, 'finished block')}."
    )
    complete(source, out, options)
    assert contents(out) == contents(whole)


# Refused


@pytest.fixture(scope="module")
def stopped(source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partial run, killed after its second block; not to be changed."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    process = start(source, out, **options)
    wait_for(lambda: stage_of(out) >= 2, process)
    process.kill()
    assert finish(process) == KILLED
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def groups(scheme: str, size: int) -> str:
    return f'[{{"scheme": "{scheme}", "group_size": {size}, "targets": ["Linear"]}}]'


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 3}, "seed was 0, is 3"),
    "samples": ({"samples": 7}, "samples was 8, is 7"),
    "length": ({"seq_len": 32}, "seq_len was 40, is 32"),
    "group size": ({"group_size": 64}, f"groups was {groups('W4A16', 32)}, is {groups('W4A16', 64)}"),
    "scheme": ({"scheme": "W8A16"}, f"groups was {groups('W4A16', 32)}, is {groups('W8A16', 32)}"),
    "ignore": ({"ignore": ["re:.*o_proj"]}, 'ignore was [], is ["re:.*o_proj"]'),
    "calibration": ({"calibration": "random-tokens"}, 'is "random-tokens"'),
    "method": ({"method": "rtn"}, 'method was "gptq", is "rtn"'),
}


def usage(free: int) -> Any:
    """What `shutil.disk_usage` says of a disk, as far as anybody looks."""
    return SimpleNamespace(free=free)


def test_a_disk_that_is_too_small_is_said_at_once(
    source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(OutputError, match=r"\d\.\d\d GB are needed there and 0\.00 GB are free"):
        halfbyte.quantize(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_has_allocated_is_not_wanted_twice(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("in the middle of it")

    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.blocks.build_on_meta", failing)
        with pytest.raises(RuntimeError):
            halfbyte.quantize(source, tmp_path / "out", **options)
    held = sum(512 * f.stat().st_blocks for f in partial_of(tmp_path / "out").rglob("*.safetensors"))
    assert held > (whole / "model.safetensors").stat().st_size // 2
    needed = round(halfbyte.plan(source, **options).estimates["disk"].value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=needed - held))
    halfbyte.quantize(source, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_options_are_refused_by_name(change: str, source: Path, options: dict[str, Any], stopped: Path) -> None:
    before = snapshot(partial_of(stopped))
    changed, words = CHANGES[change]
    with pytest.raises(ResumeError) as caught:
        halfbyte.quantize(source, stopped, resume=True, device="cpu", **(options | changed))
    assert words in str(caught.value)
    assert "Run with what it was started with" in str(caught.value)
    assert caught.value.exit_status == 2
    assert snapshot(partial_of(stopped)) == before
    assert not stopped.exists()


def test_another_thread_count_is_refused(source: Path, options: dict[str, Any], stopped: Path) -> None:
    before = snapshot(partial_of(stopped))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ResumeError, match="threads was 1, is 2"):
            halfbyte.quantize(source, stopped, resume=True, device="cpu", **options)
    finally:
        torch.set_num_threads(threads)
    assert snapshot(partial_of(stopped)) == before


@pytest.mark.parametrize("how", ["touched", "rewritten", "config"])
def test_a_changed_source_is_refused(
    how: str, source: Path, options: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)  # with its modification times
    shutil.copytree(partial_of(stopped), tmp_path / "out.partial")
    file = copy / "model.safetensors"
    if how == "touched":
        os.utime(file)
    elif how == "rewritten":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    else:
        config = read_json(copy / "config.json")
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    before = snapshot(tmp_path / "out.partial")
    with pytest.raises(ResumeError, match="source was"):
        halfbyte.quantize(copy, tmp_path / "out", resume=True, device="cpu", **options)
    assert snapshot(tmp_path / "out.partial") == before


def test_a_changed_text_file_does_not_change_a_run(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """The tokens of a run are kept with it."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.TEXT)
    options = options | {"calibration": f"text:{text}"}
    assert finish(start(source, out, trap=("kill", 100), **options)) == KILLED
    assert stage_of(out) >= 0
    text.write_text(tiny.TEXT[::-1])
    complete(source, out, options)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_partial_run_is_not_overwritten(source: Path, options: dict[str, Any], stopped: Path) -> None:
    before = snapshot(partial_of(stopped))
    with pytest.raises(OutputError, match=r"out\.partial: holds an unfinished run\. Add --resume to continue it"):
        halfbyte.quantize(source, stopped, device="cpu", **options)
    assert snapshot(partial_of(stopped)) == before


@pytest.mark.parametrize("resume", [False, True])
def test_an_existing_folder_is_not_overwritten(
    resume: bool, source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"exists already\. Choose another folder"):
        halfbyte.quantize(source, out, resume=resume, device="cpu", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_continues_in_the_same_process(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a notebook: the traceback keeps the run alive, but not its lock."""

    class Impatient(Silent):
        def say(self, line: str) -> None:
            if line.startswith("block 3/"):
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        halfbyte.quantize(source, out, device="cpu", reporter=Impatient(), **options)
    halfbyte.quantize(source, out, device="cpu", resume=True, **options)
    assert contents(out) == contents(whole)


def test_nothing_to_resume(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"there is no unfinished run\. Start it without --resume\."):
        halfbyte.quantize(source, tmp_path / "out", resume=True, device="cpu", **options)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_share_a_run(source: Path, options: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(partial_of(stopped), partial)
    before = snapshot(partial)
    with open(partial / "state" / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError, match="another process is working there"):
            halfbyte.quantize(source, tmp_path / "out", resume=True, device="cpu", **options)
    assert snapshot(partial) == before


def test_two_processes_started_at_once(source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(source, out, **options)
    second = start(source, out, **options)
    assert sorted([finish(first), finish(second)]) == [0, 1]
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_journal_says_so(source: Path, options: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(partial_of(stopped), partial)
    (partial / "state" / "journal.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        halfbyte.quantize(source, tmp_path / "out", resume=True, device="cpu", **options)
    assert partial.exists()


def test_hidden_states_cut_short_say_so(source: Path, options: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(partial_of(stopped), partial)
    (file,) = partial.glob(f"state/hidden-{stage_of(tmp_path / 'out'):04d}.bin")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ResumeError, match="hidden states are cut short"):
        halfbyte.quantize(source, tmp_path / "out", resume=True, device="cpu", **options)
    assert partial.exists()


def test_a_finished_run_whose_state_was_left_behind(
    source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Killed between the rename and the removal of the state: --resume tidies up and reports the finished run."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (tmp_path / "out.partial" / "state").mkdir(parents=True)
    manifest = halfbyte.quantize(source, out, resume=True, device="cpu", **options)
    assert manifest.files.keys() == {"model.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(whole)

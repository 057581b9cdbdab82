"""The peak that a plan foretells is the one that a run has, within 15 %: in real runs, and in results that are kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import memory
import parts
import peers
import pytest

import halfbyte
from conftest import Models
from halfbyte.estimates import RUNTIME_BYTES

WITHIN = 0.15
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks and groups are Linux's")
# The kernel counts the peak of whoever starts a process as the process' own, and pytest may have held a lot.
BETWEEN = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


@ON_LINUX
@pytest.mark.parametrize("effort", ["low", "standard"])
def test_a_run_peaks_where_its_plan_says(effort: Any, tiny_model: Models, tmp_path: Path) -> None:
    """So wide that the tensors of the fullest moment outweigh Python and its libraries."""
    source, out = tiny_model("llama", hidden_size=512, intermediate_size=8192, num_hidden_layers=1), tmp_path / "out"
    work: dict[str, Any] = {"calibration": "random-tokens", "samples": 8, "seq_len": 256, "effort": effort}
    foretold = halfbyte.plan(source, **work).estimates["peak_memory"].value
    assert foretold > 2 * RUNTIME_BYTES
    words = [w for key, value in work.items() for w in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(out), *words, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", BETWEEN, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "halfbyte.json").read_text())
    assert bool(manifest["tuning"]) is (effort == "standard")
    assert manifest["run"]["planned_peak_bytes"] == round(foretold)
    assert manifest["run"]["peak_bytes"] == pytest.approx(foretold, rel=WITHIN)


def foretold_and_measured(node: Any) -> Iterator[tuple[float, float]]:
    """Pairs of bytes, wherever a result has both."""
    if isinstance(node, list):
        for child in node:
            yield from foretold_and_measured(child)
    elif isinstance(node, dict):
        if node.get("planned_peak_bytes") and node.get("peak_rss_bytes"):
            yield node["planned_peak_bytes"], node["peak_rss_bytes"]
        for child in node.values():
            yield from foretold_and_measured(child)


KEPT = {
    str(path.relative_to(harness.RESULTS)): list(foretold_and_measured(json.loads(path.read_text())))
    for path in harness.kept("*.json")
}
BOTH = sorted(name for name, pairs in KEPT.items() if pairs)


@pytest.mark.parametrize("name", BOTH)
def test_kept_results_peak_where_their_plans_said(name: str) -> None:
    for foretold, measured in KEPT[name]:
        assert measured == pytest.approx(foretold, rel=WITHIN)


def test_kept_results_have_both() -> None:
    """Large blocks, many blocks, and a limit of memory at least."""
    works = {name.split("-memory-")[1].removesuffix(".json") for name in BOTH if "-memory-" in name}
    assert works >= {"gemma3-27b", "layers", "limit", "limit-group"}


# What benchmarks keep


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int | None, Path | None]]:
    """Command lines, limits and groups of what would have been measured; each leaves a manifest."""
    seen: list[tuple[list[str], int | None, Path | None]] = []

    def measured(
        command: list[Any], log: Path, env: Any = None, data_limit: int | None = None, group: Path | None = None
    ) -> harness.Measurement:
        seen.append(([str(word) for word in command], data_limit, group))
        out = Path(command[5])
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"")
        run = {"peak_bytes": 9, "planned_peak_bytes": 7, "offload": True}
        manifest = {"calibration": {"sha256": "ab"}, "bits_per_weight": 4.5, "run": run}
        (out / "halfbyte.json").write_text(json.dumps(manifest))
        return harness.Measurement(wall_s=1, cpu_s=1, peak_rss_bytes=9, peak_anonymous_bytes=8, other_cpu_share=0)

    monkeypatch.setattr(harness, "measure", measured)
    monkeypatch.setattr(harness, "compared", lambda *_: {})
    return seen


def test_rows_of_peers_have_what_was_foretold(commands: list[Any], tmp_path: Path) -> None:
    options = argparse.Namespace(threads=None, samples=2, seq_len=8, python={peers.OURS: Path(sys.executable)})
    job = peers.Job(
        options=options,
        model=tmp_path / "model",
        scheme="W4A16",
        group_size=32,
        text=tmp_path / "text",
        work=tmp_path,
        result=tmp_path / "result.json",
    )
    ours = peers.Competitor(name="halfbyte", tool=peers.OURS, how="defaults", runs=1)
    row = peers.one_run(job, ours, "ab")
    assert (row["planned_peak_bytes"], row["peak_rss_bytes"]) == (7, 9)
    assert commands[0][0][3] == "quantize"


def test_rows_of_parts_have_what_was_foretold(commands: list[Any], tmp_path: Path) -> None:
    options = argparse.Namespace(
        threads=None,
        samples=2,
        seq_len=8,
        score_tokens=0,
        model=tmp_path / "model",
        calibration_text=tmp_path / "text",
        validation_text=tmp_path / "text",
    )
    row = parts.measured(options, {"scheme": "W4A16", "group_size": 32}, parts.AS_IT_IS)
    assert (row["planned_peak_bytes"], row["peak_rss_bytes"]) == (7, 9)
    assert len(commands) == 1


def test_under_a_limit_the_choice_is_halfbytes(
    commands: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**33}, "date": "2026-01-02"}
    monkeypatch.setattr(memory, "header", lambda name, options: {"benchmark": name, **machine})
    monkeypatch.setattr(harness, "json_from", lambda command: {"tensor_bytes": 3 << 30})
    options = argparse.Namespace(threads=None, samples=2, seq_len=8, width=256, layers=2, limit_mib=1024, group=False)
    result = memory.limit(options, tmp_path)
    ((command, limit, group),) = commands
    assert (limit, group) == (1 << 30, None)
    assert not {"--offload", "--no-offload"} & set(command)
    assert result["runs"][0]["offload"] is True
    said = memory.render(result)
    assert "limit of private memory: 1.00 GiB; checkpoint x 3.00 of it" in said
    assert "hidden states by its own choice on disk" in said


@ON_LINUX
def test_under_a_limit_of_all_memory(commands: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group stands in for the kernel's here, whose own is below."""

    @contextmanager
    def group(limit: int) -> Iterator[Path]:
        assert limit == 1 << 30
        (tmp_path / "memory.peak").write_text("123\n")
        yield tmp_path

    source = tmp_path / "llama"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"12")
    machine = {"machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**33}, "date": "2026-01-02"}
    monkeypatch.setattr(memory, "header", lambda name, options: {"benchmark": name, **machine})
    monkeypatch.setattr(harness, "json_from", lambda command: {"tensor_bytes": 3 << 30})
    monkeypatch.setattr(harness, "memory_group", group)
    options = argparse.Namespace(threads=None, samples=2, seq_len=8, width=256, layers=2, limit_mib=1024, group=True)
    result = memory.limit(options, tmp_path)
    assert commands[0][1:] == (None, tmp_path)
    assert result["runs"][0]["group_peak_bytes"] == 123
    assert "limit of all memory, page cache included: 1.00 GiB; checkpoint x 3.00" in memory.render(result)


@ON_LINUX
def test_the_kernel_keeps_a_group_to_its_limit(tmp_path: Path) -> None:
    """Who takes more is killed; files that are read do not count, for the kernel drops them."""
    takes = "import sys; x = bytearray(int(sys.argv[1]) << 20); x[::4096] = bytes(len(x) // 4096)"
    reads = "import sys; f = open(sys.argv[1], 'rb'); print(sum(len(x) for x in iter(lambda: f.read(1 << 20), b'')))"
    folder, log = tmp_path / "files", tmp_path / "log"
    folder.mkdir()
    big = folder / "big"
    try:
        with harness.memory_group(100 << 20) as group:
            if harness.group_peak_bytes(group) is None:
                pytest.skip("the kernel keeps no peak of groups")
            big.write_bytes(bytes(300 << 20))
            harness.forget_pages(folder)
            harness.measure([sys.executable, "-c", takes, "20"], log, group=group)
            assert 20 << 20 < (harness.group_peak_bytes(group) or 0) < 90 << 20
            harness.measure([sys.executable, "-c", reads, big], log, group=group)
            assert int(log.read_text()) == 300 << 20
            assert 90 << 20 < (harness.group_peak_bytes(group) or 0) <= 100 << 20
            with pytest.raises(SystemExit, match="status -9"):
                harness.measure([sys.executable, "-c", takes, "200"], log, group=group)
        assert not group.exists()
    except SystemExit as error:
        if "no group" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        big.unlink(missing_ok=True)

"""The command line as a user meets it: help, exit statuses, JSON on stdout, progress on stderr."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from rich.console import Console

import tiny
from attacks.checkpoints import Shard
from conftest import Models
from halfbyte import planner
from halfbyte.calibration import sequences as dealt
from halfbyte.cli.main import COMMANDS, cli, entry_point
from halfbyte.cli.quantize import render
from halfbyte.methods.tuning import EndToEndOptions
from halfbyte.records import (
    CompareRecord,
    EndToEndRecord,
    Manifest,
    Plan,
    TuningRecord,
    VerifyRecord,
    from_plain,
    read_record,
)

HEAVY = ("torch", "transformers", "numba", "compressed_tensors", "numpy", "accelerate", "rich.progress")


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    @property
    def record(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def halfbyte(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the command line in this process."""

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        capfd.readouterr()
        status: int | str | None = 0
        try:
            entry_point()
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        assert isinstance(status, int)
        return Said(status, out, err)

    return call


@pytest.fixture
def pair(tiny_model: Models, text_file: Path, tmp_path: Path, halfbyte: Callable[..., Said]) -> tuple[Path, Path]:
    """A source and what ``halfbyte quantize`` made of it."""
    shutil.copytree(tiny_model("llama"), tmp_path / "source")
    options = ["--group-size", "32", "--calibration", f"text:{text_file}", "--samples", "4", "--seq-len", "40"]
    assert halfbyte("quantize", tmp_path / "source", tmp_path / "out", *options, "--device", "cpu").status == 0
    return tmp_path / "source", tmp_path / "out"


# Help


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argument", ["--help", "--version", "frobnicate"])
def test_what_needs_no_model_imports_nothing_heavy(argument: str) -> None:
    program = (
        "import sys\nfrom halfbyte.cli.main import entry_point\n"
        f"sys.argv = ['halfbyte', {argument!r}]\n"
        "try:\n    entry_point()\nfinally:\n"
        f"    print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    ran = python("-c", program)
    assert ran.stderr.splitlines()[-1] == "[]"
    assert ran.returncode == (2 if argument == "frobnicate" else 0)


def test_help_lists_every_command() -> None:
    ran = python("-m", "halfbyte", "--help")
    assert ran.returncode == 0
    assert ran.stderr == ""
    listed = [line.split()[0] for line in ran.stdout.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert set(COMMANDS) <= set(listed)
    assert "Exit status: 0 passed, 1 a check failed, 2 wrong usage or input." in " ".join(ran.stdout.split())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_are_what_the_table_says(name: str, halfbyte: Callable[..., Said]) -> None:
    command = importlib.import_module(COMMANDS[name][0]).command
    assert isinstance(command, click.Command)
    assert command.name == name
    assert cli.get_command(click.Context(cli), name) is command
    options = {o for p in command.params for o in p.opts}
    assert "--json" in options
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "as_json":
            assert parameter.help, f"{name} {parameter.opts} has no help"
    said = halfbyte(name, "--help")
    assert said.status == 0
    assert f"halfbyte {name}" in said.out or "Usage:" in said.out


def test_the_python_face_is_there() -> None:
    import halfbyte

    assert sorted(halfbyte.__all__) == [
        "compare",
        "convert",
        "deploy",
        "evaluate",
        "inspect",
        "load",
        "plan",
        "quantize",
        "verify",
    ]
    assert all(callable(getattr(halfbyte, name)) for name in halfbyte.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'frobnicate'"):
        halfbyte.frobnicate  # noqa: B018


# Every command with --json, and for people


def test_plan(tiny_model: Models, halfbyte: Callable[..., Said]) -> None:
    said = halfbyte("plan", tiny_model("gemma3"), "--group-size", "32", "--json")
    assert (said.status, said.err) == (0, "")
    plan = from_plain(Plan, said.record)
    assert plan.problems == []
    assert plan.num_blocks == 2
    assert plan.bits_per_weight == pytest.approx(4.5, abs=0.05)  # scales, and eight bytes a Linear for its shape
    text = halfbyte("plan", tiny_model("gemma3"), "--group-size", "32")
    assert text.status == 0
    assert "Gemma3ForCausalLM, 2 blocks at model.layers" in text.out
    assert "estimated peak memory" in text.out


def test_plan_lists_every_problem_and_fails(tmp_path: Path, halfbyte: Callable[..., Said]) -> None:
    source = tiny.build(tmp_path / "source", shard="60KB")
    missing = sorted(source.glob("*.safetensors"))[-1]
    missing.unlink()
    said = halfbyte("plan", source)  # group size 128, which divides nothing here
    assert said.status == 2
    problems = said.out.count("problem:")
    assert problems > 3
    assert missing.name in said.out
    assert said.err == f"halfbyte: {source}: {problems} problems would stop this run.\n"


def test_plan_with_problems_is_one_json_document(tiny_model: Models, halfbyte: Callable[..., Said]) -> None:
    said = halfbyte("plan", tiny_model("llama"), "--json")
    assert said.status == 2
    assert len(said.record["problems"]) > 3
    assert said.err.endswith(" problems would stop this run.\n")


def test_quantize(tiny_model: Models, text_file: Path, tmp_path: Path, halfbyte: Callable[..., Said]) -> None:
    options = ["--group-size", "32", "--calibration", f"text:{text_file}", "--samples", "4", "--seq-len", "40"]
    said = halfbyte("quantize", tiny_model("llama"), tmp_path / "out", *options, "--device", "cpu", "--json")
    assert said.status == 0
    assert from_plain(Manifest, said.record) == read_record(Manifest, tmp_path / "out" / "halfbyte.json")
    assert [line for line in said.err.splitlines() if line.startswith("block ")] != []
    for part in ("block 2/2: ", " bits, relative error ", " s, peak ", " GiB, ETA 0 s"):
        assert part in said.err
    text = halfbyte("quantize", tiny_model("llama"), tmp_path / "again", *options, "--device", "cpu")
    assert text.out.startswith(f"wrote {tmp_path}/again: ")
    assert "tuning" not in text.out.replace(str(tmp_path), "")  # of one batch, none is left to judge by
    assert f"next: halfbyte verify {tmp_path}/again --source " in text.out


def test_quantize_says_how_tuning_went(
    tiny_model: Models,
    text_file: Path,
    tmp_path: Path,
    halfbyte: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dealt, "TOKENS_PER_STEP", 80)
    monkeypatch.setattr(planner, "end_to_end_of", lambda *_: EndToEndOptions(steps=2, held_out=4))
    options = ["--group-size", "32", "--calibration", f"text:{text_file}", "--samples", "16", "--seq-len", "40"]
    said = halfbyte("quantize", tiny_model("llama"), tmp_path / "out", *options, "--device", "cpu")
    assert said.status == 0
    made = read_record(Manifest, tmp_path / "out" / "halfbyte.json")
    assert made.end_to_end is not None
    _, blocks, together, _ = said.out.splitlines()
    assert blocks.startswith(f"block tuning: {sum(r.kept for r in made.tuning)} of 2 blocks kept their tuned scales; ")
    assert f"{made.end_to_end.kl_before:.5f} nats, {made.end_to_end.kl_after:.5f} after 2 steps; " in together


def test_what_quantize_says_about_tuning(ferry: Path) -> None:
    """A block that stayed as it was counts as 1 in the mean."""
    manifest = read_record(Manifest, ferry / "halfbyte.json")
    losses = [(0.5, 0.25, True), (0.25, 0.125, True), (0.5, 0.75, False)]
    tuning = [TuningRecord(block=i, loss_before=a, loss_after=b, kept=k) for i, (a, b, k) in enumerate(losses)]

    def said(kept: bool) -> list[str]:
        record = EndToEndRecord(steps=56, kl_before=0.125, kl_after=0.0625, kept=kept)
        text = io.StringIO()
        console = Console(file=text, width=120, highlight=False, soft_wrap=True)
        render(console, replace(manifest, tuning=tuning, end_to_end=record), Path("out"))
        return text.getvalue().splitlines()

    blocks = "block tuning: 2 of 3 blocks kept their tuned scales; output error on samples that were not tuned on is "
    together = "all scales together: divergence on samples that were not tuned on 0.12500 nats, 0.06250 after 56 steps"
    assert said(True)[1:-1] == [f"{blocks}0.667 of what it was, on average", f"{together}; kept"]
    assert said(False)[2] == f"{together}; not kept"


def test_quantize_random_tokens_and_self(tiny_model: Models, tmp_path: Path, halfbyte: Callable[..., Said]) -> None:
    """The two sources that need no file; ``self`` is the default."""
    for name, options in (("self", []), ("random-tokens", ["--calibration", "random-tokens"])):
        size = ["--samples", "3", "--seq-len", "24", "--group-size", "32", "--seed", "4", "--device", "cpu", "--json"]
        said = halfbyte("quantize", tiny_model("qwen3"), tmp_path / name, *options, *size)
        assert said.status == 0, said.err
        assert said.record["calibration"]["spec"] == name
        assert said.record["calibration"]["seed"] == 4


def test_verify(pair: tuple[Path, Path], halfbyte: Callable[..., Said]) -> None:
    source, out = pair
    said = halfbyte("verify", out, "--source", source, "--json")
    assert said.status == 0
    record = from_plain(VerifyRecord, said.record)
    assert record.passed
    assert record == read_record(VerifyRecord, out / "verify.json")
    Shard(out / "model.safetensors").flip("model.norm.weight")
    damaged = halfbyte("verify", out, "--source", source)
    assert damaged.status == 1
    assert damaged.err.splitlines()[-1].startswith(f"halfbyte: {out}: ")
    assert "model.norm.weight" in damaged.out
    assert halfbyte("verify", out, "--source", source, "--json").record["passed"] is False
    assert halfbyte("verify", source.parent / "nowhere").status == 2


def test_compare(pair: tuple[Path, Path], text_file: Path, halfbyte: Callable[..., Said]) -> None:
    source, out = pair
    options = ["--text", text_file, "--window", "32", "--device", "cpu"]
    said = halfbyte("compare", source, out, *options, "--json")
    assert said.status == 0
    record = from_plain(CompareRecord, said.record)
    assert record.metrics["kl_mean"] > 0
    text = halfbyte("compare", source, out, *options)
    assert "perplexity ratio" in text.out
    gate = halfbyte("compare", source, out, *options, "--max-kl", "1e-9")
    assert gate.status == 1
    assert gate.err.splitlines()[-1].startswith(f"halfbyte: {out}: mean KL ")
    assert halfbyte("compare", source, out, *options, "--max-kl", "1e-9", "--json").record["metrics"]["kl_mean"] > 0
    assert halfbyte("compare", source, out, *options, "--max-kl", "100").status == 0


def test_inspect(pair: tuple[Path, Path], halfbyte: Callable[..., Said]) -> None:
    source, out = pair
    said = halfbyte("inspect", out, "--json")
    assert (said.status, said.err) == (0, "")
    assert said.record["bits_per_weight"] == pytest.approx(4.5, abs=0.05)
    assert len(said.record["errors"]) == 2
    text = halfbyte("inspect", out)
    assert text.status == 0
    assert "LlamaForCausalLM" in text.out
    assert halfbyte("inspect", source).status == 0


def test_an_error_with_json_is_an_object(tmp_path: Path, halfbyte: Callable[..., Said]) -> None:
    for command in ("plan", "inspect", "verify"):
        said = halfbyte(command, tmp_path / "nowhere", "--json")
        assert said.status == 2
        assert said.record["exit_status"] == 2
        assert said.err == f"halfbyte: {said.record['error']}\n"


def test_a_bug_is_told_from_a_wrong_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, halfbyte: Callable[..., Said]
) -> None:
    importlib.import_module("halfbyte.inspection")

    def broken(checkpoint: str) -> None:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr(sys.modules["halfbyte.inspection"], "inspect", broken)
    said = halfbyte("inspect", tmp_path)
    assert said.status == 70
    assert "ZeroDivisionError: one over nothing" in said.err
    assert said.err.splitlines()[-1].startswith("halfbyte: this is a bug in halfbyte")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, halfbyte: Callable[..., Said]) -> None:
    importlib.import_module("halfbyte.inspection")

    def impatient(checkpoint: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["halfbyte.inspection"], "inspect", impatient)
    said = halfbyte("inspect", tmp_path)
    assert said.status == 130
    assert "--resume" in said.err

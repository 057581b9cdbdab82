"""``halfbyte serve`` when things go wrong, and what is built on it: ``bench`` and ``chat``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import requests

import halfbyte
from conftest import Models
from served import alive, server, start

pytestmark = pytest.mark.serve

LIMIT_S = 300


@pytest.fixture(scope="module")
def made(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopping") / "tiny"
    halfbyte.quantize(tiny_model("llama"), out, scheme="W4A16", group_size=32, method="rtn")
    return out


def test_an_engine_that_is_killed_is_reported(made: Path, tmp_path: Path) -> None:
    with server(tmp_path, "--engine", "llamacpp", made) as running:
        os.kill(running.record["engine_pid"], signal.SIGKILL)
        assert running.process.wait(LIMIT_S) == 2
        said = running.errors.read_text()
    assert "The last lines of llama.cpp:" in said
    assert "llama.cpp: was killed by SIGKILL: the system may have run out of memory while it served" in said


def test_a_broken_model_is_reported_with_the_engines_words(made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(200))
    process = start(tmp_path, "--port", "0", "--engine", "llamacpp", broken)
    assert process.wait(LIMIT_S) == 2
    said = (tmp_path / "errors.txt").read_text()
    assert "The last lines of llama.cpp:" in said
    assert "halfbyte: llama.cpp: " in said
    assert "Traceback" not in said.splitlines()[-1]


def test_a_signal_while_it_starts_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    process = start(tmp_path, "--port", "0", "--engine", "transformers", "--engine-log", log, made)
    end = time.monotonic() + LIMIT_S
    while not log.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 0
    assert not [pid for pid in children if alive(pid)]
    assert (tmp_path / "out.txt").read_text() == ""


@pytest.mark.parametrize("keys", [{}, {"HALFBYTE_API_KEY": "k"}], ids=["open", "keyed"])
def test_the_calls_that_serve_prints_work_as_they_are(made: Path, tmp_path: Path, keys: dict[str, str]) -> None:
    with server(tmp_path, "--engine", "llamacpp", made, "--", "--threads", "1", environment=keys) as running:
        end = time.monotonic() + LIMIT_S
        while "Metrics:" not in (said := running.out.read_text()):  # the file of readiness comes first
            assert time.monotonic() < end
            time.sleep(0.05)
        curl, python = said.partition("  curl ")[2].split("\n\n")[:2]
        for command in (["bash", "-c", f"curl --fail {curl}"], [sys.executable, "-c", dedent(python)]):
            environment = {**os.environ, **keys}
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()


def test_bench_serves_measures_and_draws(made: Path, tmp_path: Path) -> None:
    plot, out = tmp_path / "plot.png", tmp_path / "bench.json"
    command = [sys.executable, "-m", "halfbyte", "bench", str(made), "--clients", "1,2", "--requests", "2"]
    command += ["--tokens", "6", "--words", "10", "--plot", str(plot), "--out", str(out)]
    command += ["--baseline", str(made), "--baseline-engine", "llamacpp"]
    command += ["--", "--engine", "llamacpp", "--cache", str(tmp_path / "cache"), "--", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny: llamacpp, " in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    from halfbyte.records import read_record
    from halfbyte.serving.bench import BenchRecord

    measured, baseline = read_record(BenchRecord, out).measured
    assert (baseline.target, len(baseline.levels)) == (str(made), 2)
    assert [(level.clients, level.requests, level.errors) for level in measured.levels] == [(1, 2, 0), (2, 4, 0)]
    assert all(level.tokens == 6 * level.requests for level in measured.levels)
    assert measured.memory_bytes is not None
    assert measured.memory_bytes > 20_000_000


def test_chat_answers_a_pipe_turn_by_turn(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "halfbyte", "chat", str(made), "--engine", "llamacpp", "--temperature", "0"]
    command += ["--max-tokens", "5", "--cache", str(tmp_path), "--", "--threads", "1"]
    told = "The ferry\nThe ferry\n/new\nThe ferry\n/exit\nnever read\n"
    done = subprocess.run(command, input=told.encode(), capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert b"a new conversation" in done.stderr
    assert b"engine: llama.cpp (asked for)" in done.stderr
    assert done.stdout.strip()


def test_an_engine_that_is_killed_ends_a_chat_with_its_last_lines(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "halfbyte", "chat", str(made), "--engine", "llamacpp", "--max-tokens", "5"]
    command += ["--cache", str(tmp_path), "--", "--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write("The ferry\n")
        chat.stdin.flush()
        assert chat.stdout.readline()
        (engine,) = Path(f"/proc/{chat.pid}/task/{chat.pid}/children").read_text().split()
        os.kill(int(engine), signal.SIGKILL)
        chat.stdin.write("And then?\n")
        chat.stdin.close()
        said = chat.stderr.read()
        assert chat.wait(LIMIT_S) == 2
    assert "The last lines of llama.cpp:" in said
    assert "llama.cpp: was killed by SIGKILL: the system may have run out of memory while it answered" in said


def test_files_that_cannot_be_written_are_said_first(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no" / "file")
    for name, option, value, words in (
        ("serve", "--engine-log", nowhere, "there is no folder"),
        ("serve", "--ready-file", nowhere, "there is no folder"),
        ("bench", "--out", nowhere, "there is no folder"),
        ("bench", "--plot", nowhere, "there is no folder"),
        ("bench", "--plot", str(tmp_path / "plot.txt"), "neither .png nor .svg"),
    ):
        command = [sys.executable, "-m", "halfbyte", name, str(tmp_path), option, value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 2
        assert option in done.stderr
        assert words in done.stderr


def test_chat_and_bench_say_when_nobody_answers() -> None:
    for name in ("chat", "bench"):
        command = [sys.executable, "-m", "halfbyte", name, "http://127.0.0.1:9"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 2
        assert "http://127.0.0.1:9: does not answer" in done.stderr


def test_a_second_signal_does_not_wait(tiny_model: Models, tmp_path: Path) -> None:
    lasting = tiny_model("llama", max_position_embeddings=1 << 17)
    options = ("--engine", "llamacpp", "--drain", "1000", "--context", "100000", "--parallel", "1")
    with server(tmp_path, *options, lasting, "--", "--threads", "1") as running:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
        with requests.post(running.record["url"] + "/chat/completions", json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(60) == 0
    assert "stopped; 1 answers were cut off" in running.errors.read_text()

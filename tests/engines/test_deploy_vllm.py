"""Real vLLM on this CPU, as ``halfbyte deploy`` starts it: its server with the arguments of the manifests, asked with
the curl of each README, and the engine ``vllm`` that goes into Triton."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import engine
import halfbyte
import halfbyte.deployment
import tiny
import triton_server
from halfbyte.deployment.options import Wishes

pytestmark = [pytest.mark.engine, pytest.mark.skipif(engine.python() is None, reason=engine.MISSING)]

CONTEXT, NAME = 256, "ferry"
TARGETS = ("podman", "compose", "kubernetes", "kserve")
PROMPTS = ["There are forty seats below", "In autumn the geese"]
CHAT = [{"role": "user", "content": "How deep is the water?"}]
START_S = 900


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deployed")
    tiny.build(root / "source", "llama", max_position_embeddings=CONTEXT, **tiny.WIDE)
    halfbyte.quantize(root / "source", root / "small", scheme="W8A8", method="rtn", device="cpu")
    return root / "small"


@pytest.fixture(scope="module")
def folders(small: Path) -> dict[str, Path]:
    found = {}
    for target in TARGETS:
        found[target] = small.with_name(target)
        storage = "pvc://claim/ferry" if target in ("kubernetes", "kserve") else None
        halfbyte.deploy(target, small, found[target], name=NAME, wishes=Wishes(gpus=0, storage=storage))
    return found


def arguments(target: str, folder: Path) -> list[str]:
    """What the target gives vLLM, out of its file."""
    if target == "podman":
        unit = (folder / f"{NAME}.container").read_text()
        return shlex.split(re.search(r"(?m)^Exec=(.*)$", unit)[1])  # type: ignore[index]
    if target == "compose":
        return list(yaml.safe_load((folder / "compose.yaml").read_text())["services"]["server"]["command"])
    if target == "kubernetes":
        pod = yaml.safe_load((folder / "deployment.yaml").read_text())["spec"]["template"]["spec"]
        return list(pod["containers"][0]["args"])
    container = yaml.safe_load((folder / "servingruntime.yaml").read_text())["spec"]["containers"][0]
    return [a.replace("{{.Name}}", NAME) for a in container["args"]]  # as KServe does


@pytest.fixture(scope="module")
def answer(small: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    listed = {target: arguments(target, folder) for target, folder in folders.items()}
    two = small.with_name("two")
    halfbyte.deploy("podman", small, two, name=NAME, wishes=Wishes(gpus=2))
    listed["two GPUs"] = arguments("podman", two)
    question = {
        "files": str(Path(halfbyte.deployment.__file__).parent / "triton_model"),
        "checkpoint": str(small),
        "context": CONTEXT,
        "prompts": PROMPTS,
        "messages": CHAT,
        "asked": [
            {"limit": 12},
            {"limit": 5},
            {"limit": 12, "do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3},
            {"limit": 12, "do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3},
            {"limit": 12, "repetition_penalty": 2.0},
            {"limit": 200, "gone": True},
        ],
        "arguments": listed,
    }
    with pytest.MonkeyPatch.context() as m:
        for key, value in environment().items():
            m.setenv(key, value)
        found: dict[str, Any] = engine.ask("triton_vllm.py", question, tmp_path_factory.mktemp("vllm-engine"))
    return found


def environment() -> dict[str, str]:
    """Offline, in little memory, and with what its image has and a bare environment may lack."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def test_the_engine_streams_and_repeats_itself(answer: dict[str, Any], small: Path) -> None:
    whole, five, drawn, again, penalised, gone = answer["answers"]
    for place in range(len(PROMPTS)):
        text = "".join(whole["pieces"][place])
        assert text
        assert text.startswith("".join(five["pieces"][place]))
    assert sum(len([p for p in pieces if p]) for pieces in whole["pieces"]) > len(PROMPTS)
    assert set(whole["reasons"]) <= {"length", "stop"}
    assert drawn == again or ["".join(p) for p in drawn["pieces"]] == ["".join(p) for p in again["pieces"]]
    assert penalised["pieces"] != whole["pieces"]
    assert gone["reasons"] == ["cancelled"] * len(PROMPTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert answer["chat"] == list(rendered["input_ids"])
    assert answer["context"] == CONTEXT


def test_vllm_understands_the_arguments_of_every_target(answer: dict[str, Any]) -> None:
    for target, understood in answer["parsed"].items():
        assert understood["model"] == "/mnt/models", target
        assert understood["served_model_name"] == [NAME], target
        assert understood["port"] == (8080 if target == "kserve" else 8000), target
        assert understood["max_model_len"] == CONTEXT, target
        assert understood["tensor_parallel_size"] == (2 if target == "two GPUs" else 1), target


@pytest.fixture(scope="module")
def server(small: Path, folders: dict[str, Path]) -> Iterator[str]:
    """vLLM's server with podman's arguments, but for the mounted path, the address and, for a start in seconds, no
    compilation."""
    port = triton_server.free_port()
    replaced = {"--model": str(small), "--host": "127.0.0.1", "--port": str(port)}
    listed = [
        f"{key}={replaced.get(key, value)}"
        for key, _, value in (a.partition("=") for a in arguments("podman", folders["podman"]))
    ]
    interpreter = engine.python()
    assert interpreter is not None
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV",)}
    kept |= environment() | {"OMP_NUM_THREADS": "1"}
    log = small.with_name("server.log")
    command = [interpreter, "-m", "vllm.entrypoints.openai.api_server", *listed, "--enforce-eager"]
    with log.open("w") as out:
        running = subprocess.Popen(command, env=kept, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                tail = log.read_text(errors="replace")[-4000:]
                assert running.poll() is None, tail
                assert time.monotonic() < until, tail
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)
        running.wait(timeout=120)


@pytest.mark.parametrize("target", TARGETS)
def test_the_curl_of_the_readme_works(server: str, folders: dict[str, Path], target: str) -> None:
    readme = (folders[target] / "README.md").read_text()
    block = re.search(r"(?m)^    curl (?:.+\n)+?(?=    +}')    +}'", readme)
    assert block is not None
    line = re.sub(r"\$URL|http://localhost:\d+", server, block[0])
    ran = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True, timeout=300)
    events = [e.removeprefix("data: ") for e in ran.stdout.split("\n\n") if e.startswith("data: ")]
    assert events[-1] == "[DONE]", ran.stdout
    chunks = [json.loads(e) for e in events[:-1]]
    assert all(c["model"] == NAME for c in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_metrics(server: str) -> None:
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as reply:
        assert b"vllm:" in reply.read()

"""Serving, without an engine: the choice of one, the front before a small fake one, processes that are watched.

Real engines are asked in ``tests/serving``.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import gguf
import numpy as np
import pytest
import torch
from aiohttp import web
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from conftest import Models
from halfbyte.conversion.gguf_cache import to_gguf
from halfbyte.errors import EngineError, HalfbyteError, MissingDependencyError, UsageError
from halfbyte.progress import Silent
from halfbyte.serving import api, bench, client, engines, service
from halfbyte.serving.api import ApiError
from halfbyte.serving.chat import Conversation
from halfbyte.serving.child import Child
from halfbyte.serving.choice import Choice, Served, Weights, choose, read_served
from halfbyte.serving.client import Target
from halfbyte.serving.engines import Wishes
from halfbyte.serving.front import Access, Backend, Front, is_loopback
from halfbyte.serving.generation import Pieces, sampling_of
from halfbyte.serving.gguf_embeddings import with_small_embeddings
from halfbyte.serving.machine import Gpu, Machine, Vllm, available_bytes, cpu_flags, need
from halfbyte.serving.prepare import cache_folder, prepare, prepare_apart
from halfbyte.serving.transformers_process import load_writer

INT4, INT8 = Weights(bits=4, floating=False, input_bits=None), Weights(bits=8, floating=False, input_bits=8)
DENSE = Served(path=Path("m"), method="none", weights=(), context=2048, pictures=False, kv_bytes=1000)
W4A16 = replace(DENSE, method="compressed-tensors", weights=(INT4,))
W8A8 = replace(DENSE, method="compressed-tensors", weights=(INT8,))
AWQ = replace(DENSE, method="awq", weights=(INT4,))
CPU_VLLM = Vllm(python="/v/python", version="0.32.0", cpu=True)
GPU_VLLM = Vllm(python="/v/python", version="0.32.0", cpu=False)
BARE = Machine(gpus=(), cpu_flags=frozenset({"avx2"}), vllm=None, llamacpp=None, memory_bytes=1 << 34)
LAPTOP = replace(BARE, llamacpp="/l/python")
SERVER_CPU = replace(LAPTOP, cpu_flags=frozenset({"avx2", "avx512f"}), vllm=CPU_VLLM)
HOPPER = replace(LAPTOP, gpus=(Gpu(name="H200", capability=9.0),), vllm=GPU_VLLM)
VOLTA = replace(HOPPER, gpus=(Gpu(name="V100", capability=7.0),))


# The choice of an engine


@pytest.mark.parametrize(
    ("machine", "served", "engine"),
    [
        (BARE, W4A16, "transformers"),
        (LAPTOP, W4A16, "llamacpp"),
        (replace(LAPTOP, vllm=CPU_VLLM), W8A8, "llamacpp"),
        (SERVER_CPU, W4A16, "vllm"),
        (HOPPER, W4A16, "vllm"),
        (HOPPER, DENSE, "vllm"),
        (VOLTA, W8A8, "llamacpp"),
        (replace(HOPPER, vllm=None), W8A8, "llamacpp"),
        (SERVER_CPU, replace(DENSE, method="gguf"), "llamacpp"),
    ],
)
def test_auto_takes_the_first_engine_that_can(machine: Machine, served: Served, engine: str) -> None:
    choice = choose("auto", served, machine, gguf_obstacle=None)
    assert choice.engine == engine
    assert choice.reason


def test_auto_says_why_and_what_would_be_better() -> None:
    assert choose("auto", W4A16, BARE, gguf_obstacle=None) == Choice(
        engine="transformers",
        reason="llama.cpp (xllamacpp) is not installed",
        advice='For llama.cpp: pip install "halfbyte[serve]".',
    )
    without = choose("auto", W4A16, replace(HOPPER, vllm=None), gguf_obstacle=None)
    assert without.reason == "vLLM is not installed"
    assert without.advice.startswith("For vLLM: pip install vllm")
    old = choose("auto", W8A8, VOLTA, gguf_obstacle=None)
    assert "W8A8 need compute capability 7.5, V100 has 7.0" in old.reason
    assert old.advice == ""  # installing anything would not help
    odd = choose("auto", W4A16, LAPTOP, gguf_obstacle="it cannot become GGUF: groups of 24")
    assert (odd.engine, odd.reason) == ("transformers", "it cannot become GGUF: groups of 24")


@pytest.mark.parametrize(
    ("engine", "served", "words"),
    [
        ("vllm", W4A16, "vLLM's kernel for W4A16 on CPUs needs AVX512, which this CPU lacks"),
        ("vllm", AWQ, "vLLM's kernel for AWQ on CPUs needs AVX512"),
        ("vllm", replace(W4A16, weights=(replace(INT4, bits=8),)), "vLLM has no kernel for W8A16 on CPUs"),
        ("vlm", W4A16, "unknown engine 'vlm'"),
    ],
)
def test_what_an_engine_cannot_run_here_is_said_before_it_starts(engine: str, served: Served, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose(engine, served, replace(LAPTOP, vllm=CPU_VLLM), gguf_obstacle=None)


def test_an_engine_that_is_wanted_and_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(UsageError, match=r"--engine llamacpp: .* is not installed. Install it: pip install"):
        choose("llamacpp", W4A16, BARE, gguf_obstacle=None)


def test_a_checkpoint_is_read_for_the_choice(tiny_model: Models, tmp_path: Path) -> None:
    dense = read_served(tiny_model("llama"))
    assert (dense.method, dense.weights, dense.pictures) == ("none", (), False)
    halfbyte.quantize(tiny_model("llama"), tmp_path / "w8a8", scheme="W8A8", method="rtn")
    assert read_served(tmp_path / "w8a8").weights == (INT8,)
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    assert dense.kv_bytes == 4 * heads * layers * config["head_dim"]
    assert dense.context == config["max_position_embeddings"]


def test_machine_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n")
    (tmp_path / "memory").write_text("MemTotal: 9 kB\nMemAvailable:  5 kB\n")
    assert cpu_flags(tmp_path / "cpu") == {"fpu", "avx2", "avx512f"}
    assert available_bytes(tmp_path / "memory") == 5 * 1024
    assert cpu_flags(tmp_path / "none") == frozenset()
    assert available_bytes(tmp_path / "none") is None


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "halfbyte\[serve\]"'):
        need("no_such_package", "serve", "serving")


# What engines are given


def test_flags_go_to_the_engine_by_their_kind() -> None:
    known: dict[str, type] = {"--threads": int, "--scale": float}
    assert engines.parse_flags(["--threads", "2", "--scale=0.5"], known, "x") == {"--threads": 2, "--scale": 0.5}
    for flags, words in (
        (["--thread", "2"], "no flag --thread"),
        (["--threads"], "wants a value"),
        (["--threads", "a"], "int"),
    ):
        with pytest.raises(UsageError, match=words):
            engines.parse_flags(flags, known, "x")


def test_what_cannot_fit_is_said_before_anything_starts() -> None:
    wishes = Wishes(name="m", context=4096)
    with pytest.raises(UsageError, match="4096 tokens are more than the 2048 that the model was made for"):
        engines.check_wishes("llamacpp", wishes, W4A16, LAPTOP)
    large = replace(W4A16, kv_bytes=1 << 21)
    with pytest.raises(UsageError, match=r"take 16.0 GiB, 8.0 GiB are free"):
        engines.check_wishes("llamacpp", Wishes(name="m"), large, replace(LAPTOP, memory_bytes=1 << 33))
    assert Wishes(name="m").tokens(W4A16) == 2048


def test_embeddings_are_rounded_for_llamacpp_alone_and_all_else_stays(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transformers serves embeddings as they are"):
        engines.check_wishes("transformers", Wishes(name="m", embeddings="q8_0"), W4A16, LAPTOP)
    halfbyte.quantize(tiny_model("llama"), tmp_path / "w4", scheme="W4A16", group_size=32, method="rtn")
    model = to_gguf(tmp_path / "w4", tmp_path / "cache").model
    small = with_small_embeddings(model, Silent())
    assert with_small_embeddings(model, Silent()) == small
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(small)
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    assert {k: f.contents() for k, f in after.fields.items() if not k.startswith("GGUF.")} == {
        k: f.contents() for k, f in before.fields.items() if not k.startswith("GGUF.")
    }
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.name != "token_embd.weight":
            assert bytes(new.data) == bytes(old.data)
            continue
        assert new.tensor_type == gguf.GGMLQuantizationType.Q8_0
        want, got = (gguf.quants.dequantize(np.asarray(t.data), t.tensor_type).reshape(-1, 32) for t in (old, new))
        step = np.abs(want).max(1, keepdims=True) / 127
        assert np.all(np.abs(got - want) <= step * (0.5 + 127 * 2.0**-11) + 1e-9)
    assert with_small_embeddings(small, Silent()) == small


def test_keys_are_not_arguments_and_user_flags_come_last() -> None:
    wishes = Wishes(name="m", flags=("--tensor-parallel-size", "2"))
    launch = engines.vllm(W8A8, wishes, SERVER_CPU)
    assert launch.key not in " ".join(launch.arguments)
    assert launch.environment["VLLM_API_KEY"] == launch.key
    assert launch.arguments[-2:] == ("--tensor-parallel-size", "2")
    llama = engines.llamacpp(Path("m.gguf"), None, W4A16, Wishes(name="m", flags=("--threads", "3")), LAPTOP)
    assert llama.key not in " ".join(llama.arguments)
    assert json.loads(llama.settings)["set"] == {"cpuparams.n_threads": 3}


def test_conversions_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    assert cache_folder(tmp_path / "model", None) == tmp_path / ".halfbyte"
    assert cache_folder(tmp_path / "model", tmp_path / "here") == tmp_path / "here"


def test_a_checkpoint_that_is_not_there_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="no such folder"):
        prepare(tmp_path / "none", engine="auto", wishes=Wishes(name="m"), cache=None, reporter=Silent())


def test_a_checkpoint_is_prepared_apart_and_its_errors_come_back_whole(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError) as here:
        prepare(tmp_path / "none", engine="auto", wishes=Wishes(name="m"), cache=None, reporter=Silent())
    with pytest.raises(HalfbyteError) as there:
        prepare_apart(tmp_path / "none", engine="auto", wishes=Wishes(name="m"), cache=None, reporter=Silent)
    assert type(there.value) is type(here.value)
    assert vars(there.value) == vars(here.value)
    assert str(there.value) == str(here.value)


def killed() -> Silent:
    """In place of a reporter: what happens to the largest process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Silent()


def terminated() -> Silent:
    os.kill(os.getpid(), signal.SIGTERM)
    return Silent()


def talkative() -> Silent:
    """In place of a reporter: what a library written in C may do."""
    os.write(1, b"said by a library")
    return Silent()


def broken() -> Silent:
    raise ZeroDivisionError


def apart(reporter: Callable[[], Silent], folder: Path) -> None:
    prepare_apart(folder / "none", engine="auto", wishes=Wishes(name="m"), cache=None, reporter=reporter)


def test_how_a_preparing_process_ended_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match=r"killed by SIGKILL .the system may have run out of memory"):
        apart(killed, tmp_path)
    with pytest.raises(EngineError, match=r"killed by SIGTERM\.$"):
        apart(terminated, tmp_path)
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match="ended with status 1"):  # a bug in halfbyte
        apart(broken, tmp_path)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_a_library_prints_is_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HalfbyteError, match="no such folder"):
        apart(talkative, tmp_path)
    assert capfd.readouterr() == ("", "said by a library")


def test_no_module_of_the_current_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "ctypes", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HalfbyteError, match="no such folder"):
        apart(Silent, tmp_path)
    with child("import random; print(random.random.__name__)") as engine:
        wait_until(engine.ended)
        assert engine.tail() == ["random"]


class Leaving(Silent):
    """A reporter that leaves a sign of what it hears."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def start(self, task: str, total: int) -> None:
        self.sign.write_text(task)
        time.sleep(60)

    def finish(self) -> None:
        self.sign.write_text("finished")


INTERRUPTED = """
import functools, sys
from pathlib import Path
from halfbyte.serving.engines import Wishes
from halfbyte.serving.prepare import prepare_apart
from test_serving import Leaving
place, cache, sign = map(Path, sys.argv[1:])
prepare_apart(
    place, engine="transformers", wishes=Wishes(name="m"), cache=cache, reporter=functools.partial(Leaving, sign)
)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preparing_ends_in_order_with_who_waits_for_it(
    number: signal.Signals, tiny_model: Models, tmp_path: Path
) -> None:
    halfbyte.quantize(tiny_model("llama"), tmp_path / "w4", scheme="W4A16", group_size=32, method="rtn", device="cpu")
    halfbyte.convert(tmp_path / "w4", tmp_path / "gptq", to="gptq")
    sign = tmp_path / "sign"
    program = [sys.executable, "-c", INTERRUPTED, tmp_path / "gptq", tmp_path / "cache", sign]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells let what they background ignore it
    with subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, preexec_fn=heard) as waiting:
        wait_until(sign.exists)
        (pid,) = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children").read_text().split()
        waiting.send_signal(number)
        wait_until(lambda: gone(int(pid)))
        _, said = waiting.communicate()
    assert sign.read_text() == "finished"
    assert waiting.returncode == -number
    assert said.count(b"Traceback") == (number == signal.SIGINT)  # of the one that waited alone


def test_each_checkpoint_has_a_dense_copy_of_its_own(tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_model("llama"), tmp_path / "w4", scheme="W4A16", group_size=32, method="rtn")
    for name in ("m.awq", "m.gptq"):
        halfbyte.convert(tmp_path / "w4", tmp_path / name, to=name[2:])

    def prepared(name: str) -> str:
        found = prepare(
            tmp_path / name, engine="transformers", wishes=Wishes(name="m"), cache=tmp_path / "c", reporter=Silent()
        )
        return str(json.loads(found.launch.settings)["model"])

    assert prepared("m.awq") != prepared("m.gptq")
    before = prepared("m.gptq")
    assert prepared("m.gptq") == before
    (tmp_path / "m.gptq/chat_template.jinja").write_text("{{ messages }}")
    after = prepared("m.gptq")
    assert after != before
    assert (Path(after) / "chat_template.jinja").read_text() == "{{ messages }}"


# Errors in the API's form


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (
            400,
            {"error": {"code": 400, "message": "request (9 tokens) exceeds", "type": "exceed_context_size_error"}},
            (400, "invalid_request_error", "context_length_exceeded"),
        ),
        (
            400,
            {"error": {"message": "This model's maximum context length is 5", "type": "BadRequestError", "code": 400}},
            (400, "invalid_request_error", "context_length_exceeded"),
        ),
        (
            500,
            {"error": {"code": 500, "message": "image input is not supported"}},
            (400, "invalid_request_error", "unsupported"),
        ),
        (500, {"error": {"message": "Jinja Exception: roles alternate"}}, (400, "invalid_request_error", None)),
        (500, {"error": {"message": "boom"}}, (500, "server_error", None)),
        (404, {"detail": "Not Found"}, (404, "invalid_request_error", None)),
        (503, "busy", (503, "server_error", None)),
    ],
)
def test_engines_errors_take_the_apis_form(status: int, said: Any, expected: tuple[int, str, str | None]) -> None:
    raw = said.encode() if isinstance(said, str) else json.dumps(said).encode()
    error = api.engine_error(status, raw)
    body = error.body()["error"]
    assert (error.status, body["type"], body["code"]) == expected
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]


# Text from tokens


@pytest.fixture
def decode(tiny_model: Models) -> tuple[Tokenizer, Callable[[list[int]], str]]:
    tokenizer = Tokenizer.from_file(str(tiny_model("llama") / "tokenizer.json"))
    return tokenizer, lambda ids: str(tokenizer.decode(ids))


TEXTS = ["The ferry leaves.", "naïve – 漢字 🙂🙂 end", "  two  spaces\n\n", "ẞ"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_together_are_the_text(text: str, decode: tuple[Tokenizer, Callable[[list[int]], str]]) -> None:
    tokenizer, to_text = decode
    pieces = Pieces(to_text, ())
    given = [pieces.add(i) for i in tokenizer.encode(text, add_special_tokens=False).ids]
    assert "\ufffd" not in "".join(given)
    assert "".join(given) + pieces.end() == text


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("leaves",), "The ferry "),
        (("ferry lea", "zebra"), "The "),
        (("zebra",), TEXTS[0]),
        ((".",), "The ferry leaves"),
    ],
)
def test_text_ends_before_a_stop_string_and_shows_nothing_of_it(
    stop: tuple[str, ...], left: str, decode: tuple[Tokenizer, Callable[[list[int]], str]]
) -> None:
    tokenizer, to_text = decode
    pieces, given = Pieces(to_text, stop), ""
    for token in tokenizer.encode(TEXTS[0], add_special_tokens=False).ids:
        given += pieces.add(token)
        assert left.startswith(given)
        if pieces.stopped:
            break
    assert given + pieces.end() == left


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"seed": "x"}, "seed"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
    ],
)
def test_values_that_cannot_be_honoured_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        sampling_of(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_model_writes_what_generate_does_and_as_long_as_it_is_told(tiny_model: Models) -> None:
    writer = load_writer(tiny_model("llama"), 64, "cpu", "float32", None)
    ids = writer.chat_prompt([{"role": "user", "content": "The ferry"}])
    greedy = sampling_of({"temperature": 0, "max_tokens": 20, "ignore_eos": True})
    said: list[str] = []
    written = writer.write(ids, greedy, said.append, threading.Event())
    assert (written.finish, written.prompt_tokens, written.tokens) == ("length", len(ids), 20)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "temperature": None, "top_k": None, "eos_token_id": -1, "pad_token_id": 0}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    wanted = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(said) == wanted
    stopped = threading.Event()
    stopped.set()
    assert writer.write(ids, greedy, said.append, stopped).tokens <= 1
    with pytest.raises(ApiError, match="with an answer at most 64 are possible"):
        writer.write(ids * 20, greedy, said.append, threading.Event())


# The front, before a small engine that says what it is told


class FakeEngine:
    """Answers ``/v1/chat/completions`` as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.pieces = [b'data: {"a": 1}\n\n', b"data: [DONE]\n\n"]
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = asyncio.Event()
        self.break_off = False
        self.port = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer inner"
        body = await request.json()
        self.asked.append(body)
        if body.get("messages") == [{"role": "user", "content": "too long"}]:
            said = {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}
            return web.json_response(said, status=400)
        if not body.get("stream"):
            return web.json_response({"id": "x"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(self.pieces[0])
            await self.gate.wait()
            if self.break_off:
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(self.pieces[1])
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return response


@asynccontextmanager
async def fronted(access: Access) -> AsyncIterator[tuple[FakeEngine, Front, str, aiohttp.ClientSession]]:
    fake = FakeEngine()
    engine = web.Application()
    engine.router.add_post(api.CHAT, fake.answer)
    engine.router.add_get("/health", _healthy)
    engine.router.add_get("/metrics", _counted)
    async with listening(engine) as engine_url:
        backend = Backend(url=engine_url, key="inner", name="fake", model="m", context=64, pictures=False)
        front = Front(backend, access)
        async with listening(front.app()) as url, aiohttp.ClientSession() as session:
            yield fake, front, url, session


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _counted(_: web.Request) -> web.Response:
    return web.Response(text="engine_tokens 5\n")


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port := engines.free_port())
    await site.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


OPEN = Access(keys=(), loopback=True, origins=(), page=False)
JSON = {"Content-Type": "application/json"}
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(limited())


def test_a_stream_passes_through_byte_for_byte_and_as_it_comes() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, _, url, session):
            fake.gate.clear()
            async with session.post(url + api.CHAT, json=ASK | {"stream": True}) as reply:
                assert await reply.content.readany() == fake.pieces[0]  # before the engine has gone on
                fake.gate.set()
                assert await reply.content.read() == fake.pieces[1]
            async with session.post(url + api.CHAT, json={"messages": ASK["messages"]}) as reply:
                assert await reply.json() == {"id": "x"}
            assert [a["model"] for a in fake.asked] == ["m", "m"]

    run(work)


def test_a_client_that_goes_away_stops_the_engine() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, front, url, session):
            fake.gate.clear()
            async with session.post(url + api.CHAT, json=ASK | {"stream": True}) as reply:
                await reply.content.readany()
                reply.close()
            await fake.cancelled.wait()
            while front.running:
                await asyncio.sleep(0.01)
            async with session.get(url + "/metrics") as reply:
                text = await reply.text()
            assert 'halfbyte_requests_total{path="/v1/chat/completions",status="499"} 1.0' in text
            assert "halfbyte_requests_running 0.0" in text
            assert "engine_tokens 5" in text

    run(work)


def test_an_engine_that_breaks_off_is_told_in_the_stream() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, _, url, session):
            fake.break_off = True
            async with session.post(url + api.CHAT, json=ASK | {"stream": True}) as reply:
                lines = [line async for line in reply.content if line.strip()]
            assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["type"] == "server_error"
            assert b"[DONE]" not in b"".join(lines)
            target = Target(url=url, key=None, model="m")
            with pytest.raises(EngineError, match="broke off"):
                async for _ in client.stream(session, target, ASK["messages"], {}):  # type: ignore[arg-type]
                    pass

    run(work)


@pytest.mark.parametrize(
    ("headers", "raw", "status", "code"),
    [
        ({}, b"{bad", 400, "invalid_json"),
        ({}, b'{"messages": []}', 400, None),
        ({}, b'{"model": "gpt-4", "messages": [{"role": "user"}]}', 404, "model_not_found"),
        ({}, b'{"model": 5, "messages": [{"role": "user"}]}', 400, None),
        ({}, b'{"stream": "yes", "messages": [{"role": "user"}]}', 400, None),
        ({}, b'{"stream_options": [1], "messages": [{"role": "user"}]}', 400, None),
        (
            {},
            json.dumps({"messages": [{"role": "user", "content": "too long"}]}).encode(),
            400,
            "context_length_exceeded",
        ),
        ({"Content-Type": "text/plain"}, json.dumps(ASK).encode(), 415, "content_type"),
        ({"Origin": "https://evil.example"}, json.dumps(ASK).encode(), 403, "origin"),
        ({"Host": "evil.example"}, json.dumps(ASK).encode(), 403, "host"),
        ({"Host": "[::1"}, json.dumps(ASK).encode(), 403, "host"),
        ({"Origin": "http://["}, json.dumps(ASK).encode(), 403, "host"),
    ],
)
def test_wrong_requests_get_the_apis_errors(headers: dict[str, str], raw: bytes, status: int, code: str | None) -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, _, url, session):
            all_headers = {"Content-Type": "application/json"} | headers
            async with session.post(url + api.CHAT, data=raw, headers=all_headers) as reply:
                assert reply.status == status
                assert (await reply.json())["error"]["code"] == code
                assert "Access-Control-Allow-Origin" not in reply.headers
            assert len(fake.asked) == (code == "context_length_exceeded")
            async with session.post(url + api.CHAT, json=ASK) as reply:
                assert reply.status == 200

    run(work)


def test_keys_are_wanted_where_there_are_some() -> None:
    async def work() -> None:
        async with fronted(replace(OPEN, keys=("one", "two"), page=True)) as (_, _, url, session):
            for key, status, code in (
                ("one", 200, None),
                ("two", 200, None),
                ("three", 401, "invalid_api_key"),
                (None, 401, "missing_api_key"),
                ("é", 401, "invalid_api_key"),
            ):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                async with session.post(url + api.CHAT, json=ASK, headers=headers) as reply:
                    assert reply.status == status
                    assert status == 200 or (await reply.json())["error"] | {"message": ""} == {
                        "message": "",
                        "type": "authentication_error",
                        "param": None,
                        "code": code,
                    }
            for path, status in (
                ("/v1/models", 401),
                ("/metrics", 401),
                ("/health", 200),
                ("/", 200),
                ("/page/page.js", 200),
                ("/page/../front.py", 401),
                ("/nothing", 401),
            ):
                async with session.get(url + path) as reply:
                    assert (path, reply.status) == (path, status)
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n")
            assert (await reader.readline()).split()[1] == b"401"
            writer.close()

    run(work)


def test_what_nobody_thought_of_has_the_apis_form_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with fronted(OPEN) as (_, _, url, session):
            monkeypatch.setattr(api, "parse", lambda raw: 1 / 0)
            async with session.post(url + api.CHAT, json=ASK) as reply:
                assert (reply.status, (await reply.json())["error"]["type"]) == (500, "server_error")
            monkeypatch.undo()
            async with session.post(url + api.CHAT, data=io.BytesIO(bytes((64 << 20) + 1)), headers=JSON) as reply:
                assert reply.status == 413
            async with session.get(url + "/metrics") as reply:
                counted = await reply.text()
            for status in (500, 413):
                assert f'status="{status}"}} 1.0' in counted

    run(work)


def test_unknown_paths_and_methods_too_and_the_page_only_when_wanted() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (_, _, url, session):
            for method, path, status in (
                ("GET", "/", 404),
                ("GET", "/v1/none", 404),
                ("GET", api.CHAT, 405),
                ("GET", "/v1/models/x", 404),
            ):
                async with session.request(method, url + path) as reply:
                    assert (path, reply.status) == (path, status)
                    assert set((await reply.json())["error"]) == {"message", "type", "param", "code"}
            async with session.get(url + "/v1/models/m") as reply:
                assert (await reply.json())["id"] == "m"
        async with fronted(replace(OPEN, page=True)) as (_, _, url, session):
            async with session.get(url + "/") as reply:
                assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            async with session.get(url + "/page.json") as reply:
                assert await reply.json() == {"model": "m", "pictures": False, "key": False}

    run(work)


def test_origins_that_are_named_may_ask() -> None:
    async def work() -> None:
        async with fronted(replace(OPEN, origins=("https://app.example",), keys=("k",))) as (_, _, url, session):
            async with session.options(url + api.CHAT, headers={"Origin": "https://app.example"}) as reply:
                assert reply.status == 204
                assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
            headers = {"Origin": "https://app.example", "Authorization": "Bearer k"}
            async with session.post(url + api.CHAT, json=ASK, headers=headers) as reply:
                assert reply.status == 200
                assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
            async with session.options(url + api.CHAT, headers={"Origin": "https://other.example"}) as reply:
                assert reply.status == 403

    run(work)


def test_while_draining_running_answers_end_and_new_ones_are_refused() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, front, url, session):
            fake.gate.clear()
            async with session.post(url + api.CHAT, json=ASK | {"stream": True}) as reply:
                await reply.content.readany()
                drained = asyncio.create_task(front.drained(20))
                await asyncio.sleep(0)
                async with session.post(url + api.CHAT, json=ASK) as late:
                    assert late.status == 503
                async with session.get(url + "/health") as health:
                    assert health.status == 503
                fake.gate.set()
                assert await reply.content.read() == fake.pieces[1]
            assert await drained

    run(work)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_an_address_that_others_reach_wants_a_key() -> None:
    place: dict[str, Any] = {"host": "0.0.0.0", "port": 0}
    with pytest.raises(UsageError, match=r"--host: 0.0.0.0 can be reached by others.*--no-auth"):
        service.Address(**place, keys=(), no_auth=False).access()
    assert service.Address(**place, keys=("k",), no_auth=False).access().keys == ("k",)
    assert not service.Address(**place, keys=(), no_auth=True).access().loopback
    assert service.Address(host="127.0.0.1", port=0, keys=(), no_auth=False).access().loopback


def test_an_address_in_use_is_found_before_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"cannot be used: Address already in use"):
            service.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="is no address"):
        service.bind("no.such.host.invalid", 0)


def test_an_address_bound_twice_is_said_when_the_second_listens() -> None:
    async def work() -> None:
        backend = Backend(url="http://127.0.0.1:9", key="", name="fake", model="m", context=64, pictures=False)
        with (
            closing(service.bind("127.0.0.1", 0)) as first,
            closing(service.bind("127.0.0.1", first.getsockname()[1])) as second,
        ):
            first.listen()
            with pytest.raises(UsageError, match=r"127.0.0.1:\d+ cannot be used: Address already in use"):
                async with service._listening(Front(backend, OPEN), second):
                    pass

    run(work)


# What a model thinks, and says


def test_thoughts_are_shown_and_not_kept_and_an_empty_answer_takes_the_question_with_it() -> None:
    def pieces(*deltas: dict[str, str]) -> list[bytes]:
        chunks = [json.dumps({"choices": [{"delta": delta}]}).encode() for delta in deltas]
        return [b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks), b"data: [DONE]\n\n"]

    async def work() -> None:
        async with fronted(OPEN) as (fake, _, url, session):
            talk = Conversation(Target(url=url, key=None, model="m"), session, "", {})
            fake.pieces = pieces({"reasoning_content": "Hm"}, {"reasoning_content": "."}, {"content": "Yes"})
            assert "".join([piece async for piece in talk.say("Well?")]) == "Hm.\n\nYes"
            known = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes"}]
            assert talk.messages == known
            fake.pieces = pieces({})
            assert [piece async for piece in talk.say("And?")] == []
            assert talk.messages == known
            assert fake.asked[1]["messages"] == [*known, {"role": "user", "content": "And?"}]

    run(work)


def test_a_server_that_stalls_does_not_hold_a_benchmark() -> None:
    async def work() -> None:
        async with fronted(OPEN) as (fake, _, url, _):
            fake.gate.clear()
            load = bench.Load(clients=(1,), requests=1, limit_s=0.2, answer_tokens=2, prompt_words=2)
            with pytest.raises(EngineError, match=r"does not answer .TimeoutError"):
                await bench._measure(url, None, load, None, Silent())

    run(work)


# Processes that are watched


@contextmanager
def child(program: str, **options: Any) -> Iterator[Child]:
    found = Child(
        name="engine", python=sys.executable, arguments=["-c", program], environment=dict(os.environ), **options
    )
    try:
        yield found
    finally:
        found.stop(0.2)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_crash_is_reported_with_the_last_lines() -> None:
    with child("import sys; print('loading'); print('out of luck', file=sys.stderr); sys.exit(3)") as engine:
        wait_until(engine.ended)
        assert engine.tail() == ["loading", "out of luck"]
        assert str(engine.error("before it answered")) == (
            "engine: ended with status 3 before it answered (out of luck). Its last lines are above."
        )
    several = (
        "print('RuntimeError: no head_dim=16'); print('INFO: DeprecationError: no'); print('EngineDead: see above')"
    )
    with child(f"print('WARNING OSError: soon'); {several}") as engine:
        wait_until(engine.ended)
        engine.tail()
        assert engine.cause() == "RuntimeError: no head_dim=16"
    with child("import os; os.kill(os.getpid(), 9)") as engine:
        wait_until(engine.ended)
        assert engine.how_it_ended().startswith("was killed by SIGKILL")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
inner = subprocess.Popen([sys.executable, "-c", deaf])
print(inner.pid, flush=True)
time.sleep(60)
"""


def test_stopping_reaches_what_the_engine_started_and_what_does_not_listen(tmp_path: Path) -> None:
    with child(STUBBORN, log=tmp_path / "log.txt") as engine:
        wait_until(lambda: bool(engine.tail()))
        inner = int(engine.tail()[0])
        assert not gone(inner)
        engine.stop(0.1)
        wait_until(lambda: gone(inner) and gone(engine.pid))
    assert (tmp_path / "log.txt").read_text().strip() == str(inner)


def test_an_engine_ends_when_halfbyte_is_killed() -> None:
    program = (
        "import os, sys\nfrom halfbyte.serving.child import Child\n"
        "lasting = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "c = Child(name='e', python=sys.executable, arguments=['-c', lasting], environment=dict(os.environ))\n"
        "while not c.tail(): pass\n"
        "print(c.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    with child(program) as outer:
        wait_until(outer.ended)
        wait_until(lambda: gone(int(outer.tail()[-1])))


# Figures of a benchmark


def test_figures_of_a_level_are_the_equations_of_the_module() -> None:
    answers = [bench._Answer(0.0, 0.5, 1.5, 11, 20), bench._Answer(1.0, 2.0, 4.0, 11, 20)]
    level = bench.level_of(2, answers, ["lost"])
    assert (level.requests, level.errors, level.tokens, level.seconds) == (3, 1, 22, 4.0)
    assert level.tokens_per_s == 5.5
    assert level.first_token_s == 0.75
    assert level.between_tokens_s == 0.15
    assert level.between_tokens_p95_s == 0.2
    assert level.first_error == "lost"


def test_percentiles_are_nearest_ranks() -> None:
    values = list(range(1, 101))
    assert [bench.percentile(values, p) for p in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert bench.percentile([3.0], 0.95) == 3.0


def test_prompts_differ_from_their_start() -> None:
    prompts = bench.Prompts(40)
    said = [prompts.next() for _ in range(5)]
    assert len({p.split()[0] for p in said}) == 5
    assert {len(p.split()) for p in said} == {42}


def test_memory_of_a_tree_counts_what_it_started() -> None:
    program = (
        "import subprocess, sys\n"
        "hold = bytearray(b'x') * 40_000_000\n"
        "more = \"h = bytearray(b'x') * 60_000_000; print('held', flush=True); input()\"\n"
        "c = subprocess.Popen([sys.executable, '-c', more])\n"
        "c.wait()\n"
    )
    with child(program) as engine:
        wait_until(lambda: "held" in engine.tail())
        assert 100_000_000 < bench.tree_bytes(engine.pid) < 200_000_000

"""``halfbyte serve`` with each real engine, asked by the real ``openai`` package.

Tiny models with random weights: what is tested is the service, not what is said. ``make test-serve`` runs these.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

import halfbyte
import tiny
from conftest import Models
from served import NO_VLLM, Server, alive, group, server, vllm_python

pytestmark = pytest.mark.serve

KEY = "secret-of-the-test"
SCHEMES = {"llamacpp": "W4A16", "transformers": "W4A16", "vllm": "W8A8"}
HELLO: list[Any] = [{"role": "user", "content": "The ferry leaves"}]
CUT = "\ufffd"
VLLM_TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
SEEN = frozenset({"stop", "length"})


@pytest.fixture(scope="module", params=["llamacpp", "transformers", "vllm"])
def running(
    request: pytest.FixtureRequest, tiny_model: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    engine = request.param
    environment = {"HALFBYTE_API_KEY": KEY}
    if engine == "vllm":
        if vllm_python() is None:
            pytest.skip(NO_VLLM)
        environment |= {"HALFBYTE_VLLM_PYTHON": str(vllm_python()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    folder = tmp_path_factory.mktemp(engine)
    out = folder / "tiny"
    # vLLM's attention on CPUs wants heads of at least 32.
    source = tiny_model("llama", **tiny.WIDE) if engine == "vllm" else tiny_model("llama")
    halfbyte.quantize(source, out, scheme=SCHEMES[engine], group_size=None if engine == "vllm" else 32, method="rtn")
    flags = {
        "llamacpp": ["--", "--threads", "1"],
        "transformers": ["--", "--threads", "1"],
        "vllm": ["--", *VLLM_TOOLS],
    }[engine]
    with server(folder, "--engine", engine, "--ui", out, *flags, environment=environment) as found:
        yield found


@pytest.fixture
def client(running: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=running.record["url"], api_key=KEY, max_retries=0, timeout=120) as asking:
        yield asking


def test_it_says_what_runs(running: Server, client: OpenAI) -> None:
    said = running.out.read_text()
    assert f"curl {running.record['url']}/chat/completions" in said
    assert "Authorization: Bearer $HALFBYTE_API_KEY" in said
    assert KEY not in said + running.errors.read_text()
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "halfbyte"
    assert requests.get(running.url + "/health", timeout=60).json() == {"status": "ok", "model": "tiny"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_waits_for_requests_has_given_torch_back(running: Server) -> None:
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "python" in maps
    assert "libtorch" not in maps


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0)
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in SEEN
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_gives_the_same_and_ends_in_done(running: Server, client: OpenAI, usage: bool) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**body).choices[0].message.content  # type: ignore[call-overload]
    body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    headers = {"Authorization": f"Bearer {KEY}"}
    with requests.post(
        running.record["url"] + "/chat/completions", json=body, headers=headers, stream=True, timeout=120
    ) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == b"data: [DONE]"
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert said.rstrip(CUT) == whole.rstrip(CUT)  # of a character cut by the last token, engines make either
    counts = [c["usage"] for c in chunks if c.get("usage")]
    assert len(counts) == usage
    ends = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert ends[-1] in SEEN
    if usage:
        assert counts[0]["total_tokens"] == counts[0]["prompt_tokens"] + counts[0]["completion_tokens"]


def test_the_openai_package_reads_the_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 5


def test_text_is_continued_at_once_and_as_a_stream(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="The ferry", max_tokens=5, temperature=0)
    pieces = client.completions.create(model="tiny", prompt="The ferry", max_tokens=5, temperature=0, stream=True)
    said = "".join(p.choices[0].text for p in pieces if p.choices)
    assert said.rstrip(CUT) == whole.choices[0].text.rstrip(CUT)


def test_a_seed_is_kept_to(running: Server, client: OpenAI) -> None:
    """With llama.cpp: whatever was asked before, since its prompt cache is off."""
    fresh = {"cache_prompt": False} if running.record["engine"] == "llamacpp" else {}

    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=24, temperature=1.5, seed=seed, top_p=0.95, extra_body=fresh
        )
        return answer.choices[0].message.content

    first = [say(seed) for seed in range(4)]
    assert len(set(first)) > 1
    for _ in range(3):
        assert [say(seed) for seed in range(4)] == first


def test_a_tool_is_called(running: Server, client: OpenAI) -> None:
    """A call that is demanded comes as one; transformers says that it has none."""
    parameters = {"type": "object", "properties": {"bell": {"enum": ["church", "ferry"]}}, "required": ["bell"]}
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 100}
    body["tools"] = [{"type": "function", "function": {"name": "ring", "parameters": parameters}}]
    body["tool_choice"] = {"type": "function", "function": {"name": "ring"}}
    if running.record["engine"] == "transformers":
        assert refusal(client, **body).code == "unsupported"
    elif running.record["engine"] == "vllm":
        (call,) = client.chat.completions.create(**body).choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "ring"  # what random weights put into it does not matter
    else:
        pytest.skip("llama.cpp does not force a call on a model whose template knows none")


def refusal(client: OpenAI, **changes: Any) -> openai.APIStatusError:
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4} | changes
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**body)
    error = caught.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return caught.value


def test_wrong_requests_get_the_apis_errors_and_the_server_goes_on(running: Server, client: OpenAI) -> None:
    long = [{"role": "user", "content": "ferry " * 3000}]
    too_long = refusal(client, messages=long)
    assert isinstance(too_long, openai.BadRequestError)
    assert too_long.code == "context_length_exceeded"
    too_long = refusal(client, messages=long, stream=True)
    assert too_long.code == "context_length_exceeded"
    unknown = refusal(client, model="gpt-4")
    assert isinstance(unknown, openai.NotFoundError)
    assert unknown.code == "model_not_found"
    for changes in ({"messages": []}, {"temperature": "hot"}, {"max_tokens": "many"}, {"messages": [{"content": "x"}]}):
        assert isinstance(refusal(client, **changes), openai.BadRequestError), changes
    with OpenAI(base_url=running.record["url"], api_key="wrong", max_retries=0) as stranger:
        assert isinstance(refusal(stranger), openai.AuthenticationError)
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert 400 <= refusal(client, messages=[{"role": "user", "content": picture}]).status_code < 500
    test_a_chat_is_answered(client)


@pytest.mark.parametrize("raw", [b"{bad", b"[]", b"\xff\xfe", b"", b"[" * 100_000])
def test_bad_json_gets_the_apis_error(running: Server, raw: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = requests.post(running.record["url"] + "/chat/completions", data=raw, headers=headers, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_json"


def test_metrics_are_prometheus_and_count(running: Server, client: OpenAI) -> None:
    def count() -> dict[str, float]:
        text = requests.get(running.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=60).text
        families = list(text_string_to_metric_families(text))
        engines = {"llamacpp": "llamacpp:", "vllm": "vllm:", "transformers": "transformers_"}
        assert any(f.name.startswith(engines[running.record["engine"]]) for f in families)
        return {
            s.name + s.labels.get("status", ""): s.value
            for f in families
            for s in f.samples
            if f.name in ("halfbyte_requests", "halfbyte_engine_up")
            and s.labels.get("path") in ("/v1/chat/completions", None)
        }

    before = count()
    assert before["halfbyte_engine_up"] == 1
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    refusal(client, model="another")
    after = count()
    for status in ("200", "404"):
        name = f"halfbyte_requests_total{status}"
        assert after[name] - before.get(name, 0) == 1


def test_eight_clients_at_once(client: OpenAI) -> None:
    said: list[int] = []

    def ask(number: int) -> None:
        for turn in range(2):
            messages: list[Any] = [{"role": "user", "content": f"Number {number}, turn {turn}"}]
            stream = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
            usages = [c.usage for c in stream if c.usage]
            said.append(usages[-1].completion_tokens)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 16
    assert all(said)


def test_a_client_that_goes_away_frees_its_place(running: Server, client: OpenAI) -> None:
    """Answers that nobody reads any more must not keep the places of others."""
    for _ in range(6):
        stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 60
    while True:
        text = requests.get(running.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=60).text
        running_now = next(
            s.value
            for f in text_string_to_metric_families(text)
            for s in f.samples
            if s.name == "halfbyte_requests_running"
        )
        if running_now == 0:
            break
        assert time.monotonic() < end
        time.sleep(0.2)
    test_a_chat_is_answered(client)


def test_z_a_signal_lets_answers_end_and_leaves_nothing_behind(running: Server, client: OpenAI) -> None:
    """Last, because the server is gone then (hence its name)."""
    pids = group(running.record["engine_pid"])
    assert running.record["engine_pid"] in pids
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60, stream=True)
    pieces = iter(stream)
    next(pieces)
    running.process.send_signal(signal.SIGTERM)
    ends = [c.choices[0].finish_reason for c in pieces if c.choices]
    assert ends[-1] in SEEN
    assert running.process.wait(60) == 0
    assert not [pid for pid in pids if alive(pid)]
    assert not Path(running.out).with_name("ready.json").exists()

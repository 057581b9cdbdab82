"""Triton's own server on what ``halfbyte deploy triton`` writes, asked by Triton's own client.

The model is tiny, random and quantised, so that what it says means nothing, but is known: what transformers generates
from the dequantised weights. One server runs a model on the engine transformers, and the same on llama.cpp.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import halfbyte
import tiny
import triton_server as triton
from halfbyte.deployment.options import Wishes

pytestmark = [pytest.mark.engine, pytest.mark.skipif(triton.python() is None, reason=triton.MISSING)]

CONTEXT, NEW = 8192, 12
CHAT = [{"role": "user", "content": "How deep is the water?"}]
PROMPT = "There are forty seats below"
UNICODE = "나룻배는 매일 아침 떠난다 — naïve 🚢 \u0627\u0644"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


@dataclass
class Served:
    """The server, the checkpoint that it serves, and what transformers makes of it."""

    server: triton.Triton
    folder: Path
    model: Any
    tokenizer: Any

    def expected(self, text: str, *, add_special_tokens: bool = True, **settings: Any) -> str:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt").input_ids
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "max_new_tokens": NEW}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options | settings)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("triton")
    source = tiny.build(root / "source", "llama", max_position_embeddings=CONTEXT)
    text = root / "ferry.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    options: dict[str, Any] = {"group_size": 32, "calibration": f"text:{text}", "samples": 4, "seq_len": 40}
    halfbyte.quantize(source, root / "small", effort="low", device="cpu", **options)
    wishes: dict[str, Any] = {"max_batch": 4, "trace": True}
    halfbyte.deploy("triton", root / "small", root / "out", name="small", wishes=Wishes(gpus=0, **wishes))
    halfbyte.deploy(
        "triton",
        root / "small",
        root / "cpp",
        name="cpp",
        wishes=Wishes(engine="llamacpp", max_model_len=512, gpus=1, **wishes),
    )
    repository = root / "out" / "model_repository"
    for folder in (root / "cpp" / "model_repository").iterdir():
        folder.rename(repository / folder.name)
    server = triton.Triton(repository, root / "triton.log")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "small")
    # as compressed-tensors unpacks it, which rounds products to bfloat16
    model = tiny.load(root / "small", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    yield Served(server, root / "small", model, tokenizer)
    assert server.stop() == 0, server.log[-4000:]


WAYS = pytest.mark.parametrize("protocol", ["http", "grpc"])


@WAYS
def test_plain_text(served: Served, protocol: str) -> None:
    answer = served.server.call(protocol, "small", text_input=PROMPT, **GREEDY)
    assert answer == {"responses": [[served.expected(PROMPT)]], "error": None}


@WAYS
def test_a_conversation_goes_through_the_chat_template(served: Served, protocol: str) -> None:
    rendered = served.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    wanted = served.expected(rendered, add_special_tokens=False)
    assert wanted != served.expected(json.dumps(CHAT))
    answer = served.server.call(protocol, "small", text_input=json.dumps(CHAT), **GREEDY)
    assert answer["responses"] == [[wanted]]
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert served.server.call(protocol, "small", text_input=json.dumps(parts), **GREEDY)["responses"] == [[wanted]]


@pytest.mark.parametrize("text", ["42", '{"role": "user"}', "[1, 2]", "null", '"quoted"', "[]"])
def test_other_json_is_plain_text(served: Served, text: str) -> None:
    assert served.server.call("http", "small", text_input=text, **GREEDY)["responses"] == [[served.expected(text)]]


def test_generate_and_generate_stream(served: Served) -> None:
    wanted = served.expected(PROMPT)
    status, answer = served.server.post("small", "generate", text_input=PROMPT, **GREEDY)
    assert (status, answer[0]["text_output"]) == (200, wanted)
    status, events = served.server.post("small_stream", "generate_stream", text_input=PROMPT, **GREEDY)
    assert status == 200
    assert len(events) > 3
    assert "".join(e["text_output"] for e in events) == wanted
    status, events = served.server.post("small", "generate_stream", text_input=PROMPT, **GREEDY)
    assert (status, [e["text_output"] for e in events]) == (200, [wanted])


def test_grpc_streams_token_by_token(served: Served) -> None:
    answer = served.server.call("stream", "small_stream", text_input=PROMPT, **GREEDY)
    assert len(answer["responses"]) > 3
    assert "".join(piece for (piece,) in answer["responses"]) == served.expected(PROMPT)
    whole = served.server.call("stream", "small_stream", text_input=PROMPT, stream=False, **GREEDY)
    assert whole["responses"] == [[served.expected(PROMPT)]]


def test_the_model_that_answers_in_one_piece_says_where_streams_are(served: Served) -> None:
    answer = served.server.call("http", "small", text_input=PROMPT, stream=True, **GREEDY)
    assert answer["error"] == "small: answers in one piece; ask small_stream where stream is to be true"
    assert served.server.call("http", "small", text_input=PROMPT, stream=False, **GREEDY)["error"] is None


@WAYS
def test_lengths(served: Served, protocol: str) -> None:
    ids = served.tokenizer(PROMPT).input_ids
    three = served.expected(PROMPT, max_new_tokens=3)
    asked: dict[str, Any] = {"text_input": PROMPT, "do_sample": False}
    assert served.server.call(protocol, "small", max_new_tokens=3, **asked)["responses"] == [[three]]
    assert served.server.call(protocol, "small", max_length=len(ids) + 3, **asked)["responses"] == [[three]]


@WAYS
def test_drawing(served: Served, protocol: str) -> None:
    def ask(**settings: Any) -> str:
        answer = served.server.call(protocol, "small", text_input=PROMPT, max_new_tokens=NEW, **settings)
        assert answer["error"] is None, answer
        return str(answer["responses"][0][0])

    greedy = served.expected(PROMPT)
    drawn = {ask(do_sample=True, seed=s) for s in range(4)}
    assert len(drawn) > 1
    assert ask(do_sample=True, seed=7) == ask(do_sample=True, seed=7)
    # generation_config.json of the checkpoint: do_sample, temperature 0.7, top_k 20
    assert ask(seed=7) == ask(do_sample=True, temperature=0.7, top_k=20, seed=7)
    assert ask(temperature=1.9, seed=7) != ask(temperature=0.2, seed=7)
    assert ask(top_k=1) == greedy
    assert ask(top_p=1e-6) == greedy
    assert ask(temperature=0.0) == greedy


@WAYS
def test_repetition_penalty(served: Served, protocol: str) -> None:
    wanted = served.expected(PROMPT, repetition_penalty=1.7)
    assert wanted != served.expected(PROMPT)
    asked = {"text_input": PROMPT, "repetition_penalty": 1.7, **GREEDY}
    assert served.server.call(protocol, "small", **asked)["responses"] == [[wanted]]


@pytest.mark.parametrize("model", ["small", "small_stream"])
def test_stop(served: Served, model: str) -> None:
    wanted = served.expected(PROMPT)
    stop = wanted[4:7]
    asked = {"text_input": PROMPT, "stop": [stop, "never there"], **GREEDY}
    answer = served.server.call("stream", model, **asked)
    assert "".join(piece for (piece,) in answer["responses"]) == wanted[: wanted.find(stop)]


def test_several_texts_are_a_batch(served: Served) -> None:
    texts = [PROMPT, "A", tiny.TEXT[:300], json.dumps(CHAT)]
    alone = [served.server.call("http", "small", text_input=t, **GREEDY)["responses"][0][0] for t in texts]
    assert served.server.call("http", "small", text_input=texts, **GREEDY)["responses"] == [alone]
    pieces = served.server.call("stream", "small_stream", text_input=texts, **GREEDY)["responses"]
    assert ["".join(p[i] for p in pieces) for i in range(len(texts))] == alone


BAD = {
    "max_new_tokens is 0, must be at least 1": {"max_new_tokens": 0},
    "max_length is -3, must be at least 1": {"max_length": -3},
    "temperature is -0.5, must be": {"temperature": -0.5},
    "top_k is -1, must be": {"top_k": -1},
    "top_p is 1.5, must be above 0 and at most 1": {"top_p": 1.5},
    "top_p is 0.0, must be": {"top_p": 0.0},
    "repetition_penalty is 0.0, must be": {"repetition_penalty": 0.0},
    "seed is -1, must be 0 or more": {"seed": -1},
    "stop is ('',), must be": {"stop": [""]},
    "both given": {"max_new_tokens": 3, "max_length": 30},
    "max_length 2 leaves no room": {"max_length": 2},
    f"exceed the {CONTEXT} that the model reads": {"max_new_tokens": CONTEXT},
    "message 1 is no object": {"text_input": '[{"role": "user", "content": "a"}, {"content": "b"}]'},
    'message 0 has no "content"': {"text_input": '[{"role": "user"}]'},
    "text_input is not UTF-8 at byte 1": {"text_input": {"base64": "Yf8="}},
}


@WAYS
@pytest.mark.parametrize("words", BAD)
def test_bad_values(served: Served, protocol: str, words: str) -> None:
    answer = served.server.call(protocol, "small", **{"text_input": PROMPT} | BAD[words])
    assert answer["responses"] == []
    assert answer["error"].startswith("small: ")
    assert words in answer["error"]


def test_all_bad_values_are_named_at_once(served: Served) -> None:
    status, answer = served.server.post("small", "generate", text_input=PROMPT, top_p=2.0, top_k=-5, temperature=-1.0)
    assert status >= 400
    assert all(word in answer[0]["error"] for word in ("top_p", "top_k", "temperature"))
    status, events = served.server.post("small_stream", "generate_stream", text_input=PROMPT, top_p=2.0)
    assert "top_p is 2.0" in events[0]["error"]


def test_triton_refuses_other_types(served: Served) -> None:
    answer = served.server.call("http", "small", text_input=PROMPT, do_sample={"type": "INT32", "value": [1]})
    assert "do_sample" in answer["error"]


@pytest.mark.parametrize("model", ["small", "small_stream"])
def test_missing_text(served: Served, model: str) -> None:
    answer = served.server.call("stream", model, max_new_tokens=3)
    assert answer["error"] is not None
    assert "text_input" in answer["error"]


@WAYS
def test_unicode(served: Served, protocol: str) -> None:
    wanted = served.expected(UNICODE, max_new_tokens=40)
    asked = {"text_input": UNICODE, "do_sample": False, "max_new_tokens": 40}
    assert served.server.call(protocol, "small", **asked)["responses"] == [[wanted]]
    streamed = served.server.call("stream", "small_stream", **asked)["responses"]
    assert "".join(piece for (piece,) in streamed) == wanted


def test_a_prompt_of_4096_tokens(served: Served) -> None:
    ids = (served.tokenizer(tiny.TEXT).input_ids * 20)[1:4096]
    text = served.tokenizer.decode(ids)
    assert len(served.tokenizer(text).input_ids) >= 4000
    answer = served.server.call("grpc", "small", text_input=text, do_sample=False, max_new_tokens=4)
    assert answer["responses"] == [[served.expected(text, max_new_tokens=4)]]


def test_a_prompt_longer_than_the_context(served: Served) -> None:
    answer = served.server.call("grpc", "small", text_input=tiny.TEXT * 40)
    assert f"the model reads {CONTEXT} at most; shorten it" in answer["error"]


def test_eight_clients_at_once(served: Served) -> None:
    texts = [f"{PROMPT}, number {i}" + "." * i for i in range(8)]
    wanted = [served.expected(t) for t in texts]
    for protocol in ("http", "grpc"):
        calls = [{"protocol": protocol, "model": "small", "inputs": {"text_input": t, **GREEDY}} for t in texts]
        answers = served.server.calls(calls, at_once=True)
        assert [a["responses"] for a in answers] == [[[w]] for w in wanted]
    mixed = [
        {
            "protocol": "stream",
            "model": "small_stream",
            "inputs": {"text_input": t, "do_sample": False, "max_new_tokens": 3 + i, "repetition_penalty": 1.0 + i % 2},
        }
        for i, t in enumerate(texts)
    ]
    for i, answer in enumerate(served.server.calls(mixed, at_once=True)):
        settings = {"max_new_tokens": 3 + i, "repetition_penalty": 1.0 + i % 2}
        assert "".join(p for (p,) in answer["responses"]) == served.expected(texts[i], **settings)


def test_trace(served: Served) -> None:
    marked = "A visitor once asked, and was traced"
    served.server.call("http", "small", text_input=marked, **GREEDY)
    lines = [line for line in served.server.log.splitlines() if "trace {" in line and marked in line]
    assert len(lines) == 1
    for part in ("prompt_tokens", "text_output", "seconds", "max_new_tokens"):
        assert part in lines[0]


@pytest.mark.parametrize("model", ["small_stream", "cpp_stream"])
def test_a_caller_that_leaves_is_not_generated_for(served: Served, model: str) -> None:
    marked = f"The passengers of {model} leave"
    limit = 400 if model == "cpp_stream" else 4000
    body = json.dumps({"text_input": marked, "max_new_tokens": limit, "do_sample": True, "temperature": 1.9})
    connection = http.client.HTTPConnection(served.server.http)
    connection.request("POST", f"/v2/models/{model}/generate_stream", body)
    assert connection.getresponse().read(20)
    connection.close()
    until = time.monotonic() + 60
    while not (ended := re.findall(rf"{re.escape(marked)}.*ended\W+(\w+)", served.server.log)):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert ended == ["cancelled"]


def test_llamacpp_inside(served: Served) -> None:
    """The same inputs on another engine: answers stream, stop and fail alike."""
    status, answer = served.server.post("cpp", "generate", text_input=PROMPT, **GREEDY)
    assert status == 200, answer
    whole = answer[0]["text_output"]
    assert whole
    pieces = served.server.call("stream", "cpp_stream", text_input=PROMPT, **GREEDY)["responses"]
    assert len(pieces) > 3
    assert "".join(p for (p,) in pieces) == whole
    two = served.server.call("http", "cpp", text_input=[PROMPT, json.dumps(CHAT)], **GREEDY)["responses"]
    (alone,) = served.server.call("http", "cpp", text_input=json.dumps(CHAT), **GREEDY)["responses"]
    assert two[0] == [whole, *alone]
    drawn = {"text_input": PROMPT, "do_sample": True, "temperature": 1.5, "seed": 5, "max_new_tokens": NEW}
    assert served.server.call("grpc", "cpp", **drawn) == served.server.call("grpc", "cpp", **drawn)
    assert "top_p is 2.0" in served.server.call("grpc", "cpp", text_input=PROMPT, top_p=2.0)["error"]
    assert "512 at most" in served.server.call("grpc", "cpp", text_input=tiny.TEXT * 4)["error"]

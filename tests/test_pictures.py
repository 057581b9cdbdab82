"""Picture files: what they become, and that bad ones end in one line that names the row."""

from __future__ import annotations

import struct
import sys
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halfbyte.calibration.pictures import MAX_FILE_BYTES, decode, read_picture
from halfbyte.calibration.pixtral import PixtralInPillow
from halfbyte.calibration.processing import load_processor
from halfbyte.errors import CalibrationError
from pictures import encoded, picture, save_processor

WHERE = "rows.jsonl, line 7"


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    image = decode(data, WHERE)
    assert image.mode == "RGB"
    return np.asarray(image)


# What pictures become: every expectation is a literal


def test_greys_of_16_bits_are_scaled_and_not_cut_off() -> None:
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert decoded(encoded(deep))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decoded(encoded(deep, "TIFF"))[0, :, 2].tolist() == [0, 1, 128, 255]
    plain = Image.fromarray(np.array([[0, 77, 255]], dtype=np.uint8))
    assert decoded(encoded(plain))[0].tolist() == [[0, 0, 0], [77, 77, 77], [255, 255, 255]]
    shallow = Image.fromarray(np.array([[0, 77, 255]], dtype=np.int32))
    assert decoded(encoded(shallow, "TIFF"))[0, :, 0].tolist() == [0, 77, 255]


def test_transparency_lies_over_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert decoded(encoded(Image.fromarray(pixels)))[0].tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]
    grey = Image.fromarray(np.array([[[9, 255], [9, 0]]], dtype=np.uint8))
    assert grey.mode == "LA"
    assert decoded(encoded(grey))[0].tolist() == [[9, 9, 9], [255, 255, 255]]


def test_palettes_with_and_without_a_transparent_colour() -> None:
    made = Image.new("P", (2, 1))
    made.putpalette([1, 2, 3, 200, 100, 50])
    made.putpixel((1, 0), 1)
    assert decoded(encoded(made))[0].tolist() == [[1, 2, 3], [200, 100, 50]]
    assert decoded(encoded(made, transparency=0))[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_one_bit_and_cmyk() -> None:
    assert decoded(encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(decoded(encoded(inks, "TIFF"))[0, 0].astype(int) - [0, 255, 255]).max() == 0
    assert np.abs(decoded(encoded(inks, "JPEG", quality=100))[8, 8].astype(int) - [0, 255, 255]).max() <= 4


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (29, 39)), (6, (0, 29)), (8, (39, 0))])
def test_orientation_follows_exif(orientation: int, corner: tuple[int, int]) -> None:
    """A white picture, 40 wide and 30 high, with a black corner at the upper left as it is stored."""
    image = Image.new("RGB", (40, 30), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = decoded(encoded(image, "JPEG", exif=exif, quality=95))
    assert made.shape[:2] == ((30, 40) if orientation in (1, 3) else (40, 30))
    assert made[corner].max() < 60
    assert made[0, 0].max() < 60 or made[0, 0].min() > 200


def test_a_broken_exif_block_is_no_reason_to_stop() -> None:
    data = encoded(picture(20, 10), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert decoded(data).shape == (10, 20, 3)


def test_of_an_animation_the_first_picture_counts() -> None:
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "blue", "green")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data)[2, 3].tolist() == [255, 0, 0]
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decoded(webp)[2, 3].tolist() == [255, 0, 0]


# What is refused


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def floats() -> bytes:
    return encoded(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no picture that can be read: UnidentifiedImageError"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture that can be read"),
        (POSTSCRIPT, "is no picture that can be read: UnidentifiedImageError"),
        (encoded(picture(200, 100), "PNG")[:-200], "is no picture that can be read"),
        (encoded(picture(200, 100), "JPEG")[:-300], "is no picture that can be read: OSError: .*truncated"),
        (encoded(picture(200, 100), "JPEG")[:100], "is no picture that can be read"),
        (png(0, 5), "has no pixels|is no picture that can be read"),
        (png(10_000, 10_001), "has more than 100 million pixels. Scale it down"),
        (png(20_000, 20_000), "has more than 100 million pixels. Scale it down"),
        (png(2_000_000_000, 2_000_000_000), "has more than 100 million pixels. Scale it down"),
        (png(9000, 9000), "is no picture that can be read"),
        (floats(), "has floating-point pixels"),
    ],
    ids=lambda v: "" if isinstance(v, bytes) else v[:30],
)
def test_bad_pictures_are_one_line_that_names_the_row(data: bytes, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CalibrationError, match=message) as error:
            decode(data, WHERE)
    assert str(error.value).startswith(WHERE)
    assert "\n" not in str(error.value)


def test_nothing_but_files_of_bearable_size_is_read(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as f:
        f.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(CalibrationError, match=r"line 7: the picture .*large.png has 100 MB"):
        read_picture("large.png", tmp_path, WHERE)
    for reference in (".", "/dev/zero", "missing.png", "file:///nowhere/p.png"):
        with pytest.raises(CalibrationError, match="line 7: there is no picture file"):
            read_picture(reference, tmp_path, WHERE)
    (tmp_path / "a b.png").write_bytes(b"x")
    assert read_picture(f"file://{tmp_path}/a%20b.png", None, WHERE) == b"x"
    assert read_picture({"bytes": None, "path": "a b.png"}, tmp_path, WHERE) == b"x"
    with pytest.raises(CalibrationError, match="a picture is given as NoneType"):
        read_picture({"bytes": None, "path": None}, tmp_path, WHERE)


# Pixtral's processor


def test_pixtral_in_pillow_equals_transformers_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latter can be imported once its one import that needs torchvision has a stand-in, which it does not use."""
    stand_in: Any = types.ModuleType("transformers.models.pixtral.image_processing_pixtral")
    stand_in.get_resize_output_image_size = None
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, "transformers.models.pixtral.processing_pixtral", raising=False)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    save_processor(tmp_path, "mistral3")
    (tmp_path / "config.json").write_text('{"model_type": "mistral3", "vision_config": {}}')
    ours = load_processor(tmp_path)
    assert isinstance(ours, PixtralInPillow)
    options, _ = PixtralProcessor.get_processor_dict(tmp_path)
    theirs = PixtralProcessor.from_args_and_dict([ours.image_processor, ours.tokenizer], options)
    assert (ours.chat_template, ours.image_token) == (theirs.chat_template, theirs.image_token)
    for sizes in ([(40, 30)], [(300, 20), (17, 112)], [(1, 1), (28, 28), (29, 57)]):
        images = [[picture(*size) for size in sizes]]
        text = ["<s>" + " and ".join("[IMG]" for _ in sizes)]
        made, expected = (p(text=text, images=images, add_special_tokens=False) for p in (ours, theirs))
        assert made.keys() == expected.keys()
        assert all(bool((made[k] == expected[k]).all()) for k in made)

"""Picture files: found, limited in size, and decoded by Pillow into plain RGB.

Only raster formats are opened (Pillow would start Ghostscript for EPS), sizes are checked before pixels are made, and
a file that ends early is an error. Orientation follows EXIF; transparency is laid over white, as vLLM does; 16-bit
greys are scaled to 8 bits instead of being cut off at 255; of animations and multi-page files the first picture counts.
Nothing is ever fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from halfbyte.calibration.tokenizing import first_line
from halfbyte.errors import CalibrationError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
MAX_PIXELS = 100_000_000  # 300 MB decoded
MAX_FILE_BYTES = 100_000_000
DEEP_GREYS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
SCALE_DOWN = "Scale it down, or leave it out."


def read_picture(reference: Any, base: Path | None, where: str) -> bytes:
    """The bytes of a picture file.

    Args:
        reference: a path, a ``file:`` or ``data:image/...;base64,`` URL, or a data set's ``{bytes, path}``.
        base: the folder that relative paths start at; ``None`` where there is none.
        where: the row, for messages.

    Raises:
        CalibrationError: it is not there, too large, or something else than a picture's whereabouts.
    """
    if isinstance(reference, dict):
        data, path = reference.get("bytes"), reference.get("path")
        if isinstance(data, bytes):
            return data
        reference = path
    if isinstance(reference, bytes):
        return reference
    if not isinstance(reference, str) or not reference:
        raise CalibrationError(
            f"a picture is given as {type(reference).__name__}", where=where, remedy="Give the path of a picture file."
        )
    if reference.startswith("data:"):
        return _embedded(reference, where)
    if "://" in reference[:12]:
        return _read(_file_of_url(reference, where), where)
    path = Path(reference)
    return _read(path if path.is_absolute() or base is None else base / path, where)


def _embedded(url: str, where: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.startswith("data:image/") or not header.endswith(";base64"):
        raise CalibrationError(
            f"an embedded picture begins with {header[:40]!r}",
            where=where,
            remedy="Write it as data:image/png;base64,...",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as e:
        raise CalibrationError(f"an embedded picture is not valid base64: {first_line(e)}", where=where) from None


def _file_of_url(url: str, where: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise CalibrationError(
            f"a picture lies on a network: {url[:80]}",
            where=where,
            why="nothing is fetched while a model is calibrated",
            remedy="Download it first and give its path.",
        )
    return Path(unquote(parts.path))


def _read(path: Path, where: str) -> bytes:
    if not path.is_file():
        raise CalibrationError(f"there is no picture file {path}", where=where)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CalibrationError(f"the picture {path} has {size / 1e6:.0f} MB", where=where, remedy=SCALE_DOWN)
        return path.read_bytes()
    except OSError as e:
        raise CalibrationError(f"the picture {path} cannot be read: {e.strerror}", where=where) from None


def decode(data: bytes, where: str) -> Any:
    """An RGB ``PIL.Image`` of a picture file's bytes; Pillow must be there.

    Raises:
        CalibrationError: no picture of a known format, cut short, too large, without pixels, or of floats.
    """
    from PIL import Image

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit on pixels warns; ours is below
            image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if not image.width or not image.height:
                raise CalibrationError("has no pixels", where=where, remedy="Leave it out.")
            image.load()
            return _plain(image, where)
    except CalibrationError:
        raise
    except Image.DecompressionBombError:  # Pillow's own, from twice its own limit on
        raise CalibrationError(
            f"has more than {MAX_PIXELS / 1e6:.0f} million pixels", where=where, remedy=SCALE_DOWN
        ) from None
    except Exception as e:  # decoders raise errors of many kinds on bad bytes
        raise CalibrationError(
            f"is no picture that can be read: {type(e).__name__}: {first_line(e)}",
            where=where,
            remedy=f"Repair it or leave it out; {', '.join(FORMATS)} files are read.",
        ) from None


def _plain(image: Any, where: str) -> Any:
    """Upright, opaque, 8 bits a channel."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about orientation, and cameras write many
        image = image.copy()
    if image.mode == "F":
        raise CalibrationError(
            "has floating-point pixels, whose range is not known", where=where, remedy="Convert it to 8 or 16 bits."
        )
    if image.mode in DEEP_GREYS:
        image = image.convert("I")
        shift = 256.0 if image.getextrema()[1] > 255 else 1.0
        image = image.point(lambda v: v / shift).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")

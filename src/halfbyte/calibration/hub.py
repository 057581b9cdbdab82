"""``hf:DATASET[:CONFIG][:SPLIT]``: rows of a data set from the hub or of a local data set folder.

A set with columns of pictures is read as ``vlm:`` reads its rows. Rows are streamed, so a large set is not downloaded
whole, and drawn through a shuffle buffer that the seed fixes. Data sets that need code of their own are refused by the
library (datasets >= 4 has no remote code; older versions get ``trust_remote_code`` left at its default, False).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.calibration.conversation import PICTURES, read_row
from halfbyte.calibration.processing import picture_problems
from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.rows import found_rows, tokenize_rows
from halfbyte.calibration.tokenizing import first_line
from halfbyte.calibration.vision import prepare
from halfbyte.errors import CalibrationError, HalfbyteError, MissingDependencyError, UsageError, raise_all
from halfbyte.records import read_json

DEFAULT_SPLIT = "train"
BUFFER_PER_SAMPLE = 16
PICTURED_BUFFER_PER_SAMPLE = 2  # rows in it hold their pictures


def dataset_rows(request: Request) -> Found:
    """``samples`` rows in an order that ``seed`` fixes.

    Raises:
        MissingDependencyError: the datasets library is not installed.
        CalibrationError: the data set cannot be loaded or has neither a ``text`` nor a ``messages`` column; or it has
            pictures, and the model takes none.
    """
    name, config, split = parse(request.argument)
    said = f"the data set {Path(name).name if Path(name).is_dir() else request.argument}"
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "reading data sets needs the datasets library",
            where=f"hf:{request.argument}",
            remedy="Install it with: pip install 'halfbyte[datasets]'.",
        ) from None
    try:
        rows = _open(datasets, name, config, split)
        pictured = _pictured(datasets, rows)
        buffer = (PICTURED_BUFFER_PER_SAMPLE if pictured else BUFFER_PER_SAMPLE) * request.samples
        if pictured:
            spec = f"hf:{request.argument}"
            raise_all(picture_problems(request.model_path, read_json(request.model_path / "config.json"), spec))
            rows = _undecoded(datasets, rows).shuffle(seed=request.seed, buffer_size=buffer)
            base = Path(name) if Path(name).is_dir() else None
            found = (read_row(row, base, where) for where, row in _numbered(rows, request.argument))
            return prepare(found, request, said)
        rows = rows.shuffle(seed=request.seed, buffer_size=buffer)
        sequences = tokenize_rows(_numbered(rows, request.argument), request)
    except HalfbyteError:
        raise
    except Exception as e:  # the library raises errors of many packages: network, parsing, hub
        raise CalibrationError(
            f"the data set cannot be loaded: {type(e).__name__}: {first_line(e)}",
            where=f"hf:{request.argument}",
            remedy="Check its name, config and split (hf:DATASET:CONFIG:SPLIT) and the network, or use text:FILE.",
        ) from None
    return found_rows(sequences, request, said)


def parse(argument: str) -> tuple[str, str | None, str]:
    """``DATASET[:CONFIG][:SPLIT]`` in parts; an empty part, as in ``name::test``, stands for the default."""
    name, *rest = argument.split(":")
    if not name or len(rest) > 2:
        raise UsageError(
            f"cannot be read as DATASET[:CONFIG][:SPLIT]: {argument!r}", where="--calibration hf:", remedy=_EXAMPLE
        )
    config = rest[0] or None if rest else None
    split = rest[1] or DEFAULT_SPLIT if len(rest) == 2 else DEFAULT_SPLIT
    return name, config, split


_EXAMPLE = "For example hf:neuralmagic/calibration:LLM:train, or hf:./folder::test for a local folder."


def _open(datasets: Any, name: str, config: str | None, split: str) -> Any:
    """An iterable of rows. A folder written by ``save_to_disk`` is opened as what it is."""
    folder = Path(name)
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(folder / split)).to_iterable_dataset()
    if (folder / "state.json").exists():
        return datasets.load_from_disk(name).to_iterable_dataset()
    return datasets.load_dataset(name, config, split=split, streaming=True)


def _pictured(datasets: Any, rows: Any) -> bool:
    """Whether rows have pictures: by the set's column types, or where it states none by the first row."""
    if rows.features is not None:
        return bool(_has_image(datasets, rows.features)) or any(name in rows.features for name in PICTURES[:2])
    first: Any = next(iter(rows), {})
    return any(first.get(name) for name in PICTURES)


def _has_image(datasets: Any, feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or any(_has_image(datasets, f) for f in _inner(feature))


def _inner(feature: Any) -> list[Any]:
    """What a column type is made of: fields of an object, or the type of a list's elements."""
    if isinstance(feature, dict):
        return list(feature.values())
    if isinstance(feature, list):
        return feature
    return [feature.feature] if hasattr(feature, "feature") else []  # the library has had several classes of lists


def _undecoded(datasets: Any, rows: Any) -> Any:
    """The same rows with pictures as ``{bytes, path}`` instead of decoded ones, whatever they are nested in."""
    if rows.features is None:
        return rows
    return rows.cast(datasets.Features({k: _as_files(datasets, f) for k, f in rows.features.items()}))


def _as_files(datasets: Any, feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {k: _as_files(datasets, f) for k, f in feature.items()}
    if isinstance(feature, list):
        return [_as_files(datasets, f) for f in feature]
    if hasattr(feature, "feature"):
        return replace(feature, feature=_as_files(datasets, feature.feature))
    return feature


def _numbered(rows: Any, argument: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"hf:{argument}, row {number}", dict(row)

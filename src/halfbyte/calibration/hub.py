"""``hf:DATASET[:CONFIG][:SPLIT]``: rows of a data set from the hub or of a local data set folder.

Rows are streamed, so a large set is not downloaded whole, and drawn through a shuffle buffer that the seed fixes.
Data sets that need code of their own are refused by the library (datasets >= 4 has no remote code; older versions
get ``trust_remote_code`` left at its default, False).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.calibration.request import Found, Request
from halfbyte.calibration.rows import found_rows, tokenize_rows
from halfbyte.calibration.tokenizing import first_line
from halfbyte.errors import CalibrationError, HalfbyteError, MissingDependencyError, UsageError

DEFAULT_SPLIT = "train"
BUFFER_PER_SAMPLE = 16


def dataset_rows(request: Request) -> Found:
    """``samples`` rows in an order that ``seed`` fixes.

    Raises:
        MissingDependencyError: the datasets library is not installed.
        CalibrationError: the data set cannot be loaded or has neither a ``text`` nor a ``messages`` column.
    """
    name, config, split = parse(request.argument)
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "reading data sets needs the datasets library",
            where=f"hf:{request.argument}",
            remedy="Install it with: pip install 'halfbyte[datasets]'.",
        ) from None
    try:
        rows = _open(datasets, name, config, split).shuffle(
            seed=request.seed, buffer_size=BUFFER_PER_SAMPLE * request.samples
        )
        sequences = tokenize_rows(_numbered(rows, request.argument), request)
    except HalfbyteError:
        raise
    except Exception as e:  # the library raises errors of many packages: network, parsing, hub
        raise CalibrationError(
            f"the data set cannot be loaded: {type(e).__name__}: {first_line(e)}",
            where=f"hf:{request.argument}",
            remedy="Check its name, config and split (hf:DATASET:CONFIG:SPLIT) and the network, or use text:FILE.",
        ) from None
    return found_rows(
        sequences, request, f"the data set {Path(name).name if Path(name).is_dir() else request.argument}"
    )


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


def _numbered(rows: Any, argument: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"hf:{argument}, row {number}", dict(row)

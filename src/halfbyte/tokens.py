"""Calibration samples on disk, so that a resumed run uses the very ones it was started with.

One safetensors file: ``token_ids`` of all samples in a row and their ``lengths``; the record as JSON in the metadata.
Where samples have pictures, ``pictures`` holds their files' bytes in a row, and the metadata what else belongs to them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.calibration import Calibration, Pictured, Processing
from halfbyte.records import CalibrationRecord, from_plain, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturedEntry:
    """A sample with pictures, less the pictures: ``sizes_bytes`` says how much of the file is each one's."""

    sample: int
    where: str
    text: str
    special: bool
    sizes_bytes: list[int]
    shapes: dict[str, list[int]]


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Write sequences, pictures and record to one safetensors file, atomically."""
    temporary = path.with_suffix(".tmp")
    lengths = torch.tensor([len(s) for s in calibration.sequences], dtype=torch.int64)
    tensors = {"lengths": lengths, "token_ids": torch.cat(calibration.sequences).to(torch.int64)}
    metadata = {"record": to_json(calibration.record)}
    if calibration.pictured:
        pictured = sorted(calibration.pictured.items())
        data = bytearray(b"".join(p for _, sample in pictured for p in sample.pictures))
        tensors["pictures"] = torch.frombuffer(data, dtype=torch.uint8)
        entries = [
            PicturedEntry(
                sample=i,
                where=s.where,
                text=s.text,
                special=s.special,
                sizes_bytes=[len(p) for p in s.pictures],
                shapes={name: list(shape) for name, shape in s.shapes},
            )
            for i, s in pictured
        ]
        metadata["pictured"] = "[" + ",".join(to_json(e) for e in entries) + "]"
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def load_calibration(path: Path, model_path: Path | None = None) -> Calibration:
    """Read back what :func:`save_calibration` wrote.

    ``model_path`` is the checkpoint's folder, whose processor prepares pictures; text does without.
    """
    with safe_open(path, framework="pt") as f:
        lengths, token_ids = f.get_tensor("lengths"), f.get_tensor("token_ids")
        metadata = f.metadata()
        record = from_plain(CalibrationRecord, json.loads(metadata["record"]))
        entries = from_plain(list[PicturedEntry], json.loads(metadata.get("pictured", "[]")))
        data = f.get_tensor("pictures").numpy().tobytes() if entries else b""
    pictured, start = {}, 0
    for entry in entries:
        pictures = []
        for size in entry.sizes_bytes:
            pictures.append(data[start : start + size])
            start += size
        pictured[entry.sample] = Pictured(
            where=entry.where,
            text=entry.text,
            special=entry.special,
            pictures=tuple(pictures),
            shapes=tuple((name, tuple(shape)) for name, shape in entry.shapes.items()),
        )
    return Calibration(
        record=record,
        sequences=[s.clone() for s in torch.split(token_ids, lengths.tolist())],
        pictured=pictured,
        processing=Processing(model_path) if pictured and model_path is not None else None,
    )

"""Calibration tokens on disk, so that a resumed run uses the very ones it was started with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.calibration import Calibration
from halfbyte.records import CalibrationRecord, from_plain, to_json


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Write sequences and record to one safetensors file, atomically."""
    temporary = path.with_suffix(".tmp")
    lengths = torch.tensor([len(s) for s in calibration.sequences], dtype=torch.int64)
    tensors = {"lengths": lengths, "token_ids": torch.cat(calibration.sequences).to(torch.int64)}
    save_file(tensors, temporary, metadata={"record": to_json(calibration.record)})
    os.replace(temporary, path)


def load_calibration(path: Path) -> Calibration:
    """Read back what :func:`save_calibration` wrote."""
    with safe_open(path, framework="pt") as f:
        lengths, token_ids = f.get_tensor("lengths"), f.get_tensor("token_ids")
        record = from_plain(CalibrationRecord, json.loads(f.metadata()["record"]))
    return Calibration(record=record, sequences=[s.clone() for s in torch.split(token_ids, lengths.tolist())])

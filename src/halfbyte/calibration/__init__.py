"""Where calibration tokens come from: files, data sets, random ids, or the model's own writing."""

from halfbyte.calibration.memory import FALLBACK_SPEC, available_memory_bytes, default_spec, self_writing_bytes
from halfbyte.calibration.sequences import TOKENS_PER_BATCH, TOKENS_PER_BATCH_ON_GPU, Batch, Calibration
from halfbyte.calibration.sources import SOURCES, calibrate, parse_spec

__all__ = [
    "FALLBACK_SPEC",
    "SOURCES",
    "TOKENS_PER_BATCH",
    "TOKENS_PER_BATCH_ON_GPU",
    "Batch",
    "Calibration",
    "available_memory_bytes",
    "calibrate",
    "default_spec",
    "parse_spec",
    "self_writing_bytes",
]

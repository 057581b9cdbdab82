"""Where calibration tokens come from: files of text or pictures, data sets, random ids, or the model's own writing."""

from halfbyte.calibration.memory import (
    FALLBACK_SPEC,
    available_memory_bytes,
    default_spec,
    local_processes,
    self_writing_bytes,
)
from halfbyte.calibration.pictured import Pictured, Processing
from halfbyte.calibration.sequences import (
    TOKENS_PER_BATCH,
    Batch,
    Calibration,
    tokens_per_batch,
)
from halfbyte.calibration.sources import (
    SOURCES,
    absent_sources,
    calibrate,
    calibration_problems,
    may_have_pictures,
    parse_spec,
    writes_itself,
)

__all__ = [
    "FALLBACK_SPEC",
    "SOURCES",
    "TOKENS_PER_BATCH",
    "Batch",
    "Calibration",
    "Pictured",
    "Processing",
    "absent_sources",
    "available_memory_bytes",
    "calibrate",
    "calibration_problems",
    "default_spec",
    "local_processes",
    "may_have_pictures",
    "parse_spec",
    "self_writing_bytes",
    "tokens_per_batch",
    "writes_itself",
]

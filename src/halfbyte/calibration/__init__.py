"""Where calibration tokens come from: files, data sets, random ids, or the model's own writing."""

from halfbyte.calibration.memory import FALLBACK_SPEC, default_spec, self_fits
from halfbyte.calibration.sequences import Batch, Calibration
from halfbyte.calibration.sources import SOURCES, calibrate, parse_spec

__all__ = [
    "FALLBACK_SPEC",
    "SOURCES",
    "Batch",
    "Calibration",
    "calibrate",
    "default_spec",
    "parse_spec",
    "self_fits",
]

"""``convert``: one format in, another out; codes and scales carried over, not chosen anew.

coded.py               a quantised weight between two formats; bits.py: its packing along rows
source.py, target.py   what a format has to offer to be read or written
formats.py             the table of formats
run.py                 the loop: survey, obstacles, tensors, record
folder_source.py, folder_target.py   Hugging Face folders, on which stand
compressed_tensors.py, dense.py      one format a file
"""

from __future__ import annotations

from halfbyte.conversion.run import convert

__all__ = ["convert"]

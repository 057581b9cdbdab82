"""``convert``: one format in, another out; codes and scales carried over, not chosen anew.

coded.py               a quantised weight between two formats; bits.py: its packing along rows
source.py, target.py   what a format has to offer to be read or written
formats.py             the table of formats
run.py                 the loop: survey, obstacles, tensors, record
requantize.py          fitting a weight to another grid, where that is allowed
folder_source.py, folder_target.py   Hugging Face folders, on which stand
compressed_tensors.py, awq.py, gptq.py, dense.py   one format a file
flax_qat.py            Gemma 3 for Flax, over orbax.py (the container), flax_layout.py (names), lattice.py (grids)
gguf_in.py, gguf_out.py   GGUF, over gguf_file.py (the container), gguf_blocks.py (types), gguf_families.py (names),
                       gguf_tokenizer_*.py, gguf_vision.py (towers), gguf_return.py (what the way back needs)
gguf_cache.py          a checkpoint's GGUF, made once and kept, for serving
headers.py             what inspect shows of GGUF and Flax
"""

from __future__ import annotations

from halfbyte.conversion.run import convert

__all__ = ["convert"]

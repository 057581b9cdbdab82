"""A GGUF whose embeddings take 8.5 bits a weight, as llama.cpp's own quantiser makes them; all else as it was.

``convert`` leaves embeddings as they are, since it loses nothing. In small models with large vocabularies they are half
of what is read for each token, where they also are the output matrix. Q8_0 rounds each to ``d * q`` with ``d`` the
largest of 32 neighbours over 127: an error of at most ``d / 2`` and what float16 takes off ``d``.
"""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.progress import Reporter

EMBEDDING = "token_embd.weight"
BLOCK = 32


def with_small_embeddings(model: Path, reporter: Reporter) -> Path:
    """The same model with embeddings in Q8_0, in a file beside its folder, which is made once.

    Args:
        model: a GGUF file. If its embeddings have few bits already, or rows that are no multiple of 32, it is returned.
    """
    import gguf
    import numpy as np

    out = model.parent.with_name(f"{model.parent.name}-embeddings-q8_0.gguf")
    if out.exists():
        return out
    read = gguf.GGUFReader(model)
    wide = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
    found = next((t for t in read.tensors if t.name == EMBEDDING), None)
    if found is None or found.tensor_type not in wide or int(found.shape[0]) % BLOCK:
        return model
    reporter.say("rounding embeddings to Q8_0")
    temporary = out.with_suffix(f".{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, read.get_field("general.architecture").contents())
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in read.tensors:
        if tensor.name == EMBEDDING:
            values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
            small = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, small, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.chmod(0o644)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out

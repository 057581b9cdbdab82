"""Write orbax checkpoints, with orbax itself; run as a program of its own: ``python write_orbax.py JOBS.json``.

JAX registers hooks and threads in the process that imports it, which the tests' own process is better without. Each
job: ``{"arrays": FILE.npz, "out": FOLDER, "ocdbt": bool, "zarr3": bool, "nested": bool}``; arrays of bfloat16 come as
uint16, under names that end in ``:bf16``. A key's last part is the leaf, all before it one level of the tree, as Kaggle
has it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp


def tree_of(file: str, *, nested: bool) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in np.load(file).items():
        name = key.removesuffix(":bf16")
        array = jnp.asarray(value.view(ml_dtypes.bfloat16) if key.endswith(":bf16") else value)
        *levels, leaf = name.split("/") if nested else name.rsplit("/", 1)
        place = tree
        for level in levels:
            place = place.setdefault(level, {})
        place[leaf] = array
    return tree


for job in json.loads(Path(sys.argv[1]).read_text()):
    tree = tree_of(job["arrays"], nested=job["nested"])
    if job["ocdbt"] and not job["zarr3"]:  # what Kaggle's checkpoints were written with
        with ocp.StandardCheckpointer() as standard:
            standard.save(job["out"], tree)
    else:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=job["ocdbt"], use_zarr3=job["zarr3"])
        with ocp.Checkpointer(handler) as plain:
            plain.save(job["out"], args=ocp.args.PyTreeSave(tree))

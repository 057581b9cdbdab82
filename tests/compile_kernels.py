"""Compile halfbyte's Triton kernels for a compute capability, without a card: python compile_kernels.py 90

Prints the kernels' names. Types are those that the wrappers pass.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte.kernels import gptq_triton, refine_triton

FLOATS, CODES, INDICES = "*fp32", "*i8", "*i64"
STRIDED = ("weight", "factor", "gradient", "hessian", "codes", "steps")
INTEGERS = tuple(f"{name}{of}_stride" for name in STRIDED for of in ("", "_batch"))
TYPES = {"codes": CODES, "group_of": INDICES, "best": INDICES, "q_min": "fp32", "q_max": "fp32"}
TYPES |= dict.fromkeys((*INTEGERS, "rows", "columns", "start", "width", "groups", "count"), "i32")
CONSTANTS = {"CHUNK": gptq_triton.ROWS, "COLUMNS": gptq_triton.PANEL}
# What Triton finds out of a launch's arguments: pointers and strides of real Linears are multiples of 16.
ALIGNED = (*INTEGERS, "start", "width", "rows", "columns")


def compiled(kernel: Any, capability: int) -> Any:
    types = {n: "constexpr" if n in CONSTANTS else TYPES.get(n, FLOATS) for n in kernel.arg_names}
    constants = {(i,): CONSTANTS[n] for i, n in enumerate(types) if n in CONSTANTS}
    aligned = [i for i, (n, t) in enumerate(types.items()) if t.startswith("*") or n in ALIGNED]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gptq_triton.OPTIONS)


for kernel in (gptq_triton._panel, gptq_triton._search, refine_triton._descend):
    assert compiled(kernel, int(sys.argv[1])).asm["cubin"]
    print(kernel.fn.__name__)

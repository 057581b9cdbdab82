"""Runs in AutoRound's environment: what its GPTQ Linears compute with a checkpoint's tensors.

    python decode_autoround.py MODEL.safetensors VERSION BITS GROUP_SIZE OUT.safetensors

VERSION 1 takes the class that adds 1 to stored zero points, 2 the one that does not. Each weight is what the Linear
makes of the unit vectors, in float32.
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    file, version, bits, size, out = sys.argv[1:6]
    if version == "1":
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    tensors = load_file(file)
    found = {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        held = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")}
        rows, columns = held["qweight"].shape[1], held["qweight"].shape[0] * 32 // int(bits)
        linear = QuantLinear(int(bits), int(size), columns, rows, False)
        for leaf, tensor in held.items():
            assert getattr(linear, leaf).shape == tensor.shape, (leaf, getattr(linear, leaf).shape, tensor.shape)
            setattr(linear, leaf, tensor)
        linear.scales = held["scales"].float()
        linear.post_init()
        with torch.no_grad():
            found[f"{name}.weight"] = linear(torch.eye(columns)).T.contiguous().float()
    save_file(found, out)


if __name__ == "__main__":
    main()

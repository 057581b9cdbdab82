"""How much memory a batch of Linears takes to be solved, and how many of them fit.

A batch needs what each of its Linears would need alone, all at once, but for the scale search and the rounded weights,
which take one Linear after the other. :mod:`halfbyte.estimates` reckons single Linears by itself, less closely.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.dispatch import PANEL
from halfbyte.kernels.general import STRIP
from halfbyte.methods.gptq import DOUBLE_LIMIT, ENOUGH_FOR_SINGLE
from halfbyte.methods.scales import CANDIDATES_PER_CALL, shares
from halfbyte.schemes import WeightFormat

THREADS_EACH = 4
UNBOUNDED = 1 << 30


def factoring_bytes(batch: int, width: int, damp_fraction: float) -> int:
    """Peak of :func:`halfbyte.methods.gptq.factor_hessians`: H (4 n^2 bytes each), its factor with room to work (6 n^2
    in float32, 12 n^2 in float64). Hessians that need more damping, next to others that do not, take 4 n^2 more.

    Args:
        batch: how many Hessians.
        width: ``n``, inputs.
        damp_fraction: as asked for; little makes it float64.
    """
    double = width <= DOUBLE_LIMIT and damp_fraction < ENOUGH_FOR_SINGLE
    return batch * width**2 * (16 if double else 10)


def solving_bytes(batch: int, rows: int, width: int, fmt: WeightFormat) -> int:
    """Peak of :func:`halfbyte.methods.gptq.quantize_gptq_batch`, with the Hessians, their factors and the weights.

    Of ``n`` inputs and ``N`` weights each: H and R (8 n^2 bytes), the weight and the weight without dead inputs (8 N);
    then the scale search's candidates; then its error or the weight in the order of its columns, and codes (5 N), and
    five panels of 128 columns. Groups wider than a panel are refitted in strips of rows, three of all columns at a
    time; on a GPU rounding errors are, too, one Linear after the other.

    Args:
        batch: how many Hessians.
        rows: of all Linears that share one Hessian.
        width: inputs.
        fmt: their format.
    """
    scales = rows * fmt.groups(width)
    held = batch * (8 * width**2 + 8 * rows * width + 8 * scales)
    searching = 28 * min(CANDIDATES_PER_CALL, scales * len(shares(fmt)))
    panels, strip = batch * 5 * 4 * PANEL * rows, 12 * min(STRIP, rows) * width
    wide = width > PANEL * fmt.groups(width)
    moving = batch * 5 * rows * width + (panels + batch * strip if wide else max(panels, strip))
    return held + max(searching, moving)


def peak_bytes(batch: int, rows: int, width: int, fmt: WeightFormat, damp_fraction: float) -> int:
    """Of both, with the weights (float32) held all the time."""
    weights = 4 * batch * rows * width
    return max(weights + factoring_bytes(batch, width, damp_fraction), solving_bytes(batch, rows, width, fmt))


def largest_batch(most: int, rows: int, width: int, fmt: WeightFormat, damp_fraction: float, room_bytes: int) -> int:
    """How many of ``most`` fit into ``room_bytes``; at least one, which there is no way without."""
    one, two = (peak_bytes(batch, rows, width, fmt, damp_fraction) for batch in (1, 2))
    return max(1, min(most, 1 + max(0, room_bytes - one) // (two - one)))


def worthwhile(device: torch.device, threads: int) -> int:
    """How many at once are worth their memory.

    On a CPU one Linear keeps some threads busy, and several leave the cache: on one thread they take up to a quarter
    more processor time than single Linears (benchmarks/experts.py). So it is one for every four threads; that number
    has not been measured where there are many. On a GPU, which one expert does not fill, memory is the only bound.
    """
    return max(1, threads // THREADS_EACH) if device.type == "cpu" else UNBOUNDED

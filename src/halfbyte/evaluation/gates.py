"""Gates: conditions on a result, such as ``recovery>=99,kl<=0.05``, that decide the exit status.

A gate names a measurement: ``recovery`` (of the average, a ratio of averages, in percent), ``recovery_low`` (the lower
end of its interval), ``recovery.TASK`` and ``recovery_low.TASK`` for one task, ``score.TASK``, or a divergence: ``kl``
and every name in ``compare.json``'s metrics. A measurement that the run did not make fails its gate: a gate that cannot
be checked has not been passed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from halfbyte.errors import UsageError

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
ALIASES = {"kl": "kl_mean", "ppl_ratio": "perplexity_ratio", "top1": "top1_agreement"}
DIVERGENCES = (
    "perplexity",
    "perplexity_ratio",
    "kl_mean",
    "kl_median",
    "kl_p99",
    "kl_p999",
    "kl_max",
    "top1_agreement",
    "rms_probability_change",
)
PATTERN = re.compile(r"\s*([A-Za-z_0-9][\w.\-:]*)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*%?\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition: ``name comparison bound``."""

    name: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.bound:g}"


def parse_gates(text: str) -> list[Gate]:
    """Gates from the option's words.

    Raises:
        UsageError: a part is no condition, or names no measurement.
    """
    gates = []
    for part in filter(str.strip, text.split(",")):
        found = PATTERN.fullmatch(part)
        if found is None:
            raise UsageError(
                f"{part.strip()!r} is no condition", where="--gate", remedy="Write NAME>=NUMBER, e.g. recovery>=99."
            )
        name, comparison, bound = found.groups()
        name = ALIASES.get(name, name)
        head = name.partition(".")[0]
        if name not in DIVERGENCES and head not in ("recovery", "recovery_low", "score"):
            raise UsageError(
                f"there is no measurement {name!r}",
                where="--gate",
                remedy=f"Use recovery, recovery_low, recovery.TASK, score.TASK, kl, {', '.join(DIVERGENCES)}.",
            )
        try:
            gates.append(Gate(name=name, comparison=comparison, bound=float(bound)))
        except ValueError:
            raise UsageError(f"{bound!r} is no number", where=f"--gate {part.strip()}") from None
    return gates


def needs_divergence(gates: list[Gate]) -> bool:
    """Whether a gate asks for what ``compare`` measures."""
    return any(g.name in DIVERGENCES for g in gates)


def failures(gates: list[Gate], measured: Mapping[str, float]) -> list[str]:
    """What is said of each gate that is not passed."""
    lines = []
    for gate in gates:
        value = measured.get(gate.name)
        if value is None:
            lines.append(f"{gate}: not measured in this run")
        elif not COMPARISONS[gate.comparison](value, gate.bound):
            lines.append(f"{gate}: it is {value:.4g}")
    return lines

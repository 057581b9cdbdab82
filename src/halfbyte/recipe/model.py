"""What a recipe says, once it has been read and checked.

Does not cover: reading files (``native``, ``llmcompressor``), or which Linears a model has (``architectures``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from halfbyte.errors import HalfbyteError, UsageError, raise_all
from halfbyte.schemes import Scheme, preset

Method = Literal["gptq", "rtn"]
METHODS: tuple[Method, ...] = ("gptq", "rtn")
DEFAULT_DAMP_FRACTION = 0.01
LINEAR = "Linear"


def matches(pattern: str, name: str) -> bool:
    """Whether a target or ignore entry covers the Linear called ``name``.

    ``re:X`` matches where ``re.match(X, name)`` does, i.e. from the start of the name; anything else must equal the
    name or be the class name ``Linear``. Never a prefix. These are compressed-tensors' rules, which vLLM shares.
    """
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, LINEAR)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeGroup:
    """A scheme and what it applies to: ``Linear``, exact module names or ``re:`` patterns."""

    scheme: Scheme
    targets: tuple[str, ...]

    def covers(self, name: str) -> bool:
        return any(matches(target, name) for target in self.targets)


Effort = Literal["low", "standard", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "standard", "high")
# What target_bits may give a Linear instead of its scheme.
WIDER = "W8A16"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSteps:
    """What GPTQ does besides visiting the columns; each can be left out, to see what it is worth.

    Attributes:
        static_order: columns by descending ``diag(H)``, scales staying with their original groups.
        scale_search: scales searched by weighted error instead of taken from the range.
        scale_refit: scales moved, in closed form, after the columns.
        code_descent: coordinate descent on codes after the columns.
        sweeps: how often refit and descent take turns.
        true_sequential: each Linear is observed where those before it in its block are quantised already.
        smoothing: where inputs are quantised too, their outliers move into the weights first (SmoothQuant).
        shrinkage: each input's own second moment is raised by so many times its share ``sqrt(inputs / tokens)``, which
            draws correlations towards 0 the more, the fewer tokens vouch for them; 0 takes them as counted. See
            ``methods.pooled``.
        end_to_end: at effort high, all scales are tuned together at the end, see ``end_to_end``.
        tune_codes: where blocks are tuned, their codes are too, not only their scales, see ``methods.tuning``.
        tune_norms: where blocks are tuned, the weights of their norms are too, but for those that were smoothed.
    """

    static_order: bool = True
    scale_search: bool = True
    scale_refit: bool = True
    code_descent: bool = True
    sweeps: int = 1
    true_sequential: bool = True
    smoothing: bool = True
    shrinkage: float = 1.0
    end_to_end: bool = True
    tune_codes: bool = False
    tune_norms: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSteps:
    """How the experts of a mixture are observed.

    Attributes:
        rare_tokens: an expert that fewer calibration tokens reach counts as rare, and is solved with its layer's tokens
            beside its own, see ``methods.pooled``. ``None`` is as many as the Linear at hand has inputs.
        all_tokens: let every expert's statistic see all tokens, not only those that the router sends to it.
    """

    rare_tokens: int | None = None
    all_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that shapes the output besides the source checkpoint.

    Attributes:
        groups: the first group that covers a module decides its scheme.
        ignore: modules that no group applies to, whatever their targets say.
        method: how codes are chosen. ``gptq`` needs integer schemes.
        damp_fraction: share of the Hessian's mean diagonal that GPTQ adds to it before factoring.
        gptq: which of its steps GPTQ takes.
        experts: how experts are observed, where there are any.
        effort: how long each block is tuned on its output after GPTQ: not at all, a little, or until little is gained.
        target_bits: stored bits a quantised weight may take on average; Linears that suffer most from their scheme get
            W8A16 instead, as far as this allows. ``None``: every Linear keeps its scheme.
        calibration: a calibration spec such as ``text:notes.txt``; ``None`` leaves the choice to the command.
        samples, seq_len, seed: size of the calibration set and its seed; ``None`` leaves them to the command.
        description: free text, kept in the manifest.
        notes: what was read from another tool's recipe and makes no difference here, in words.
    """

    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...] = ()
    method: Method = "gptq"
    damp_fraction: float = DEFAULT_DAMP_FRACTION
    gptq: GptqSteps = GptqSteps()
    experts: ExpertSteps = ExpertSteps()
    effort: Effort = "standard"
    target_bits: float | None = None
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    description: str = ""
    notes: tuple[str, ...] = ()

    @staticmethod
    def of_options(
        scheme: Scheme,
        *,
        ignore: Sequence[str] = (),
        method: Method | None = None,
        damp_fraction: float | None = None,
        calibration: str | None = None,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int | None = None,
    ) -> Recipe:
        """A recipe of one scheme for every Linear, from command-line options.

        Raises:
            UsageError: a pattern is not a regular expression, the method does not fit the scheme, or a number is out
                of range; all of them at once.
        """
        problems: list[HalfbyteError] = []
        for pattern in ignore:
            reason = pattern_problem(pattern)
            if reason:
                problems.append(UsageError(reason, where=f"--ignore {pattern}"))
        chosen = default_method([scheme]) if method is None else method
        if chosen not in METHODS:
            problems.append(UsageError(f"unknown method {chosen!r}", where="--method", remedy="Use gptq or rtn."))
        misfit = method_problem(chosen, [scheme])
        if misfit:
            problems.append(UsageError(misfit, where="--method gptq", remedy="Use --method rtn, or an integer scheme."))
        damp = DEFAULT_DAMP_FRACTION if damp_fraction is None else damp_fraction
        if not 0 <= damp <= 1:
            problems.append(UsageError(f"damp_fraction {damp} is not between 0 and 1", remedy="The default is 0.01."))
        raise_all(problems)
        return Recipe(
            groups=(SchemeGroup(scheme=scheme, targets=(LINEAR,)),),
            ignore=tuple(ignore),
            method=chosen,
            damp_fraction=damp,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
        )

    def scheme_for(self, name: str) -> Scheme | None:
        """The scheme of the Linear called ``name``; ``None`` when it is ignored or no group covers it."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        return next((group.scheme for group in self.groups if group.covers(name)), None)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Target and ignore entries that cover none of ``names``: most often a misspelt pattern."""
        known = list(names)
        entries = [t for group in self.groups for t in group.targets] + list(self.ignore)
        return [e for e in dict.fromkeys(entries) if not any(matches(e, n) for n in known)]

    def contested(self, names: Iterable[str]) -> list[str]:
        """Names that patterns of two groups cover with different schemes.

        Loaders settle such a tie differently (vLLM by the order of the groups, compressed-tensors by the alphabet), so
        a checkpoint whose config carries these patterns unchanged would be read wrongly by one of them. ``Linear`` and
        exact names do not count: every loader puts exact names first and class names last.
        """
        found = []
        for name in names:
            if any(matches(pattern, name) for pattern in self.ignore):
                continue
            exact = any(name in group.targets for group in self.groups)
            by_pattern = {g.scheme for g in self.groups for t in g.targets if t.startswith("re:") and matches(t, name)}
            if not exact and len(by_pattern) > 1:
                found.append(name)
        return found

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready values of what shapes the output besides calibration: for the manifest and to compare runs by."""
        return {
            "description": self.description,
            "groups": [
                {"scheme": g.scheme.name, "group_size": g.scheme.weights.group_size, "targets": list(g.targets)}
                for g in self.groups
            ],
            "ignore": list(self.ignore),
            "method": self.method,
            "damp_fraction": self.damp_fraction,
            "gptq": asdict(self.gptq),
            "effort": self.effort,
            **({} if self.experts == ExpertSteps() else {"experts": asdict(self.experts)}),
            **({} if self.target_bits is None else {"target_bits": self.target_bits}),
        }


def default_method(schemes: Sequence[Scheme]) -> Method:
    """``gptq`` where a scheme has integer codes, ``rtn`` where all are floats (nothing to gain from GPTQ in FP8)."""
    return "rtn" if schemes and all(s.weights.kind == "float" for s in schemes) else "gptq"


def method_problem(method: Method, schemes: Sequence[Scheme]) -> str | None:
    """Why ``method`` cannot produce ``schemes``, or ``None`` when it can."""
    floats = sorted({s.name for s in schemes if s.weights.kind == "float"})
    if method == "gptq" and floats:
        return f"method gptq works on integer codes, and scheme {', '.join(floats)} stores floats"
    return None


def wider(scheme: Scheme) -> Scheme | None:
    """What ``target_bits`` may choose instead: W8A16 with the same groups; ``None`` for 8 bits and more."""
    w8 = preset(WIDER)
    if scheme.weights.num_bits >= w8.weights.num_bits:
        return None
    return replace(w8, weights=replace(w8.weights, group_size=scheme.weights.group_size))


def mixing_problem(schemes: Sequence[Scheme]) -> str | None:
    """Why ``target_bits`` cannot choose between these schemes and W8A16, or ``None`` when it can.

    transformers reads no asymmetric group beside another, and what quantises activations is not a matter of bits.
    """
    w8 = preset(WIDER)
    strange = [s for s in schemes if s.storage != w8.storage or s.activations is not None or not s.weights.symmetric]
    if strange:
        names = ", ".join(sorted({s.name for s in strange}))
        return f"target_bits mixes symmetric packed integers with W8A16, and {names} is not of that kind"
    if all(wider(s) is None for s in schemes):
        return f"target_bits gives some Linears 8 bits, and {schemes[0].name} has them everywhere"
    return None


def pattern_problem(pattern: str) -> str | None:
    """Why a target or ignore entry is malformed, or ``None`` when it is not."""
    if not pattern or pattern == "re:":
        return "an empty pattern covers nothing that can be meant"
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as e:
            return f"{pattern!r} is not a regular expression: {e}"
    return None


def target_problem(pattern: str) -> str | None:
    """Like :func:`pattern_problem`, and also: an entry that no Linear of a decoder block can be called."""
    if pattern_problem(pattern) is None and not pattern.startswith("re:") and pattern != LINEAR and "." not in pattern:
        return f"target {pattern!r} is neither a full module name nor a pattern, and would cover nothing"
    return pattern_problem(pattern)

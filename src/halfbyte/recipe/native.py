"""halfbyte's own recipe keys, the same in TOML and YAML.

scheme, group_size, targets            the default scheme, and what it applies to (Linear unless given)
[[groups]] scheme, group_size, targets exceptions to it, first match first
ignore, method, damp_fraction, effort, target_bits, description
[gptq] static_order, scale_search, scale_refit, code_descent, sweeps, true_sequential, smoothing, shrinkage,
       end_to_end, tune_codes, tune_norms
[experts] rare_tokens, all_tokens
[calibration] source, samples, seq_len, seed
"""

from __future__ import annotations

from dataclasses import fields, replace

from halfbyte.errors import UsageError, raise_all
from halfbyte.recipe.document import Node
from halfbyte.recipe.model import (
    DEFAULT_DAMP_FRACTION,
    EFFORTS,
    LINEAR,
    METHODS,
    Effort,
    ExpertSteps,
    GptqSteps,
    Method,
    Recipe,
    SchemeGroup,
    default_method,
    matches,
    method_problem,
    mixing_problem,
    pattern_problem,
    target_problem,
)
from halfbyte.recipe.section import Problems, Section, did_you_mean
from halfbyte.schemes import PRESETS, Scheme, preset


def read_native(root: Node, file: str) -> Recipe:
    """Read halfbyte's keys.

    Raises:
        RecipeError: everything that is wrong, each with its line.
    """
    problems = Problems(file)
    top = Section(root, "a recipe", problems)
    if not top.is_table:
        raise problems.found[0]
    placed: list[tuple[SchemeGroup, list[Node]]] = []
    groups = top.get("groups")
    if groups is not None:
        if not isinstance(groups.value, list):
            top.wrong("groups", "a list of tables ([[groups]])")
        else:
            for node in groups.value:
                placed += _group(Section(node, "a group", problems), None)
    if "scheme" in top or "targets" in top or "group_size" in top or groups is None:
        placed += _group(top, [Node(LINEAR, top.line_of("scheme"))])
    check_reachable(placed, problems)
    ignore = check_ignore(top.strings("ignore"), problems)
    method = top.string("method", METHODS)
    damp = top.fraction("damp_fraction")
    said = top.string("effort", EFFORTS)
    effort: Effort = next((e for e in EFFORTS if e == said), "standard")
    target = top.number("target_bits")
    description = top.string("description")
    steps = _steps(Section(top.get("gptq") or Node(None, top.line), "gptq", problems))
    experts = _experts(Section(top.get("experts") or Node(None, top.line), "experts", problems))
    calibration = Section(top.get("calibration") or Node(None, top.line), "calibration", problems)
    source = calibration.string("source")
    samples = calibration.integer("samples", 1)
    seq_len = calibration.integer("seq_len", 1)
    seed = calibration.integer("seed", 0)
    calibration.finish()
    top.finish()
    schemes = [group.scheme for group, _ in placed]
    chosen = check_method(method, schemes, problems, line=top.line_of("method" if method else "scheme"))
    if effort == "high" and chosen != "gptq":
        problems.add(top.line_of("effort"), "effort high tunes what GPTQ has found, and this is round-to-nearest")
    unmixable = mixing_problem(schemes) if target is not None and schemes else None
    if unmixable:
        problems.add(top.line_of("target_bits"), unmixable, remedy="Use W4A16, or leave target_bits out.")
    raise_all(problems.in_order())
    return Recipe(
        groups=tuple(group for group, _ in placed),
        ignore=ignore,
        method=chosen,
        damp_fraction=DEFAULT_DAMP_FRACTION if damp is None else damp,
        gptq=steps,
        experts=experts,
        effort=effort,
        target_bits=target,
        calibration=source,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        description=description or "",
    )


def _steps(section: Section) -> GptqSteps:
    """The steps that a file switches; those that it does not name are taken."""
    usual = GptqSteps()
    numbers = ("sweeps", "shrinkage")
    switches = {f.name: section.boolean(f.name) for f in fields(GptqSteps) if f.name not in numbers}
    sweeps, shrinkage = section.integer("sweeps", 0), section.number("shrinkage", 0.0)
    section.finish()
    named = {name: value for name, value in switches.items() if value is not None}
    return replace(
        usual,
        **named,
        sweeps=usual.sweeps if sweeps is None else sweeps,
        shrinkage=usual.shrinkage if shrinkage is None else shrinkage,
    )


def _experts(section: Section) -> ExpertSteps:
    usual = ExpertSteps()
    rare, everything = section.integer("rare_tokens", 0), section.boolean("all_tokens")
    section.finish()
    return ExpertSteps(
        rare_tokens=rare,
        all_tokens=usual.all_tokens if everything is None else everything,
    )


def _group(section: Section, default_targets: list[Node] | None) -> list[tuple[SchemeGroup, list[Node]]]:
    """The scheme, group size and targets of the whole file or of one of its groups (none when unusable)."""
    problems = section.problems
    if not section.is_table:
        return []
    name = section.string("scheme")
    size = section.get("group_size")
    targets = section.strings("targets")
    if targets is None:
        targets = default_targets or []
        if default_targets is None:
            problems.add(
                section.line, "a group needs targets", remedy="Add targets, e.g. targets = ['re:.*down_proj']."
            )
    elif not targets:
        problems.add(section.line_of("targets"), "targets is empty, so the scheme applies to nothing")
    if default_targets is None:
        section.finish()
    scheme = None
    if name is not None:
        scheme = known_scheme(name, section.line_of("scheme"), problems)
    elif section.get("scheme") is None:
        problems.add(section.line, "no scheme is given", remedy=f"Add scheme, one of {', '.join(PRESETS)}.")
    if scheme is not None and size is not None:
        scheme = _sized(scheme, size, problems)
    check_targets(targets, problems)
    if scheme is None or not targets:
        return []
    return [(SchemeGroup(scheme=scheme, targets=tuple(t.value for t in targets)), targets)]


def known_scheme(name: str, line: int, problems: Problems) -> Scheme | None:
    """A preset by name; an unknown one is a problem."""
    try:
        return preset(name)
    except UsageError:
        guess = did_you_mean(name.upper(), PRESETS)
        problems.add(line, f"unknown scheme {name!r}", remedy=f"{guess} halfbyte writes {', '.join(PRESETS)}.")
        return None


def _sized(scheme: Scheme, size: Node, problems: Problems) -> Scheme | None:
    if isinstance(size.value, bool) or not (isinstance(size.value, int) or size.value == "channel"):
        problems.add(size.line, f"group_size must be a whole number or 'channel', not {size.value!r}")
        return None
    try:
        return scheme.with_group_size(size.value)
    except UsageError as e:
        problems.add(size.line, e.what, remedy=e.remedy.replace("--group-size", "group_size"))
        return None


def check_targets(targets: list[Node], problems: Problems) -> None:
    """Report targets that are malformed or can name no Linear."""
    for target in targets:
        reason = target_problem(target.value)
        if reason:
            problems.add(target.line, reason, remedy="" if ":" in reason else f"Write 're:.*{target.value}'.")


def check_ignore(entries: list[Node] | None, problems: Problems) -> tuple[str, ...]:
    """The ignore list; malformed patterns are problems."""
    for entry in entries or []:
        reason = pattern_problem(entry.value)
        if reason:
            problems.add(entry.line, reason)
    return tuple(entry.value for entry in entries or [])


def check_reachable(placed: list[tuple[SchemeGroup, list[Node]]], problems: Problems) -> None:
    """Report targets that an earlier group takes whole: loaders would apply the later group all the same."""
    seen: dict[str, Node] = {}
    for i, (group, targets) in enumerate(placed):
        for target in targets:
            shadow = next((n for t, n in seen.items() if _shadows(t, target.value)), None)
            if shadow is not None:
                problems.add(
                    target.line,
                    f"target {target.value!r} is never reached",
                    why=f"{shadow.value!r} in line {shadow.line} comes first and covers it",
                    remedy="Put the more specific group first.",
                )
        if i + 1 < len(placed):
            seen.update({t: n for t, n in zip(group.targets, targets, strict=True) if t not in seen})


def _shadows(earlier: str, later: str) -> bool:
    if earlier in (LINEAR, later):
        return True
    exact = not later.startswith("re:") and later != LINEAR
    return exact and pattern_problem(earlier) is None and matches(earlier, later)


def check_method(method: str | None, schemes: list[Scheme], problems: Problems, *, line: int) -> Method:
    """The method given, or the default for the schemes; one that cannot produce them is a problem."""
    chosen = next((m for m in METHODS if m == method), default_method(schemes))
    misfit = method_problem(chosen, schemes)
    if misfit:
        problems.add(line, misfit, remedy="Set method to rtn, or use integer schemes only.")
    return chosen

"""llm-compressor's ``recipe.yaml``: one GPTQModifier or QuantizationModifier, in any wrapping found in the wild.

    default_stage: {default_modifiers: {GPTQModifier: {...}}}       what llm-compressor writes (any stage or group name)
    quant_modifiers: {GPTQModifier: {...}}                          without a stage
    GPTQModifier: {...}        or        - GPTQModifier: {...}      bare

What changes no result (block sizes, batching, offloading, sequential order) is accepted; what picks another way to the
same kind of file (observers, no activation order) is accepted with a note; whatever would change what the file means is
an error that names the line. Number formats are matched against the presets field by field. Checked against the
recipes that llm-compressor 0.14 serialises.
"""

from __future__ import annotations

import re
from dataclasses import replace

from halfbyte.errors import raise_all
from halfbyte.recipe.document import Node
from halfbyte.recipe.llmcompressor_numbers import read_activations, read_actorder, read_observer, read_weights
from halfbyte.recipe.model import DEFAULT_DAMP_FRACTION, LINEAR, Recipe, SchemeGroup
from halfbyte.recipe.native import check_ignore, check_method, check_reachable, check_targets, known_scheme
from halfbyte.recipe.section import Problems, Section, kind_of, string_list

METHOD_OF_MODIFIER = {"GPTQModifier": "gptq", "QuantizationModifier": "rtn"}
UNSUPPORTED_MODIFIERS = {
    "AWQModifier": "it rescales channels between layers, which halfbyte does not do yet",
    "SpinQuantModifier": "it rotates weights, which halfbyte does not do",
    "QuIPModifier": "it rotates weights, which halfbyte does not do",
    "AutoRoundModifier": "it learns the rounding by gradient descent, which halfbyte does not do yet",
    "SparseGPTModifier": "it prunes weights, which halfbyte does not do",
    "WandaPruningModifier": "it prunes weights, which halfbyte does not do",
    "MagnitudePruningModifier": "it prunes weights, which halfbyte does not do",
    "ConstantPruningModifier": "it prunes weights, which halfbyte does not do",
}
SMOOTHING = "SmoothQuantModifier"
CHOSEN_STRENGTH = (
    f"{SMOOTHING}: halfbyte finds the norms from how the block is wired, and tries which strength is best for each"
)
ALWAYS_SEQUENTIAL = "halfbyte always calibrates a decoder block on the outputs of the quantised blocks before it"
# Accepted without a word: how many columns or Linears a solver takes at a time and where it keeps its statistics change
# no result; requires_calibration_data follows from the method; the rest schedules training.
WITHOUT_EFFECT = (
    "block_size",
    "batched_quantization",
    "offload_hessians",
    "requires_calibration_data",
    "index",
    "group",
    "start",
    "end",
    "update",
)
_STAGE = re.compile(r"\w*_stage(_\d+)?$")
_GROUP = re.compile(r"\w*modifiers$")


def is_llmcompressor(root: Node) -> bool:
    """Whether the keys are llm-compressor's: stages, modifier groups or modifiers, or a list of them."""
    if isinstance(root.value, list):
        return True
    return isinstance(root.value, dict) and any(
        _STAGE.match(k) or _GROUP.match(k) or k.endswith("Modifier") for k in root.value
    )


def read_llmcompressor(root: Node, file: str) -> Recipe:
    """Read an llm-compressor recipe.

    Raises:
        RecipeError: everything that cannot be honoured, each with its line and the reason.
    """
    problems = Problems(file)
    modifiers: list[tuple[str, Node]] = []
    _find_modifiers(root, modifiers, problems)
    usable = []
    smoothing = [node for name, node in modifiers if name == SMOOTHING]
    for name, node in modifiers:
        if name == SMOOTHING:
            continue
        if name in METHOD_OF_MODIFIER:
            usable.append((name, node))
            continue
        why = UNSUPPORTED_MODIFIERS.get(name, "")
        what = f"{name} cannot be honoured" if why else f"unknown modifier {name!r}"
        problems.add(node.line, what, why=why, remedy=f"Known: {', '.join((*METHOD_OF_MODIFIER, SMOOTHING))}.")
    if smoothing and [name for name, _ in usable] != ["GPTQModifier"]:
        problems.add(
            smoothing[0].line, f"{SMOOTHING} works together with one GPTQModifier here", remedy="Add or remove one."
        )
    if not modifiers and not problems.found:
        problems.add(root.line, "there is no modifier in it", remedy="Add a GPTQModifier or a QuantizationModifier.")
    for name, node in usable[1:]:
        problems.add(
            node.line,
            f"a second modifier, {name}, after {usable[0][0]} in line {usable[0][1].line}",
            why="halfbyte quantises in one pass with one method",
            remedy="Put all schemes into one modifier's scheme mapping or config_groups.",
        )
    sections = [(name, Section(node, name, problems)) for name, node in usable]
    recipes = [_read_modifier(name, section) for name, section in sections if section.is_table]
    raise_all(problems.in_order())
    recipe = recipes[0]
    return replace(
        recipe,
        gptq=replace(recipe.gptq, smoothing=bool(smoothing)),
        notes=(*recipe.notes, *([CHOSEN_STRENGTH] if smoothing else [])),
    )


def _find_modifiers(node: Node, found: list[tuple[str, Node]], problems: Problems) -> None:
    """Walk stages and groups down to modifiers."""
    if isinstance(node.value, list):
        for item in node.value:
            if isinstance(item.value, dict):
                _find_modifiers(item, found, problems)
            else:
                problems.add(item.line, f"a modifier must be a table of keys, not {kind_of(item.value)}")
        return
    if not isinstance(node.value, dict):
        problems.add(node.line, f"stages and modifier groups must be tables of keys, not {kind_of(node.value)}")
        return
    for key, value in node.value.items():
        if key.endswith("Modifier"):
            found.append((key, value))
        elif _STAGE.match(key) or _GROUP.match(key):
            _find_modifiers(value, found, problems)
        elif (key == "run_type" and value.value in ("oneshot", None)) or (key == "args" and not value.value):
            continue
        elif key == "args":
            problems.add(value.line, "recipe args cannot be honoured", remedy="Write the values where they are used.")
        else:
            problems.add(value.line, f"unknown key {key!r}", remedy="Expected a stage, a modifier group or a modifier.")


def _read_modifier(name: str, s: Section) -> Recipe:
    problems, notes = s.problems, list[str]()
    for key in WITHOUT_EFFECT:
        s.get(key)
    notes += [f"{key}: {ALWAYS_SEQUENTIAL}" for key in ("sequential_update", "sequential_targets") if key in s]
    if s.boolean("bypass_divisibility_checks"):
        problems.add(
            s.line_of("bypass_divisibility_checks"),
            "bypass_divisibility_checks cannot be honoured",
            why="a row that does not divide into whole groups is read wrongly by engines",
            remedy="Choose a group size that divides, or ignore the layer.",
        )
    if "kv_cache_scheme" in s:
        problems.add(
            s.line_of("kv_cache_scheme"),
            "kv_cache_scheme cannot be honoured",
            why="halfbyte does not quantise the key-value cache",
            remedy="Remove it; engines can store the cache in FP8 on their own.",
        )
    targets = s.strings("targets") or [Node(LINEAR, s.line)]
    placed: list[tuple[SchemeGroup, list[Node]]] = []
    scheme, groups = s.get("scheme"), s.get("config_groups")
    if scheme is not None and groups is not None:
        problems.add(scheme.line, "both scheme and config_groups are given", remedy="Keep one of them.")
    elif scheme is not None:
        placed = _from_scheme(scheme, targets, problems)
    elif groups is not None:
        for group in Section(groups, "config_groups", problems).nodes():
            placed += _config_group(Section(group, "a config group", problems), notes)
    if scheme is None and (groups is None or not groups.value):
        problems.add(
            s.line, f"{name} names neither scheme nor config_groups", remedy="Add a scheme, e.g. scheme: W4A16."
        )
    placed = _by_specificity(placed)
    check_reachable(placed, problems)
    ignore = check_ignore(s.strings("ignore"), problems)
    damp = s.fraction("dampening_frac") if name == "GPTQModifier" else None
    if name == "GPTQModifier":
        read_actorder(s)
        if s.is_null("actorder"):
            notes.append("actorder: halfbyte visits columns in static activation order all the same; the file is alike")
    for key in ("weight_observer", "input_observer", "output_observer"):
        read_observer(s, key, notes)
    if "observer" in s:
        observers = Section(s.get("observer") or Node(None, s.line), "observer", problems)
        for key in ("weights", "input", "output"):
            read_observer(observers, key, notes)
        observers.finish()
    s.finish()
    method = METHOD_OF_MODIFIER[name]
    chosen = check_method(method, [g.scheme for g, _ in placed], problems, line=s.line)
    return Recipe(
        groups=tuple(group for group, _ in placed),
        ignore=ignore,
        method=chosen,
        damp_fraction=DEFAULT_DAMP_FRACTION if damp is None else damp,
        notes=tuple(dict.fromkeys(notes)),
    )


def _from_scheme(scheme: Node, targets: list[Node], problems: Problems) -> list[tuple[SchemeGroup, list[Node]]]:
    """``scheme: W4A16``, or ``scheme: {W4A16: [targets], ...}``."""
    if isinstance(scheme.value, str):
        pairs = [(scheme.value, scheme.line, targets)]
    elif isinstance(scheme.value, dict):
        pairs = [(k, n.line, string_list(n, f"the targets of {k}", problems)) for k, n in scheme.value.items()]
    else:
        problems.add(scheme.line, f"scheme must be a name or a table of names, not {kind_of(scheme.value)}")
        return []
    placed = []
    for name, line, nodes in pairs:
        check_targets(nodes, problems)
        known = known_scheme(name, line, problems)
        if known is not None:
            placed.append((SchemeGroup(scheme=known, targets=tuple(n.value for n in nodes)), nodes))
    return placed


def _config_group(s: Section, notes: list[str]) -> list[tuple[SchemeGroup, list[Node]]]:
    problems = s.problems
    targets = s.strings("targets") or []
    if not targets:
        problems.add(s.line, "a config group needs targets", remedy="Add targets: [Linear].")
    check_targets(targets, problems)
    storage = s.string("format")
    weights_node, inputs_node = s.get("weights"), s.get("input_activations")
    if "output_activations" in s:
        problems.add(
            s.line_of("output_activations"),
            "output_activations cannot be honoured",
            why="halfbyte quantises weights and inputs only",
            remedy="Set it to null.",
        )
    s.finish()
    if weights_node is None:
        problems.add(s.line, "a config group without weights quantises nothing here", remedy="Add weights.")
        return []
    activations = None
    before = len(problems.found)
    if inputs_node is not None:
        activations = read_activations(Section(inputs_node, "input_activations", problems))
    scheme = read_weights(Section(weights_node, "weights", problems), activations, notes)
    if scheme is None or len(problems.found) > before:
        return []
    if storage is not None and storage != scheme.storage:
        problems.add(
            s.line_of("format"), f"format {storage!r} cannot be honoured", why=f"{scheme.name} is {scheme.storage}"
        )
    return [(SchemeGroup(scheme=scheme, targets=tuple(t.value for t in targets)), targets)]


def _by_specificity(placed: list[tuple[SchemeGroup, list[Node]]]) -> list[tuple[SchemeGroup, list[Node]]]:
    """Put exact names first and class names last, as llm-compressor ranks them whatever the order of the groups."""
    parts = []
    for rank in range(3):
        for group, nodes in placed:
            chosen = [n for n in nodes if _rank(n.value) == rank]
            if chosen:
                parts.append((SchemeGroup(scheme=group.scheme, targets=tuple(n.value for n in chosen)), chosen))
    return parts


def _rank(target: str) -> int:
    return 1 if target.startswith("re:") else 2 if target == LINEAR else 0

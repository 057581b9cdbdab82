"""Number formats of llm-compressor's ``config_groups``, field by field, as the presets that equal them.

Does not cover: which modules they apply to (``llmcompressor``).
"""

from __future__ import annotations

from halfbyte.recipe.section import Section, kind_of
from halfbyte.schemes import GROUP_SIZES, PRESETS, ActivationFormat, Scheme

OBSERVERS = ("minmax", "mse", "memoryless_minmax", "memoryless_mse", "static_minmax")


def read_weights(s: Section, activations: ActivationFormat | None, notes: list[str]) -> Scheme | None:
    """The preset whose weights and activations equal these, with its group size."""
    problems = s.problems
    before = len(problems.found)
    bits = s.integer("num_bits", 1)
    kind = s.string("type", ("int", "float"))
    symmetric = s.boolean("symmetric")
    size = s.integer("group_size", -1)
    strategy = s.string("strategy", ("group", "channel", "tensor", "block", "token", "tensor_group", "attn_head"))
    if s.boolean("dynamic"):
        problems.add(s.line_of("dynamic"), "dynamic weights cannot be honoured", why="weights are stored, not measured")
    block = _block(s)
    read_observer(s, "observer", notes)
    s.get("observer_kwargs")
    read_actorder(s)
    _dtypes(s)
    s.finish()
    if len(problems.found) > before:
        return None
    bits = 8 if bits is None else bits
    kind = kind or "int"
    symmetric = symmetric is not False
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("group", "channel", "block"):
        problems.add(
            s.line_of("strategy"),
            f"weight strategy {strategy!r} cannot be honoured",
            why="halfbyte writes one scale for a group, for an output channel or for a block",
            remedy="Use strategy: group with group_size, or strategy: channel.",
        )
        return None
    if (block is None) == (strategy == "block"):
        problems.add(s.line_of("block_structure"), "strategy: block and block_structure go together")
        return None
    if strategy == "group" and (size is None or size not in GROUP_SIZES):
        problems.add(
            s.line_of("group_size"),
            f"group_size {size} is not supported by the engines",
            remedy=f"Use {', '.join(map(str, GROUP_SIZES))}.",
        )
        return None
    wanted = size if strategy == "group" else None
    numbers = (bits, kind, symmetric, block, activations)
    for scheme in PRESETS.values():
        w = scheme.weights
        if (w.num_bits, w.kind, w.symmetric, w.block, scheme.activations) != numbers:
            continue
        if w.group_size == wanted:
            return scheme
        if scheme.storage == "pack-quantized" and (wanted is not None or symmetric):
            return scheme.with_group_size("channel" if wanted is None else wanted)
    inputs = "16-bit" if activations is None else f"{activations.num_bits}-bit {activations.kind}"
    if activations is not None and activations.group_size is not None:
        inputs += f" by groups of {activations.group_size}"
    problems.add(
        s.line,
        f"no scheme of halfbyte has {bits}-bit {'symmetric' if symmetric else 'asymmetric'} {kind} weights"
        f" by {strategy} with {inputs} inputs",
        remedy=f"halfbyte writes {', '.join(PRESETS)}.",
    )
    return None


def read_activations(s: Section) -> ActivationFormat | None:
    """Run-time activations: dynamic, one scale a token or a group of its features, symmetric."""
    problems = s.problems
    bits = s.integer("num_bits", 1)
    kind = s.string("type", ("int", "float"))
    symmetric = s.boolean("symmetric")
    strategy = s.string("strategy")
    size = s.integer("group_size", 1)
    dynamic = s.get("dynamic")
    for key in ("observer", "observer_kwargs", "actorder", "block_structure"):
        s.get(key)
    _dtypes(s)
    s.finish()
    if dynamic is None or dynamic.value is not True:
        problems.add(
            s.line_of("dynamic"),
            "static input_activations cannot be honoured",
            why="halfbyte stores no activation scales",
            remedy="Use dynamic: true with strategy: token.",
        )
    elif strategy not in ("token", "group") or (size is None) != (strategy == "token"):
        problems.add(
            s.line_of("strategy"),
            f"input_activations strategy {strategy or 'tensor'!r} cannot be honoured",
            why="engines measure one scale for each token, or for each group of its features",
            remedy="Use strategy: token and no group_size; for blocks of weights, strategy: group and group_size: 128.",
        )
    if symmetric is False:
        problems.add(
            s.line_of("symmetric"),
            "asymmetric input_activations cannot be honoured",
            why="no scheme of halfbyte has a zero point for inputs",
            remedy="Use symmetric: true.",
        )
    return ActivationFormat(
        num_bits=8 if bits is None else bits, kind="float" if kind == "float" else "int", group_size=size
    )


def _block(s: Section) -> tuple[int, int] | None:
    """``block_structure``: two whole numbers, as a list or in the older form ``"128x128"``."""
    given = s.get("block_structure")
    if given is None or given.value is None:
        return None
    values = given.value
    parts = [n.value for n in values] if isinstance(values, list) else str(values).split("x")
    if len(parts) == 2 and all(str(p).isdecimal() for p in parts):
        return int(parts[0]), int(parts[1])
    s.problems.add(given.line, "block_structure must be two whole numbers", remedy="Use block_structure: [128, 128].")
    return None


def read_actorder(s: Section) -> None:
    """``static`` (or ``weight``) is what halfbyte does, and none gives the same kind of file; others do not."""
    given = s.get("actorder")
    if given is None or given.value is False:
        return
    value = given.value.lower() if isinstance(given.value, str) else given.value
    if value is True or value in ("group", "dynamic"):
        s.problems.add(
            given.line,
            f"actorder {given.value!r} cannot be honoured",
            why="it needs a g_idx in the file, which loaders reject",
            remedy="Use actorder: static.",
        )
    elif value not in ("static", "weight"):
        s.problems.add(given.line, f"unknown actorder {kind_of(given.value)}", remedy="Use static or null.")


def read_observer(s: Section, key: str, notes: list[str]) -> None:
    if s.string(key, OBSERVERS) is not None:
        notes.append("observer: halfbyte searches scales by the error they cause; no observer is run")


def _dtypes(s: Section) -> None:
    """Scales follow the model's dtype; anything else was meant for a format that halfbyte does not write."""
    if "scale_dtype" in s:
        s.problems.add(s.line_of("scale_dtype"), "scale_dtype cannot be honoured", why="scales have the model's dtype")
    s.get("zp_dtype")

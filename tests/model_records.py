"""What was run for each family of models: records that tests write, and docs/models.md, which is made of them.

    HALFBYTE_MODEL_RECORDS=docs/models/transformers.jsonl python -m pytest tests/test_models.py    (a new file)
    python tests/model_records.py            write docs/models.md
    python tests/model_records.py --check    exit 1 when the page does not match the records

A record is one line of JSON: family, scheme, step, "passed" or the reason why the step cannot pass, and the versions of
what ran. Other tests (engines) write files of their own beside it; of equal steps the last line counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zoo

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "models"
PAGE = ROOT / "docs" / "models.md"
VARIABLE = "HALFBYTE_MODEL_RECORDS"

HEAD = """# Models

Written by `tests/model_records.py` from the records in [docs/models](models), which the tests write; do not edit.

Every family stands here as a tiny checkpoint with random weights, made by transformers from real configuration fields,
with the tensor names of published checkpoints ([`tests/zoo.py`](../tests/zoo.py)). An architecture that is not listed
is tried by the general rule, and `plan` says so.
"""
KINDS = {"text": "Language models", "experts": "Mixtures of experts", "vision": "Vision-language models"}
# Column titles, what a family must pass for them, and what they mean.
COLUMNS = {
    "quantised": (
        ("plan", "quantize", "verify"),
        "planned without problems, exactly the Linears of the language model's blocks quantised, all else copied byte "
        "for byte, every check of `verify` passed",
    ),
    "transformers": (
        ("reload", "logits"),
        "loaded by transformers, with the logits of a model that was dequantised by hand",
    ),
    "halfbyte.load": (("halfbyte.load",), "the same, loaded by `halfbyte.load` into transformers' model class"),
    "pictures": (("logits with pictures",), "the same logits with pictures in the input, by either"),
    "calibrated with pictures": (("calibrated with pictures",), "quantised on pictures and text, and verified"),
    "vLLM": (
        ("vllm",),
        "loaded by vLLM on a CPU, which generates, with the probabilities of that model, inputs rounded as W8A8 means; "
        "for int8 experts vLLM's kernel needs AMX, and where there is none torch computes them",
    ),
    "vLLM, pictures": (("vllm with pictures",), "the same with a picture in the input"),
}
VISION_ONLY = ("pictures", "calibrated with pictures", "vLLM, pictures")

Key = tuple[str, str, str]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and reports of other libraries about themselves."""
    import transformers

    logging = transformers.utils.logging
    level = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)


def passed(
    family: str,
    scheme: str,
    step: str,
    outcome: str = "passed",
    *,
    engine: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Append a record, if records are asked for.

    Args:
        family, scheme, step: what was run.
        outcome: a reason where the step is known to be impossible.
        engine: name and version of what ran it, where that is not transformers: ``{"vllm": "0.32.0"}``.
        facts: what else the page shows.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    record = {"family": family, "scheme": scheme, "step": step, "outcome": outcome, **facts}
    versions = engine or {name: version(name) for name in ("transformers", "compressed-tensors", "torch")}
    record |= {"versions": dict(versions)}
    with Path(file).open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def read() -> dict[Key, dict[str, Any]]:
    """All records, by family, scheme and step."""
    lines = [line for file in sorted(RECORDS.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(r["family"], r["scheme"], r["step"]): r for r in map(json.loads, lines)}


def page() -> str:
    """docs/models.md as the records give it."""
    records, notes = read(), dict[str, int]()
    parts = [HEAD]
    parts += [f"- **{title}**: {meaning}." for title, (_, meaning) in COLUMNS.items()] + [""]
    for kind, heading in KINDS.items():
        columns = [c for c in COLUMNS if kind == "vision" or c not in VISION_ONLY]
        parts += [f"## {heading}\n", row(["family", "model class", "blocks on disk", *columns])]
        parts.append(row(["---"] * (3 + len(columns))))
        for name, family in zoo.FAMILIES.items():
            if family.kind == kind:
                cells = [cell(records, name, COLUMNS[c][0], notes) for c in columns]
                parts.append(row([name, f"`{family.model}`", blocks(records, name), *cells]))
        parts.append("")
    parts += [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*parts, "", f"Run with {versions(records)}.", ""])


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(records: dict[Key, dict[str, Any]], family: str, steps: tuple[str, ...], notes: dict[str, int]) -> str:
    """The schemes that passed all steps, and numbers of the reasons why others cannot."""
    found = []
    for scheme in dict.fromkeys(s for f, s, _ in records if f == family):
        outcomes = [records[k]["outcome"] for step in steps if (k := (family, scheme, step)) in records]
        reasons = [o for o in outcomes if o != "passed"]
        if reasons:
            found.append(f"{scheme}: no [{notes.setdefault(reasons[0], len(notes) + 1)}]")
        elif len(outcomes) == len(steps):
            found.append(scheme)
    return ", ".join(found)


def blocks(records: dict[Key, dict[str, Any]], family: str) -> str:
    found = {r["blocks"] for (f, _, _), r in records.items() if f == family and "blocks" in r}
    return ", ".join(f"`{b}`" for b in sorted(found))


def versions(records: dict[Key, dict[str, Any]]) -> str:
    found = {f"{name} {number}" for r in records.values() for name, number in r["versions"].items()}
    return ", ".join(sorted(found))


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
        sys.exit("docs/models.md is stale: run tests/model_records.py" if stale else 0)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

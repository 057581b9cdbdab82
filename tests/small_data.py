"""Data sets of two rows with the columns of those that suites use, in place of the hub's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from PIL import Image

WORD = "ferry"
LETTERS = ("A", "B", "C", "D")


def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
    """What ``datasets.load_dataset`` would give; a data set that is not here is an error."""
    rows = ROWS[path](name) if callable(ROWS.get(path)) else ROWS[path]
    splits = ("train", "validation", "test", "dev", "latest", "auxiliary_train")
    if path == "TAUR-Lab/MuSR":
        splits = ("murder_mysteries", "object_placements", "team_allocation")
    made = datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in splits})
    if path != "Idavidrein/gpqa":
        return made
    # GPQA's choices are shuffled while it is read. From a disk, as from the hub, the result is kept and read again.
    if path not in ON_DISK:
        ON_DISK[path] = tempfile.TemporaryDirectory(prefix="halfbyte-data-")
        made.save_to_disk(ON_DISK[path].name)
    return datasets.DatasetDict.load_from_disk(ON_DISK[path].name)


ON_DISK: dict[str, tempfile.TemporaryDirectory[str]] = {}


def mmlu(name: str | None) -> list[dict[str, Any]]:
    return [
        {"question": f"Question {i}?", "subject": name, "choices": ["w", "x", "y", "z"], "answer": i % 4}
        for i in range(6)
    ]


def bbh(name: str | None) -> list[dict[str, Any]]:
    """Targets have to be among each task's own choices."""
    return [{"input": f"Case {i}.", "target": BBH_TARGETS.get(str(name), "(A)")} for i in range(2)]


BBH_TARGETS = {
    "boolean_expressions": "True", "causal_judgement": "Yes", "formal_fallacies": "valid", "navigate": "Yes",
    "object_counting": "3", "sports_understanding": "yes", "web_of_lies": "Yes",
}  # fmt: skip


def llama_evals(name: str | None) -> list[dict[str, Any]]:
    """Meta's records of its own evaluations: one data set a language, rows of all subjects."""
    language = str(name).split("mmlu_")[1].split("__")[0]
    return [
        {
            "input_question": f"Question {i}?",
            "input_choice_list": dict(zip(LETTERS, "wxyz", strict=True)),
            "input_correct_responses": [LETTERS[i % 4]],
            "subtask_name": f"mmlu_{language}_chat.{subject}",
        }
        for subject in subjects()
        for i in range(6)
    ]


def subjects() -> list[str]:
    """MMLU's 57, by the names of lm-eval's files."""
    folder = Path(lm_eval.__file__).parent / "tasks/llama3/instruct/mmlu_th"
    return sorted(f.stem.removeprefix("mmlu_th_") for f in folder.glob("mmlu_th_*.yaml"))


ROWS: dict[str, Any] = {
    "cais/mmlu": mmlu,
    "hails/mmlu_no_train": mmlu,
    "allenai/ai2_arc": [
        {
            "id": str(i),
            "question": f"Question {i}?",
            "choices": {"text": ["w", "x", "y", "z"], "label": list(LETTERS)},
            "answerKey": LETTERS[i % 4],
        }
        for i in range(30)
    ],
    "openai/gsm8k": [{"question": f"{i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(9)],
    "Rowan/hellaswag": [
        {
            "ind": i, "activity_label": "Sailing", "ctx_a": "A ferry leaves.", "ctx_b": "it", "ctx": "A ferry leaves.",
            "endings": ["sinks.", "floats.", "sings.", "flies."], "source_id": "x", "split": "val", "split_type": "x",
            "label": str(i % 4),
        }
        for i in range(12)
    ],
    "allenai/winogrande": [
        {"sentence": f"Bow {i} met the wave because the _ turned.", "option1": "bow", "option2": "wave", "answer": "1"}
        for i in range(9)
    ],
    "truthfulqa/truthful_qa": [
        {
            "question": "Do ferries fly?",
            "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
            "mc2_targets": {"choices": ["No.", "They swim.", "Yes."], "labels": [1, 1, 0]},
        }
    ]
    * 2,
    "TIGER-Lab/MMLU-Pro": [
        {
            "question_id": i, "question": f"Question {i}?", "options": list("wxy"), "answer": "B", "answer_index": 1,
            "cot_content": "A: Let's think step by step. The answer is (B).", "category": category, "src": "x",
        }
        for category in ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health",
                         "history", "law", "math", "other", "philosophy", "physics", "psychology")
        for i in range(6)
    ],
    "wis-k/instruction-following-eval": [
        {
            "key": 1, "prompt": "Write without a comma.", "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_highlights": None}],
        }
    ]
    * 2,
    "SaylorTwift/bbh": bbh,
    "DigitalLearningGmbH/MATH-lighteval": [
        {"problem": "1+1?", "level": "Level 5", "type": "Algebra", "solution": r"It is $\boxed{2}$."}
    ]
    * 5,
    "Idavidrein/gpqa": [
        {
            "Question": f"Question {i}?", "Correct Answer": "w", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
            "Incorrect Answer 3": "z", "Explanation": "So.",
        }
        for i in range(8)
    ],
    "TAUR-Lab/MuSR": [
        {
            "narrative": "It was dark.", "question": "Who?", "choices": "['Ann', 'Bo']", "answer_index": 0,
            "answer_choice": "Ann",
        }
    ]
    * 2,
    "meta-llama/Llama-3.1-8B-Instruct-evals": llama_evals,
    "MMMU/MMMU": [
        {
            "id": "1", "question": "What is <image 1>?", "options": "['ferry', 'buoy']", "explanation": "",
            "image_1": Image.new("RGB", (8, 8)), "answer": "A", "question_type": "multiple-choice",
        }
    ]
    * 2,
    "HuggingFaceM4/ChartQA": [{"image": Image.new("RGB", (8, 8)), "query": "How many?", "label": ["4"]}] * 2,
}  # fmt: skip

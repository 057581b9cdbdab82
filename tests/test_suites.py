"""Every suite's tasks, as lm-eval has them, asked of a model that answers anything, on data with the right columns.

What this shows: names, shots, metrics, filters, prompts and groups are those of lm-eval 0.4.13, so that with the hub
within reach the same commands run the whole data sets.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.evaluation import suites

OWN = [n for n in suites.names() if n not in ("code", "quick")]
# lm-eval's folders of the tasks that suites name: indexing all of them takes seconds.
FOLDERS = ("arc", "gsm8k", "hellaswag", "winogrande", "truthfulqa", "mmlu", "leaderboard", "llama3", "mmlu_pro", "gpqa",
           "mmmu", "chartqa")  # fmt: skip


class Parrot:
    """An lm-eval model that likes the shortest choice best and says the same to everything."""

    rank, world_size = 0, 1
    MULTIMODAL = True
    tokenizer_name = "parrot"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def set_cache_hook(self, hook: Any) -> None:
        pass

    def apply_chat_template(self, history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        turns = "".join(f"<{m['role']}>{m['content']}" for m in history)
        return turns + ("<assistant>" if add_generation_prompt else "")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [("loglikelihood", r.args) for r in requests]
        return [(-float(len(r.args[1])), False) for r in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [("generate_until", r.args) for r in requests]
        return ["The best answer is A. The answer is (A). #### 4" for _ in requests]


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "halfbyte[eval]"')
    import lm_eval
    from lm_eval.tasks import TaskManager

    from halfbyte.evaluation.harness import Harness

    root = Path(lm_eval.__file__).parent / "tasks"
    made = Harness(None, limit=2, chat_template=None)
    made.__dict__["everything"] = TaskManager(
        include_path=made.paths + [str(root / f) for f in FOLDERS], include_defaults=False
    )
    return made


@pytest.mark.evaluation
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OWN)
def test_the_tasks_of_a_suite_run_as_they_are_configured(
    name: str, harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    import small_data

    monkeypatch.setattr(datasets, "load_dataset", small_data.load_dataset)
    (suite,) = suites.resolve([name], harness)
    for task in suite.tasks:
        if name == "multilingual-mmlu" and task.task not in ("mmlu_pt_llama", "mmlu_th_llama"):
            assert harness.knows(task.task), "seven times 57 subjects take minutes: of the others, the name"
            continue
        loaded = harness.load(task)
        settings = harness.settings(task, has_template=True)
        digest = harness.digest(loaded, settings)
        assert harness.digest(harness.load(task), settings) == digest, "loading twice gives the same documents"
        parrot = Parrot()
        scores = harness.run(parrot, loaded, task, settings, digest, tmp_path / f"{task.task}.db")
        assert scores.metric == task.metric
        assert scores.weights, "documents' scores give lm-eval's aggregate, so there is an interval"
        assert sum(scores.weights.values()) == pytest.approx(1)
        assert set(Counter(a.task for a in scores.answers).values()) == {2}
        if task.shots is not None and task.shots > 0:
            assert scores.shots == task.shots
        prompt = str(parrot.asked[0][1][0])
        assert ("<user>" in prompt) is task.chat_template
        if task.chat_template and task.fewshot_as_multiturn and task.shots:
            assert prompt.count("<user>") == task.shots + 1
        if task.max_gen_toks:
            assert {a[1]["max_gen_toks"] for kind, a in parrot.asked if kind == "generate_until"} == {task.max_gen_toks}


def test_shots_and_metrics_are_the_leaderboard_s() -> None:
    found = {t.task: (t.shots, t.metric) for t in suites.load("openllm-v1").tasks}
    assert found == {
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "truthfulqa_mc2": (0, "acc"),
        "winogrande": (5, "acc"),
        "gsm8k": (5, "exact_match,strict-match"),
    }


@pytest.mark.parametrize("name", suites.names())
def test_suites_can_be_read(name: str) -> None:
    suite = suites.load(name)
    assert suite.tasks
    assert len({t.task for t in suite.tasks}) == len(suite.tasks)
    assert all(t.metric for t in suite.tasks)


def test_mistakes_in_a_file_are_told_together() -> None:
    content = {"tasks": [{"task": "gsm8k", "shot": 5}, {"title": "x"}], "categori": "x"}
    with pytest.raises(UsageError, match=r"3 problems: .*'categori'.*'shot'.*Did you mean 'shots'.*no task is named"):
        suites.suite_of("mine", content, "mine.yaml")


def test_a_task_of_the_suite_code_alone_is_run_in_the_sandbox(harness: Any) -> None:
    whole = suites.load("code").tasks
    found = suites.resolve([t.task for t in whole], harness)
    assert [t for s in found for t in s.tasks] == whole


def test_what_is_wrong_with_a_suite_s_file_is_told(harness: Any, tmp_path: Path) -> None:
    texts = {
        "broken": "tasks: [a",
        "function": "task: x\ndoc_to_text: !function words.asked\n",
        "task": "task: x\ndataset_path: json\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    messages = {}
    for name in [*texts, "absent"]:
        with pytest.raises(UsageError) as told:
            suites.resolve([str(tmp_path / f"{name}.yaml")], harness)
        messages[name] = str(told.value)
    assert "is no YAML file of a suite" in messages["broken"]
    assert "--tasks-dir" in messages["function"]
    assert "--tasks-dir" in messages["task"]
    assert "No such file" in messages["absent"]

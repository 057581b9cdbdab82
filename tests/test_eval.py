"""`halfbyte eval` on tiny models: pairing, cache, resume, suites, gates. Needs the extra `eval`."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import Models
from pictures import encoded, picture

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "halfbyte[eval]"')

from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.cli.eval import render
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluation import harness as harness_module
from halfbyte.evaluation import results
from halfbyte.evaluation.backends import Backend, parse_arguments
from halfbyte.evaluation.gates import parse_gates
from halfbyte.evaluation.identity import checkpoint_digest
from halfbyte.evaluation.recovery import Stratum
from halfbyte.evaluation.recovery import average as average_of
from halfbyte.evaluation.run import evaluate
from halfbyte.evaluation.suites import SuiteTask
from halfbyte.evaluation_records import EvalRecord
from halfbyte.progress import Silent
from halfbyte.records import read_record

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it uses

QUIZ = """\
task: ferry_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: QUIZ_FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def pair(tiny_model: Models, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a copy of it with noise on its weights."""
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(tiny_model("llama"), base)
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, t in tensors.items():
        if t.dim() == 2 and "layers" in name:
            t += 0.6 * t.float().std() * torch.randn(t.shape, generator=generator).to(t.dtype)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return base, other


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one local task of 24 documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"Seat {i} is by the", "choices": [" river", " lamp", " buoy"], "answer": i % 3} for i in range(24)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "quiz.yaml").write_text(QUIZ.replace("QUIZ_FILE", str(folder / "quiz.jsonl")))
    return folder


@pytest.fixture
def measure(pair: tuple[Path, Path], tasks: Path, tmp_path: Path) -> Callable[..., EvalRecord]:
    def call(checkpoint: Path | None = None, **options: Any) -> EvalRecord:
        given = {
            "baseline": pair[0],
            "suite": "ferry_quiz",
            "tasks_dir": tasks,
            "cache": tmp_path / "cache",
            "backend": Backend(device="cpu"),
        }
        return evaluate(checkpoint or pair[1], **(given | options))

    return call


def test_scores_are_paired_by_document_and_every_sample_is_kept(
    pair: tuple[Path, Path], measure: Callable[..., EvalRecord]
) -> None:
    record = measure(gates=parse_gates("recovery>=1000,score.ferry_quiz>=0"))
    assert read_record(EvalRecord, pair[1] / "eval.json") == record
    (row,) = record.tasks
    assert row.documents == 24
    assert row.metric == "acc"
    lines = {
        side: [json.loads(line) for line in (pair[1] / row.samples[side]).read_text().splitlines()]
        for side in ("base", "checkpoint")
    }
    base, value = ([s["score"] for s in lines[side]] for side in ("base", "checkpoint"))
    # The scores are right: each is the argmax of the log-likelihoods that are kept with it.
    for side in lines.values():
        for s in side:
            found = max(range(3), key=lambda i: s["response"][i][0])
            assert s["score"] == float(found == s["target"])
    assert row.base == pytest.approx(sum(base) / 24)
    assert row.value == pytest.approx(sum(value) / 24)
    assert row.right_to_wrong == sum(b > v for b, v in zip(base, value, strict=True))
    assert base != value, "noise of that size has to flip something, or this test shows nothing"
    assert record.gate_failures[0].startswith("recovery>=1000: it is")
    assert len(record.gate_failures) == 1


def test_the_baseline_is_measured_once_and_identity_is_by_content(
    pair: tuple[Path, Path], measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = measure()
    opened: list[str] = []
    real = Backend._transformers
    monkeypatch.setattr(Backend, "_transformers", lambda self, f, p: (opened.append(f.name), real(self, f, p))[1])
    moved = tmp_path / "elsewhere"
    shutil.copytree(pair[1], moved)
    (moved / "README.md").write_text("a card changes nothing")
    again = measure(moved)
    assert opened == []
    assert again.tasks[0].base == first.tasks[0].base
    assert again.checkpoint_sha256 == first.checkpoint_sha256
    # Another chat template is another model; another limit is another task.
    (moved / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UsageError, match=r"eval.json: it holds scores of other models .its checkpoint, .*--out"):
        measure(moved)
    assert opened == []
    measure(moved, out=tmp_path / "out")
    assert opened == ["elsewhere"]
    measure(limit=5)
    assert opened == ["elsewhere", "base", "other"]
    # Another document under the same name is another task, too.


def test_a_record_grows_by_what_each_command_measures(
    pair: tuple[Path, Path], tasks: Path, measure: Callable[..., EvalRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three commands with other limits and engine options give the averages that one command gives."""
    (tasks / "pier.yaml").write_text((tasks / "quiz.yaml").read_text().replace("ferry_quiz", "pier_quiz"))
    (tasks / "dock.yaml").write_text((tasks / "quiz.yaml").read_text().replace("ferry_quiz", "dock_quiz"))
    (tasks / "mine.yml").write_text("category: Mine\ntasks:\n- {task: ferry_quiz, metric: acc_norm}\n")
    first = measure(gates=parse_gates("recovery>=1000"))
    assert first.averages == []
    measure(suite=str(tasks / "mine.yml"), limit=7)
    record = measure(suite=["pier_quiz", "dock_quiz"], backend=Backend(device="cpu", batch_size=2), limit=9)
    assert read_record(EvalRecord, pair[1] / "eval.json") == record
    assert [(t.suite, t.task) for t in record.tasks] == [
        ("ferry_quiz", "ferry_quiz"), ("mine", "ferry_quiz"), ("pier_quiz", "pier_quiz"), ("dock_quiz", "dock_quiz"),
    ]  # fmt: skip
    assert replace(record.tasks[0], measured=None) == first.tasks[0]
    assert [record.measured(t).limit for t in record.tasks] == [None, 7, 9, 9]
    assert [record.measured(t).backend["batch_size"] for t in record.tasks] == [4, 4, 2, 2]
    assert record.measured(record.tasks[0]).date == first.run["date"]
    assert (record.gates, record.gate_failures) == ([], [])

    (average,) = record.averages  # of lm-eval's tasks, two of them of the last command
    assert average.tasks == ["ferry_quiz", "pier_quiz", "dock_quiz"]
    assert average.value == pytest.approx(sum(t.value for t in record.tasks if t.suite != "mine") / 3)
    strata = [
        [
            Stratum(
                base=np.array([json.loads(x)["score"] for x in (pair[1] / t.samples["base"]).read_text().splitlines()]),
                value=np.array(
                    [json.loads(x)["score"] for x in (pair[1] / t.samples["checkpoint"]).read_text().splitlines()]
                ),
                weight=1.0,
            )
        ]
        for t in record.tasks
        if t.suite != "mine"
    ]
    expected = average_of(strata).ratio_of_averages
    assert expected is not None
    assert average.ratio_of_averages == results.estimated(expected)

    # What is measured again replaces its row where it stands.
    again = measure(limit=5)
    assert [t.documents for t in again.tasks] == [5, 7, 9, 9]
    assert [t.measured is None for t in again.tasks] == [True, False, False, False]
    console = Console(width=200)
    render(console, again)
    shown = capsys.readouterr().out
    assert "pier_quiz *" in shown
    assert "ferry_quiz *" in shown
    assert "* measured by an earlier command (engine hf)" in shown

    # Without its samples a row stays, but is in no average.
    (pair[1] / again.tasks[2].samples["base"]).unlink()
    fewer = measure(suite="dock_quiz", limit=9)
    assert len(fewer.tasks) == 4
    assert fewer.averages[0].tasks == ["ferry_quiz", "dock_quiz"]


def test_scores_of_another_baseline_are_not_mixed_in(
    pair: tuple[Path, Path], measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure()
    kept = (pair[1] / "eval.json").read_bytes()
    monkeypatch.setattr(Backend, "_transformers", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=r"it holds scores of other models .its baseline, .*base, had other bytes"):
        measure(baseline=pair[1])
    assert (pair[1] / "eval.json").read_bytes() == kept
    (pair[1] / "eval.json").write_text("{}")
    with pytest.raises(HalfbyteError, match=r"eval\.json: is not a EvalRecord record"):
        measure()
    assert (pair[1] / "eval.json").read_text() == "{}"


def test_changed_documents_are_asked_again(
    pair: tuple[Path, Path], tasks: Path, measure: Callable[..., EvalRecord]
) -> None:
    first = measure()
    text = (tasks / "quiz.jsonl").read_text().replace("Seat 3 ", "Bench 3 ")
    (tasks / "quiz.jsonl").write_text(text)
    second = measure()
    assert first.tasks[0].config_sha256 != second.tasks[0].config_sha256


def test_a_killed_run_goes_on_with_the_answers_it_had(
    measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine dies after 40 of 72 requests; the second run asks it for the others alone."""
    from lm_eval.models.huggingface import HFLM

    asked: list[int] = []
    real = HFLM._model_call
    dies = {"after": 10}

    def counted(self: Any, *a: Any, **k: Any) -> Any:
        asked.append(len(a[0]))
        if dies["after"] and len(asked) > dies["after"]:
            raise KeyboardInterrupt
        return real(self, *a, **k)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    with pytest.raises(KeyboardInterrupt):
        measure()
    done = sum(asked[:-1])
    assert done > 0
    asked.clear()
    dies["after"] = 0
    resumed = measure()
    whole = 2 * 72
    assert sum(asked) <= whole - done
    asked.clear()
    fresh = measure(resume=False)
    assert sum(asked) > sum(asked[:1])
    assert [r.base for r in fresh.tasks] == pytest.approx([r.base for r in resumed.tasks])


def test_models_that_would_be_asked_differently_are_not_paired(
    pair: tuple[Path, Path], measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair[1] / "chat_template.jinja").write_text("{% for m in messages %}|{{ m['content'] }}{% endfor %}")
    monkeypatch.setattr(Backend, "_transformers", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(HalfbyteError, match="would not be asked the same prompts"):
        measure(chat_template=True)


def test_bad_input_is_told_before_a_model_is_loaded(
    pair: tuple[Path, Path], tasks: Path, measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "_transformers", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(harness_module.Harness, "everything", property(lambda self: self.near))
    with pytest.raises(UsageError, match=r"'ferry_quizz' is neither a suite nor .*Did you mean ferry_quiz"):
        measure(suite="ferry_quizz")
    with pytest.raises(UsageError, match="--allow-code-execution"):
        measure(suite="code")
    with pytest.raises(UsageError, match="halfbyte_capitals of quick would be measured twice"):
        measure(suite=["quick", "quick"])
    (tasks / "mine.yml").write_text("tasks: [ferry_quiz]\n")
    with pytest.raises(UsageError, match=r"--gate score.ferry_quiz>0: several of the suites have this task"):
        measure(suite=["ferry_quiz", str(tasks / "mine.yml")], gates=parse_gates("score.ferry_quiz>0"))
    with pytest.raises(UsageError, match="no such folder"):
        measure(tasks_dir=tasks / "absent")
    with pytest.raises(UsageError, match="--url"):
        measure(backend=Backend(name="openai-url"))
    (tasks / "broken.yaml").write_text(QUIZ.replace("ferry_quiz", "broken_quiz").replace("QUIZ_FILE", "absent.jsonl"))
    with pytest.raises(HalfbyteError, match=r"broken_quiz: its data set .* could not be loaded"):
        measure(suite="broken_quiz")


def test_an_unknown_metric_names_those_that_there_are(tasks: Path, measure: Callable[..., EvalRecord]) -> None:
    (tasks / "mine.yml").write_text("category: Mine\ntasks:\n- {task: ferry_quiz, metric: f1}\n")
    with pytest.raises(UsageError, match=r"no metric 'f1'. It has: acc, acc_norm"):
        measure(suite=str(tasks / "mine.yml"))


def test_the_suite_quick_measures_tasks_and_divergence(
    pair: tuple[Path, Path], measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import functools

    from halfbyte.evaluation import divergence

    monkeypatch.setattr(divergence, "compare", functools.partial(divergence.compare, tokens=64, window=32))
    record = measure(suite="quick", limit=6, gates=parse_gates("kl<=0"), out=tmp_path / "out")
    assert (tmp_path / "out/compare.json").exists()
    assert not (pair[1] / "compare.json").exists()
    assert [t.task for t in record.tasks] == ["halfbyte_opposites", "halfbyte_capitals"]
    assert record.divergence is not None
    assert record.divergence["kl_mean"] > 0
    assert record.gate_failures == [f"kl_mean<=0: it is {record.divergence['kl_mean']:.4g}"]
    (average,) = record.averages
    assert average.base == pytest.approx(sum(t.base for t in record.tasks) / 2)
    assert results.measured(record.tasks, None, []).keys() >= {"score.halfbyte_capitals"}


def test_arguments_for_the_engine() -> None:
    assert parse_arguments("max_length=4096,dtype=auto,rate=0.5,flag=true") == {
        "max_length": 4096, "dtype": "auto", "rate": 0.5, "flag": True,
    }  # fmt: skip
    with pytest.raises(UsageError, match="'4096' is not KEY=VALUE"):
        parse_arguments("4096")


def test_the_command_prints_the_record_and_ends_with_1_when_a_gate_fails(
    pair: tuple[Path, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from halfbyte.cli import main

    arguments = [
        "eval",
        pair[1],
        "--baseline",
        pair[0],
        "--suite",
        "ferry_quiz",
        "--tasks-dir",
        tasks,
        "--device",
        "cpu",
    ]
    arguments += ["--cache-dir", tmp_path / "cache", "--gate", "recovery>=1000", "--json"]
    monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.entry_point()
    said = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(said.out)["tasks"][0]["task"] == "ferry_quiz"
    assert "recovery>=1000: it is" in said.err
    monkeypatch.setattr("sys.argv", ["halfbyte", *map(str, arguments[:-3])])
    main.entry_point()
    said = capfd.readouterr()
    assert "ferry_quiz" in said.out
    assert "1 of 1 tasks are in the cache" in said.err


def test_a_server_that_is_not_there_is_told_before_a_task_runs(measure: Callable[..., EvalRecord]) -> None:
    pytest.importorskip("tenacity")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9/v1: no OpenAI-compatible server answers there"):
        measure(backend=Backend(name="openai-url", url="http://127.0.0.1:9/v1", base_url="http://127.0.0.1:9/v1"))


def test_prompts_to_servers_begin_with_bos_once(tiny_model: Models) -> None:
    from halfbyte.evaluation.backends import opens_with_bos, single_bos

    assert opens_with_bos(tiny_model("llama"))
    assert single_bos([1, 1, 7, 8], 1) == [1, 7, 8]
    assert single_bos([[1, 7], [1, 1, 9]], 1) == [[1, 7], [1, 9]]


def test_pictures_are_shown_to_the_model(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.models.hf_vlms import HFMultimodalLM

    shown: list[torch.Tensor] = []
    real = HFMultimodalLM._model_multimodal_generate
    monkeypatch.setattr(
        HFMultimodalLM,
        "_model_multimodal_generate",
        lambda self, inputs, **k: (shown.extend(inputs["pixel_values"]), real(self, inputs, **k))[1],
    )

    tasks, out = tmp_path / "tasks", tmp_path / "out"
    tasks.mkdir()
    rows = {
        "picture": [{"bytes": encoded(picture(40, 30, seed=i)), "path": None} for i in range(3)],
        "answer": ["bay"] * 3,
    }
    features = datasets.Features({"picture": datasets.Image(), "answer": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tasks / "seen.parquet")
    (tasks / "seen.yaml").write_text(
        f"task: seen\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {tasks / 'seen.parquet'}}}}}\n"
        'output_type: generate_until\ntest_split: test\ndoc_to_image: [picture]\ndoc_to_text: "<image> What is it?"\n'
        "doc_to_target: answer\ngeneration_kwargs: {until: [nothing], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "mine.yaml").write_text("tasks:\n- {task: seen, pictures: true, chat_template: true}\n")
    model, other = tiny_model("gemma3-vision"), tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"comment": "another identity, the same weights"}))
    record = evaluate(
        other, baseline=model, suite=str(tmp_path / "mine.yaml"), tasks_dir=tasks, out=out, cache=tmp_path / "cache",
        backend=Backend(device="cpu"),
    )  # fmt: skip
    assert record.tasks[0].documents == 3
    assert len({float(p.sum()) for p in shown[:3]}) == 3
    assert torch.equal(torch.stack(shown[:3]), torch.stack(shown[3:]))


def test_a_task_s_functions_are_known_by_their_source_in_every_process(tasks: Path) -> None:
    (tasks / "words.py").write_text(
        "from functools import partial\n\ndef some(docs, least):\n    return docs\n\nkept = partial(some, least=1)\n"
        "def asked(doc):\n    return doc['question']\n"
    )
    text = (tasks / "quiz.yaml").read_text().replace('"{{question}}"', "!function words.asked")
    (tasks / "quiz.yaml").write_text(text + "process_docs: !function words.kept\n")

    def digest() -> str:
        code = (
            "import sys; from pathlib import Path\n"
            "from halfbyte.evaluation.harness import Harness; from halfbyte.evaluation.suites import SuiteTask\n"
            "harness = Harness(Path(sys.argv[1]), limit=None, chat_template=None)\n"
            "loaded = harness.load(SuiteTask(suite='x', category='x', task='ferry_quiz', title='x'))\n"
            "print(harness.digest(loaded, {}))"
        )
        return subprocess.run([sys.executable, "-c", code, tasks], check=True, text=True, capture_output=True).stdout

    first = digest()
    assert digest() == first
    (tasks / "words.py").write_text((tasks / "words.py").read_text().replace("least=1", "least=2"))
    assert digest() != first


def test_errors_and_perplexities_have_no_recovery(
    tasks: Path, measure: Callable[..., EvalRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from halfbyte.cards.tables import recovery_of, rows_of
    from halfbyte.cli.eval import render

    text = (tasks / "quiz.yaml").read_text()
    (tasks / "quiz.yaml").write_text(
        text.replace("metric_list: [{metric: acc}", "metric_list: [{metric: acc, higher_is_better: false}")
    )
    (tasks / "text.yaml").write_text(
        QUIZ.split("output_type")[0].replace("ferry_quiz", "ferry_text").replace("QUIZ_FILE", str(tasks / "quiz.jsonl"))
        + 'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: word_perplexity}]\n"
    )
    record = measure(suite=["ferry_quiz", "ferry_text"], gates=parse_gates("recovery.ferry_quiz>=0"))
    wrong, text_row = record.tasks
    assert not wrong.higher_is_better
    assert wrong.difference is not None
    assert text_row.base > 1
    for row in record.tasks:
        assert row.recovery is row.verdict is recovery_of(row) is None
    assert record.gate_failures == ["recovery.ferry_quiz>=0: not measured in this run"]
    assert rows_of(record)[1].base == f"{text_row.base:.4g}"
    render(Console(width=200), record)
    assert f"{text_row.base:.4g}" in capsys.readouterr().out


def test_the_commands_that_are_printed_run_what_ran(
    pair: tuple[Path, Path], tasks: Path, measure: Callable[..., EvalRecord], tmp_path: Path
) -> None:
    import shlex

    from halfbyte.cli.main import cli

    (row,) = measure(limit=5, backend=Backend(device="cpu", batch_size=2, arguments={"max_length": 64})).tasks
    assert row.command is not None
    words = shlex.split(row.command.replace("\\\n", " "))
    assert words[:2] == ["halfbyte", "eval"]
    out, cache = ["--out", str(tmp_path / "out")], ["--cache-dir", str(tmp_path / "cache")]
    cli.main([*words[1:], *out, *cache], standalone_mode=False)
    again = read_record(EvalRecord, tmp_path / "out/eval.json")
    assert again.tasks[0].command == row.command
    assert again.limit == 5

    p = results.Prepared(
        task=SuiteTask(suite="s", category="c", task="arc_challenge", title="ARC", shots=25),
        loaded=None,
        settings={"chat_template": False, "fewshot_as_multiturn": False},
        digest="",
    )
    command = results.lm_eval_command("small", p, Backend(device="cpu", arguments={"max_length": 64}))
    assert '--model_args pretrained="small",dtype=float32,max_length=64 ' in command


def test_what_an_engine_cannot_answer_is_told_before_a_model_is_loaded(
    tasks: Path, measure: Callable[..., EvalRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tenacity")
    for method in ("_transformers", "_served"):
        monkeypatch.setattr(Backend, method, lambda *a: pytest.fail("a model was loaded"))
    with listing({"id": "a"}) as url:
        server = Backend(name="openai-url", url=url, base_url=url)
        chat = replace(server, chat=True)
        with pytest.raises(UsageError, match="ferry_quiz: it compares probabilities"):
            measure(backend=chat)
        (tasks / "mine.yml").write_text("tasks: [{task: ferry_quiz, pictures: true}]\n")
        with pytest.raises(UsageError, match="--backend openai-url: ferry_quiz: pictures are not shown to this engine"):
            measure(suite=str(tasks / "mine.yml"), backend=server)
        text = (
            (tasks / "quiz.yaml").read_text().replace("multiple_choice", "generate_until").replace("acc_norm", "bleu")
        )
        text = text.replace("{metric: acc}", "{metric: exact_match}").replace("doc_to_choice: choices\n", "")
        (tasks / "quiz.yaml").write_text(text + "generation_kwargs: {until: [x], max_gen_toks: 64}\n")
        with pytest.raises(UsageError, match="its prompts are plain texts"):
            measure(backend=chat)
        with pytest.raises(UsageError, match="may have 64 tokens, which leaves nothing of a context of 64"):
            measure(backend=Backend(device="cpu", arguments={"max_length": 64}))


def test_prompts_that_were_cut_are_told(measure: Callable[..., EvalRecord]) -> None:
    (whole,) = measure().tasks
    assert whole.note is None
    said: list[str] = []

    class Listener(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    (row,) = measure(backend=Backend(device="cpu", arguments={"max_length": 8}), reporter=Listener()).tasks
    assert row.note is not None
    assert row.note.startswith(results.CUT)
    assert sum(results.CUT in line for line in said) == 2


def test_activations_that_are_not_rounded_are_told(
    tiny_model: Models, measure: Callable[..., EvalRecord], tmp_path: Path
) -> None:
    from halfbyte import quantize

    quantize(tiny_model("llama"), tmp_path / "w8a8", scheme="W8A8", method="rtn")
    record = measure(tmp_path / "w8a8", baseline=tiny_model("llama"))
    assert record.backend["activations"] == "not rounded"
    assert "activations" not in measure().backend


def test_results_belong_to_what_the_engine_runs(tiny_model: Models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    engine = Backend(name="llamacpp")
    converted = engine.identity(folder, baseline=False)
    (folder / "mmproj.gguf").write_bytes(b"pictures")
    assert engine.identity(folder, baseline=False) == converted
    (folder / "small.gguf").write_bytes(b"one")
    one = engine.identity(folder, baseline=False)
    (folder / "small.gguf").write_bytes(b"two")
    assert len({str(i) for i in (converted, one, engine.identity(folder, baseline=False))}) == 3

    first = checkpoint_digest(open_checkpoint(folder, "model"))
    (folder / "tekken.json").write_text("{}")
    assert checkpoint_digest(open_checkpoint(folder, "model")) != first

    with listing({"id": "small-v2"}) as url:
        found = Backend(name="openai-url", url=url).identity(folder, baseline=False)
    assert (found["url"], found["model"]) == (url, "small-v2")


@contextlib.contextmanager
def listing(model: dict[str, Any]) -> Iterator[str]:
    """The address of what lists one model, as servers do. It stands for real ones only in what a listing holds."""

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [model]}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def test_servers_are_asked_as_much_as_both_can_hold(tiny_model: Models) -> None:
    folder = tiny_model("llama")
    with (
        listing({"id": "a", "max_model_len": 4096}) as longer,
        listing({"id": "b", "max_model_len": 3000}) as shorter,
        listing({"id": "c"}) as silent,
    ):

        def context(url: str, base_url: str, **arguments: Any) -> int | None:
            return Backend(name="openai-url", url=url, base_url=base_url, arguments=arguments).context(folder)

        assert context(longer, shorter) == context(shorter, longer) == 3000
        assert context(longer, longer) == 4096
        assert context(longer, silent) == 2048
        assert context(longer, shorter, max_length=100) == 100
        lm = Backend(name="openai-url", url=longer, base_url=shorter)
        with lm.open(folder, baseline=False, pictures=False, kept=folder, reporter=Silent()) as asked:
            assert (asked.model, asked.max_length) == ("a", 3000 - 1), "lm-eval keeps one for the first answered token"


def test_a_checkpoint_that_llama_cpp_cannot_run_is_told_before_the_baseline_is_measured(
    tiny_model: Models, measure: Callable[..., EvalRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    from halfbyte import quantize

    monkeypatch.setattr(Backend, "open", lambda *a, **k: pytest.fail("a model was loaded"))
    quantize(tiny_model("llama"), tmp_path / "fp8", scheme="FP8_DYNAMIC")
    with pytest.raises(HalfbyteError, match="float8 weights have no type in GGUF"):
        measure(tmp_path / "fp8", baseline=tiny_model("llama"), backend=Backend(name="llamacpp"))

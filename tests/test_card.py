"""Model cards: four published ones rendered again from records, and cards of tiny models whose programs are run."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import halfbyte
import seed_figures
from conftest import Models
from halfbyte.cards.facts import public_spec, read_facts
from halfbyte.cards.files import push
from halfbyte.cards.tables import discrepancies, recovery_of
from halfbyte.cards.write import LANGUAGES, _index_entries, card, evaluation_text, words
from halfbyte.checkpoint.reader import companion_files
from halfbyte.cli.main import cli
from halfbyte.errors import CheckpointError, HalfbyteError, UsageError
from halfbyte.evaluation_records import Estimated, EvalRecord, Measured, TaskResult
from halfbyte.recipe.load import load_recipe
from halfbyte.records import ConvertRecord, Manifest, read_record, write_json

WITH_TABLES = [name for name in seed_figures.SEEDS if name != "gemma-3-27b-qat-int4-flax-to-awq"]
# What the cards print that does not follow from their own scores: task -> (printed, computed).
WRONG = {
    "llama-3.3-70b-w8a8": {
        "OpenLLM v1/TruthfulQA (0-shot, mc2)": ("99.5%", 100.54),
        "OpenLLM v2/MMLU-Pro (5-shot)": ("99.7%", 99.42),
        "OpenLLM v2/IFEval (0-shot)": ("99.4%", 99.77),
    },
    "mistral-small-3.1-24b-w4a16": {},
    "gemma-3-27b-gptq-4b-128g": {},
}
# And what may follow from the scores that they had before these were rounded.
ROUNDED = {
    "llama-3.3-70b-w8a8": {
        "OpenLLM v2/GPQA (0-shot)": ("100.8%", 100.74),
        "多語言/泰語 MMLU (5-shot)": ("99.2%", 99.26),
    },
    "mistral-small-3.1-24b-w4a16": {"OpenLLM v1/MMLU (5-shot)": ("98.9%", 98.85)},
    "gemma-3-27b-gptq-4b-128g": {},
}


def folder_of(tmp_path: Path, name: str, record: EvalRecord) -> Path:
    folder = tmp_path / record.checkpoint.split("/")[-1]
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    write_json(folder / "eval.json", record)
    return folder


def tables_in(text: str) -> list[list[str]]:
    """Cells of all rows of all tables of a Markdown text."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[c.strip().strip("*") for c in line.strip("|").split("|")] for line in rows]


@pytest.mark.parametrize("name", list(seed_figures.SEEDS))
def test_the_figures_are_those_of_the_published_card(name: str) -> None:
    path = seed_figures.texts() / f"{name}.txt"
    if not path.is_file():
        pytest.skip(f"the published card is not here ({path})")
    found = seed_figures.read_seed(name, path.read_text(encoding="utf-8"))
    kept = seed_figures.figures(name)
    assert found["lines"] == kept["lines"]
    assert found["tables"] == kept["tables"]
    assert kept["lines"] or kept["tables"]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_card_prints_the_averages_and_recoveries_of_the_published_one(name: str, tmp_path: Path) -> None:
    record = seed_figures.record_of(name)
    lines = seed_figures.lines_of(name)
    rows = tables_in(card(folder_of(tmp_path, name, record)).text)
    table = [r for r in rows if len(r) == 5][1:]
    assert len(table) == len(lines), "a row for each published one, averages included"
    shares = bool(seed_figures.figures(name).get("shares"))
    for line, row in zip(lines, table, strict=True):
        assert row[1] == ("Average" if line.average else line.title)
        for printed, cell in ((line.base, row[2]), (line.value, row[3])):
            scale, digits = (100, 2) if shares else (1, 0)
            half = 0.5 * 10 ** -(len(printed.split(".")[1]) - digits)
            assert float(cell) == pytest.approx(
                scale * float(printed), abs=half + 0.005 + 1e-9 if line.average else 0.0051
            )
        wrong = (WRONG[name] | ROUNDED[name]).get(seed_figures.key_of(line))
        if line.recovery.endswith("%") and wrong is None:
            digits = len(line.recovery.rstrip("%").split(".")[1])
            assert float(row[4].rstrip("%")) == pytest.approx(
                float(line.recovery.rstrip("%")), abs=0.051 if digits else 1
            )
        elif line.recovery == "N/A":
            assert row[4] == "N/A"


@pytest.mark.parametrize("name", WITH_TABLES)
def test_where_the_published_arithmetic_is_off(name: str) -> None:
    printed = {seed_figures.key_of(line): line.recovery for line in seed_figures.lines_of(name)}
    found = discrepancies(seed_figures.record_of(name), printed)
    told = [{d.task: (d.printed, round(d.computed, 2)) for d in found if d.rounding is r} for r in (False, True)]
    assert told == [WRONG[name], ROUNDED[name]]


def test_a_known_slip_is_found() -> None:
    """34.90 -> 32.68 is 93.6 %, whatever a card says."""
    row = TaskResult(suite="s", category="c", task="t", title="t", metric="m", base=0.3490, value=0.3268)
    record = seed_figures.published_record("b", "q", [row], source="x")
    assert [(d.printed, round(d.computed, 1)) for d in discrepancies(record, {"t": "98.8%"})] == [("98.8%", 93.6)]


def test_figures_of_the_base_model_are_carried_over_as_they_are(tmp_path: Path) -> None:
    name = "gemma-3-27b-qat-int4-flax-to-awq"
    record = seed_figures.record_of(name)
    text = card(folder_of(tmp_path, name, record)).text
    rows = tables_in(text)
    for table in seed_figures.figures(name)["tables"]:
        for row in table["rows"]:
            assert row in rows
    assert "Recovery" not in text, "nothing was measured on this model, so nothing is said of it"


def test_a_baseline_of_nothing_has_no_recovery() -> None:
    row = TaskResult(suite="s", category="c", task="t", title="t", metric="m", base=0.0017, value=0.0)
    assert recovery_of(row) is None


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_language_has_every_word_with_its_blanks(lang: str) -> None:
    blanks = re.compile(r"\{(\w+)\}")
    for key, text in words("en").items():
        assert sorted(blanks.findall(words(lang)[key])) == sorted(blanks.findall(text)), key
    assert words(lang).keys() == words("en").keys()


@pytest.mark.parametrize("lang", LANGUAGES)
def test_engine_and_limit_are_told_of_the_rows_that_they_are_of(lang: str) -> None:
    """Rows of several commands: what is true of all is said once, else with the rows' names."""

    def row(task: str, measured: Measured | None = None) -> TaskResult:
        return TaskResult(
            suite="s", category="c", task=task, title=task, metric="m", base=1, value=1, measured=measured
        )

    def record(*rows: TaskResult) -> EvalRecord:
        return EvalRecord(
            format_version=1, base="b", checkpoint="c", base_sha256=None, checkpoint_sha256=None, suites=[],
            backend={"backend": "vllm"}, limit=None, versions={"vllm": "9.8"}, tasks=list(rows), averages=[],
        )  # fmt: skip

    w = words(lang)
    earlier = Measured(backend={"backend": "llamacpp"}, limit=40, versions={"xllamacpp": "7.6"})
    mixed = record(row("A", earlier), row("B"), row("C", earlier))
    text = evaluation_text(mixed, w)
    assert w["engine_some"].format(titles="A, C", engine="llama.cpp 7.6") in text
    assert w["engine_some"].format(titles="B", engine="vLLM 9.8") in text
    assert w["limit_some"].format(titles="A, C", limit=40) in text
    plain = evaluation_text(record(row("A"), row("B")), w)
    assert w["engine"].format(engine="vLLM 9.8") in plain
    assert "40" not in plain
    names = [e.dataset_name for e in _index_entries(mixed, "text-generation")]
    assert names == ["A, first 40 documents", "B", "C, first 40 documents"]


# Cards of real checkpoints


@pytest.fixture(scope="module")
def made(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with a card of its own, and what was made of it: quantised, verified, compared."""
    base = tmp_path_factory.mktemp("card")
    source, out = base / "source", base / "small"
    shutil.copytree(tiny_model("llama"), source)
    (source / "README.md").write_text(
        "---\nlicense: llama3.3\nlicense_name: Llama 3.3\nlicense_link: https://example.org/licence\n"
        "language: [en, de]\n---\n# Source\n\n```\n@article{source,\n  title={Source}\n}\n```\n"
    )
    halfbyte.quantize(
        source, out, scheme="W4A16", group_size=32, calibration="random-tokens", samples=4, seq_len=32, effort="low"
    )
    halfbyte.verify(out, source=source)
    halfbyte.compare(source, out, tokens=64, window=32)
    return source, out


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_card_round_trips_through_the_hub_library(made: tuple[Path, Path]) -> None:
    source, out = made
    written = card(out, source=source, repo_id="org/small", base_model="meta-llama/Llama-3.3-70B-Instruct")
    loaded = ModelCard.load(out / "README.md")
    assert str(loaded) == written.text
    data = loaded.data
    assert data.base_model == "meta-llama/Llama-3.3-70B-Instruct"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.license_name, data.license_link) == (
        "llama3.3",
        "Llama 3.3",
        "https://example.org/licence",
    )
    assert data.language == ["en", "de"]
    assert {"quantized", "compressed-tensors", "w4a16"} <= set(data.tags)
    assert data.pipeline_tag == "text-generation"
    manifest = read_record(Manifest, out / "halfbyte.json")
    assert f"{manifest.bits_per_weight:.3f}" in written.text
    assert manifest.calibration is not None
    assert manifest.calibration.sha256 in written.text
    assert "@article{source" in written.text
    assert written.notes == []


def test_the_licence_is_the_source_s_where_the_manifest_says_which_that_is(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    shutil.copytree(made[1], out)
    assert "license: llama3.3" in card(out, write=False).text
    manifest = json.loads((out / "halfbyte.json").read_text())
    manifest["source"]["name"] = "source"
    (out / "halfbyte.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(made[0].parent)
    assert "license" not in card(out, write=False).text, "another folder may have that name here"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_card_names_a_path_of_the_machine_that_wrote_it(made: tuple[Path, Path], lang: str) -> None:
    source, out = made
    text = card(out, source=source, lang=lang, write=False).text
    assert str(source.parent) not in text
    assert words(lang)["limitations_text"] in text


def test_what_no_record_knows_is_left_out(tmp_path: Path, tiny_model: Models) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "plain")
    written = card(tmp_path / "plain")
    assert len(written.notes) == 2
    assert "license" not in written.text
    for heading in ("what", "creation", "evaluation", "deployment", "licence", "citation"):
        assert f"## {words('en')[heading]}\n" not in written.text
    assert words("en")["limitations_no_eval"] in written.text
    assert not tables_in(written.text)


def test_programs_in_the_card_run(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As they stand, in the folder that holds the checkpoint; vLLM's in tests/engines/test_card_programs.py."""
    source, out = made
    text = card(out, source=source, write=False).text
    monkeypatch.chdir(out.parent)
    blocks = [b for b in code_blocks(text, "python") if "import halfbyte" not in b]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        compile(block, f"block {number}", "exec")
        if "vllm" not in block:
            (out.parent / "program.py").write_text(block.replace('device_map="auto"', 'device_map="cpu"'))
            runpy.run_path(str(out.parent / "program.py"))
    assert capsys.readouterr().out.strip() != ""
    for block in code_blocks(text, "bash"):
        for line in re.split(r"(?<!\\)\n", block.strip()):
            if line.strip():
                assert shlex.split(line)
    (body,) = re.findall(r"-d '(.*)'", text)
    assert json.loads(body)["model"] == "./small"


def test_the_command_in_the_card_makes_the_same_checkpoint(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made
    (command,) = [b for b in code_blocks(card(out, source=source, write=False).text, "bash") if "quantize" in b]
    words_ = shlex.split(command)
    assert words_[:4] == ["halfbyte", "quantize", "source", "./small"]
    monkeypatch.chdir(out.parent)
    cli.main([*words_[1:3], "./again", *words_[4:]], standalone_mode=False)
    first, second = (read_record(Manifest, p / "halfbyte.json") for p in (out, out.parent / "again"))
    assert first.files == second.files
    (block,) = [b for b in code_blocks(card(out, source=source, write=False).text, "python") if "import halfbyte" in b]
    called: dict[str, Any] = {}
    monkeypatch.setattr("halfbyte.pipeline.quantize", lambda *a, **k: called.update(k, arguments=a))
    exec(compile(block, "card", "exec"), {})
    assert called["arguments"] == ("source", "./small")
    assert called["scheme"] == "W4A16"


def test_recipes_in_the_card_ask_for_what_was_done(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    blocks = code_blocks(card(out, source=source, write=False).text, "yaml")
    (tmp_path / "recipe.yaml").write_text(blocks[-1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (group,) = recipe.groups
    assert group.scheme.name == "W4A16"
    assert group.scheme.weights.group_size == 32


def test_a_recipe_of_several_groups_goes_with_the_command(tiny_model: Models, tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(
        "scheme: W4A16\ngroup_size: 32\ngroups: [{scheme: W8A16, targets: ['re:.*down_proj']}]\nmethod: rtn\n"
    )
    halfbyte.quantize(tiny_model("llama"), tmp_path / "mixed", recipe=tmp_path / "mixed.yaml")
    text = card(tmp_path / "mixed", write=False).text
    (tmp_path / "recipe.yaml").write_text(code_blocks(text, "yaml")[0])
    again = load_recipe(tmp_path / "recipe.yaml")
    original = load_recipe(tmp_path / "mixed.yaml")
    assert {(g.scheme.name, g.scheme.weights.group_size) for g in again.groups} >= {
        ("W8A16", None)
    } or again == original
    assert "--recipe recipe.yaml" in text
    assert "| 8" in text or "W8A16" in text


def test_evaluation_rows_have_intervals_commands_and_files_for_the_hub(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    shutil.copytree(made[1], out)
    row = TaskResult(
        suite="openllm-v1", category="OpenLLM v1", task="arc_challenge", title="ARC Challenge (25-shot)",
        metric="acc_norm", base=0.5, value=0.495, shots=25, documents=1172,
        recovery=Estimated(value=99.0, low=98.1, high=99.9), command='lm_eval --model vllm pretrained="/data/small"',
    )  # fmt: skip
    record = seed_figures.published_record("/data/base", "/data/small", [row], source="x")
    write_json(out / "eval.json", record)
    written = card(out, repo_id="org/small")
    assert ["OpenLLM v1", "ARC Challenge (25-shot)", "50.00", "49.50", "99.0% (98.1 – 99.9)"] in tables_in(written.text)
    assert 'pretrained="org/small"' in written.text
    assert "/data/" not in written.text
    (name,) = written.results
    assert name == ".eval_results/ai2_arc.yaml"
    (entry,) = yaml.safe_load((out / name).read_text())
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "ARC-Challenge"}
    assert entry["value"] == 49.5
    (result,) = ModelCard.load(out / "README.md").data.eval_results
    assert (result.dataset_type, result.metric_value, result.metric_type) == ("allenai/ai2_arc", 49.5, "acc_norm")


def evaluated(made: tuple[Path, Path], tmp_path: Path, task: str = "arc_challenge", **changed: Any) -> Path:
    """A copy of the checkpoint in a folder named ``model``, with a record of one task."""
    out = tmp_path / "model"
    shutil.copytree(made[1], out, dirs_exist_ok=True)
    row = TaskResult(
        suite="s", category="c", task=task, title="ARC", metric="acc", base=0.5, value=0.495,
        command='lm_eval \\\n  --model hf \\\n  --model_args pretrained="model",dtype=auto \\\n  --tasks arc_challenge',
    )  # fmt: skip
    record = seed_figures.published_record("models/base", "model", [row], source="x")
    write_json(out / "eval.json", dataclasses.replace(record, **changed))
    return out


def test_commands_name_the_repository_and_are_otherwise_as_they_were(made: tuple[Path, Path], tmp_path: Path) -> None:
    text = card(evaluated(made, tmp_path), repo_id="org/small", write=False).text
    assert '--model hf \\\n  --model_args pretrained="org/small",dtype=auto \\\n' in text


def test_results_of_an_earlier_card_go_and_somebody_elses_stay(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = evaluated(made, tmp_path)
    card(out)
    (out / ".eval_results/mine.yaml").write_text("- value: 1\n")
    card(evaluated(made, tmp_path, "gsm8k"))
    assert sorted(p.name for p in (out / ".eval_results").iterdir()) == ["gsm8k.yaml", "mine.yaml"]


def test_scores_of_the_first_documents_say_so_to_the_hub(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = evaluated(made, tmp_path, limit=40)
    written = card(out)
    (result,) = ModelCard.load(out / "README.md").data.eval_results
    assert result.dataset_name == "ARC, first 40 documents"
    assert "first 40 documents" in written.results[".eval_results/ai2_arc.yaml"]


@pytest.mark.parametrize(("origin", "known"), [("folder", False), (None, False), ("hub", True)])
def test_only_what_is_known_to_be_a_hub_id_is_published_as_one(
    made: tuple[Path, Path], tmp_path: Path, origin: str | None, known: bool
) -> None:
    out = tmp_path / "small"
    shutil.copytree(made[1], out)
    manifest = json.loads((out / "halfbyte.json").read_text())
    assert manifest["source"]["origin"] == "folder"
    manifest["source"] |= {"name": "models/base", "origin": origin}
    if origin is None:
        del manifest["source"]["origin"]
    (out / "halfbyte.json").write_text(json.dumps(manifest))
    written = card(out, write=False)
    assert ("https://huggingface.co/models/base" in written.text) is known
    assert ("base_model: models/base" in written.text) is known
    assert any("--base-model" in note for note in written.notes) is not known


def test_a_converted_checkpoint_says_from_what(made: tuple[Path, Path], tmp_path: Path) -> None:
    halfbyte.convert(made[1], tmp_path / "awq", to="awq", allow_requantize=True)
    record = read_record(ConvertRecord, tmp_path / "awq/convert.json")
    text = card(tmp_path / "awq", write=False).text
    assert f"{record.exact} of {record.quantized} quantised weights" in text
    assert "| small (compressed-tensors) to awq;" in text
    assert str(made[1].parent) not in text


def test_what_was_measured_of_one_checkpoint_does_not_travel_with_another(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = evaluated(made, tmp_path)
    (out / "bench.json").write_text("{}")
    assert not {"eval.json", "bench.json"} & {f.name for f in companion_files(out)}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_gguf_names_programs_that_run_it(made: tuple[Path, Path], lang: str, tmp_path: Path) -> None:
    halfbyte.convert(made[1], tmp_path / "g", to="gguf")
    text = card(tmp_path / "g", lang=lang, write=False).text
    assert f"### {words(lang)['with_llamacpp']}\n" in text
    assert "library_name: gguf" in text
    assert not re.search("AutoModel|vllm", text)
    (program,) = code_blocks(text, "python")
    compile(program, "program", "exec")
    (server,) = code_blocks(text, "bash")
    assert server.startswith("halfbyte serve ./g\n")
    for folder, name in re.findall(r"\./(\w+)/([\w.]+)", program + server):
        assert (tmp_path / folder / name).is_file()
    published = card(tmp_path / "g", repo_id="org/g", lang=lang, write=False).text
    assert 'Llama.from_pretrained(repo_id="org/g", filename="model.gguf"' in published
    assert "llama-server --hf-repo org/g --hf-file model.gguf" in published


def test_pictures(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from PIL import Image

    shutil.copytree(tiny_model("gemma3-vision"), tmp_path / "sees")
    text = card(tmp_path / "sees", write=False).text
    assert "pipeline_tag: image-text-to-text" in text
    blocks = [b for b in code_blocks(text, "python") if "transformers" in b]
    assert ["PIL" in b for b in blocks] == [False, True]
    # AutoModelForCausalLM knows Gemma 3 but not most others that see pictures.
    assert all("AutoModelForImageTextToText" in b for b in blocks)
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        (tmp_path / "program.py").write_text(block.replace('device_map="auto"', 'device_map="cpu"'))
        runpy.run_path(str(tmp_path / "program.py"))


def test_somebody_elses_card_is_kept(tmp_path: Path, tiny_model: Models) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "plain")
    (tmp_path / "plain/README.md").write_text("# Mine\n")
    card(tmp_path / "plain")
    card(tmp_path / "plain")
    assert (tmp_path / "plain/README.source.md").read_text() == "# Mine\n"


def test_deployments_are_listed(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    shutil.copytree(made[1], out)
    halfbyte.deploy("compose", out, out / "deploy/compose")
    assert "deploy/compose/compose.yaml" in read_facts(out).deployments["compose"]
    assert "[`deploy/compose/compose.yaml`](deploy/compose/compose.yaml)" in card(out, write=False).text


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("text:/home/me/data/notes.txt", "text:notes.txt"),
        ("hf:org/data*0.5+vlm:/a/b*0.5", "hf:org/data*0.5+vlm:b*0.5"),
        ("self", "self"),
    ],
)
def test_specs_lose_their_folders(spec: str, shown: str) -> None:
    assert public_spec(spec) == shown


def test_bad_input(tmp_path: Path, made: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        card(tmp_path)
    with pytest.raises(UsageError, match="'small' is no hub id"):
        card(made[1], repo_id="small")
    with pytest.raises(UsageError, match="no words in 'xx'"):
        card(made[1], lang="xx")
    broken = tmp_path / "broken"
    shutil.copytree(made[1], broken)
    (broken / "eval.json").write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"eval\.json: is not a EvalRecord record"):
        card(broken)


def test_pushing_sends_the_folder_without_samples(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    out = evaluated(made, tmp_path, base="/home/me/base", run={"out": ["/home/me/eval/x.jsonl"]})
    (out / "bench.json").write_text('{"measured": [{"target": "/home/me/small"}, {"target": "http://host/v1"}]}')
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

        def create_commit(self, repo_id: str, **options: Any) -> None:
            calls.append(("commit", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(out, "org/small") == "https://huggingface.co/org/small"
    ignored = calls[1][1]["ignore_patterns"]
    sent = {o.path_in_repo: o.path_or_fileobj.decode() for o in calls[2][1]["operations"]}
    offered = ["eval/x.jsonl", "deploy/triton/1/model.safetensors", "model.safetensors", "deploy/triton/config.pbtxt"]
    assert [p for p in offered if not any(fnmatch.fnmatch(p, i) for i in ignored)] == offered[2:]
    assert set(sent) <= set(ignored), "each record goes once"
    assert {"eval.json", "halfbyte.json"} <= set(sent)
    assert not any("/home/" in text or str(tmp_path.parent) in text for text in sent.values())
    assert [m["target"] for m in json.loads(sent["bench.json"])["measured"]] == ["small", "http://host/v1"]
    record = json.loads(sent["eval.json"])
    assert (record["base"], record["run"]["out"]) == ("base", ["x.jsonl"])


def test_a_hub_that_is_not_reached_is_one_clear_error(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Nowhere(huggingface_hub.HfApi):
        def __init__(self) -> None:
            super().__init__(endpoint="http://127.0.0.1:1", token="x")

    monkeypatch.setattr(huggingface_hub, "HfApi", Nowhere)
    with pytest.raises(HalfbyteError, match=r"org/small: it could not be uploaded .*Check the network"):
        push(made[1], "org/small")

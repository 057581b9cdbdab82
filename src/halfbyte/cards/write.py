"""``card``: a model card from what is known of a checkpoint, its metadata, and the hub's files of results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from halfbyte.cards import snippets
from halfbyte.cards.creation import creation_of, source_label
from halfbyte.cards.facts import CARRIED, HUB_ID, Facts, public_name, public_spec, read_facts
from halfbyte.cards.files import RESULTS_FOLDER, RESULTS_MARK, write_card
from halfbyte.cards.tables import rows_of
from halfbyte.errors import UsageError
from halfbyte.evaluation_records import EvalRecord, score_text

CARD_NAME = "README.md"
LANGUAGES = ("en", "zh", "ko")
ENGINES = {"hf": "transformers", "vllm": "vLLM", "llamacpp": "llama.cpp", "openai-url": "OpenAI API"}
PACKAGES = {"transformers": "transformers", "vLLM": "vllm", "llama.cpp": "xllamacpp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What :func:`card` wrote.

    Attributes:
        text: README.md, metadata included.
        results: ``.eval_results/NAME.yaml`` -> content.
        notes: what is missing, and how it could be given.
    """

    text: str
    results: dict[str, str]
    notes: list[str]


def card(
    checkpoint: str | Path,
    *,
    source: str | Path | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    lang: str = "en",
    write: bool = True,
) -> Card:
    """Write the model card of a checkpoint.

    Args:
        checkpoint: its folder.
        source: folder of the base model, whose card has licence, languages and citation.
        repo_id: ``ORG/NAME`` that it will be published as; its programs name it.
        base_model: hub id of the base model, where the records know a folder only.
        licence: where the source's card does not say.
        lang: ``en``, ``zh`` or ``ko``.
        write: leave README.md and .eval_results/ in the folder.

    Raises:
        UsageError: an option is wrong; CheckpointError: a record cannot be read.
    """
    folder = Path(checkpoint)
    if lang not in LANGUAGES:
        raise UsageError(f"there are no words in {lang!r}", where="--lang", remedy=f"Use {', '.join(LANGUAGES)}.")
    for option, name in (("--repo-id", repo_id), ("--base-model", base_model)):
        if name is not None and not HUB_ID.fullmatch(name):
            raise UsageError(f"{name!r} is no hub id", where=option, remedy="Write ORG/NAME.")
    facts = read_facts(folder, Path(source) if source else None)
    base_model = base_model or facts.source_id
    notes: list[str] = []
    data = metadata(facts, repo_id or folder.resolve().name, base_model, licence, notes)
    text = f"---\n{data.to_yaml()}\n---\n\n" + body(facts, repo_id, base_model, data, lang)
    results = result_files(facts.evaluation)
    if write:
        write_card(folder, text, results)
    return Card(text=text, results=results, notes=notes)


def words(lang: str) -> dict[str, str]:
    """The words of a language."""
    content = (files("halfbyte.cards") / "words.yaml").read_text(encoding="utf-8")
    found: dict[str, str] = yaml.safe_load(content)[lang]
    return found


def metadata(facts: Facts, name: str, base_model: str | None, licence: str | None, notes: list[str]) -> Any:
    """The card's front matter, a ``huggingface_hub.ModelCardData``."""
    from huggingface_hub import ModelCardData

    given = {k: facts.source_metadata[k] for k in CARRIED if facts.source_metadata.get(k)}
    if licence:
        given = {"license": licence} | {k: v for k, v in given.items() if k == "language"}
    if "license" not in given:
        notes.append("the licence is not known: name the base model's folder with --source, or --license")
    if base_model is None:
        notes.append("the base model's hub id is not known: give --base-model ORG/NAME")
    tags = ["quantized", "halfbyte"]
    method = facts.quantization.get("quant_method")
    if isinstance(method, str):
        tags.append(method)
    if facts.gguf_files:
        tags.append("gguf")
    tags += sorted({u.scheme.lower() for u in facts.schemes})
    task = "image-text-to-text" if facts.pictures else "text-generation"
    entries = _index_entries(facts.evaluation, task)
    return ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="gguf" if facts.gguf_files else "transformers",
        pipeline_tag=task,
        tags=tags,
        model_name=name if entries else None,
        eval_results=entries or None,
        **given,
    )


def datasets() -> dict[str, dict[str, str]]:
    """Task -> data set on the hub."""
    content = (files("halfbyte.cards") / "datasets.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = yaml.safe_load(content)
    return found


def _index_entries(record: EvalRecord | None, task: str) -> list[Any]:
    """This model's scores for ``model-index``."""
    from huggingface_hub import EvalResult

    if record is None:
        return []
    known = datasets()
    entries = []
    for t in record.tasks:
        where, limit = known.get(t.task, {}), record.measured(t).limit
        entries.append(
            EvalResult(
                task_type=task,
                task_name="Image-text to text" if task == "image-text-to-text" else "Text generation",
                dataset_type=where.get("id", t.task),
                dataset_name=f"{t.title}, first {limit} documents" if limit else t.title,
                dataset_config=where.get("config"),
                metric_type=t.metric.split(",")[0],
                metric_name=t.metric,
                metric_value=float(score_text(t.value, share=t.is_share)),
                dataset_args={"num_few_shot": t.shots} if t.shots is not None else None,
            )
        )
    return entries


def result_files(record: EvalRecord | None) -> dict[str, str]:
    """``.eval_results/*.yaml`` for tasks whose data set on the hub is known: one file for each data set."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if record is None:
        return {}
    known = datasets()
    by_file: dict[str, list[EvalResultEntry]] = {}
    for t in record.tasks:
        if t.task in known:
            where, measured = known[t.task], record.measured(t)
            notes = [f"metric {t.metric}", *([] if t.shots is None else [f"{t.shots}-shot"])]
            notes += [f"first {measured.limit} documents"] if measured.limit else []
            entry = EvalResultEntry(
                dataset_id=where["id"],
                task_id=where.get("config", "default"),
                value=float(score_text(t.value, share=t.is_share)),
                date=measured.date,
                notes=", ".join(notes),
            )
            by_file.setdefault(where["id"].split("/")[-1].lower(), []).append(entry)
    return {
        f"{RESULTS_FOLDER}/{name}.yaml": RESULTS_MARK
        + yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        for name, entries in by_file.items()
    }


def body(facts: Facts, repo_id: str | None, base_model: str | None, data: Any, lang: str) -> str:
    """The card's text after its metadata."""
    w = words(lang)
    name = (repo_id or facts.folder.resolve().name).split("/")[-1]
    # Where it is not published yet, programs find it beside them.
    model = repo_id or f"./{facts.folder.resolve().name}"
    base = source_label(facts, base_model)
    chat = has_template(facts.folder)
    record = facts.evaluation
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda n: (files("halfbyte.cards") / n).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    context: dict[str, Any] = {
        "w": w,
        "title": name,
        "summary": w["summary"].format(name=name, base=_link(base)) if base else w["summary_no_base"].format(name=name),
        "creation": creation_of(facts, base or "SOURCE", f"./{name}"),
        "snippets": programs(facts, model, local=repo_id is None, chat=chat),
        "rows": rows_of(record, w["absent"], w["average"]) if record else [],
        "base_name": base.split("/")[-1] if base else "",
        "this_name": w["this_model"].format(name=name),
        "evaluation_text": evaluation_text(record, w) if record else "",
        "commands": [(t.title, command_for(t.command, record.checkpoint, model)) for t in record.tasks if t.command]
        if record
        else [],
        "published": [
            {
                "heading": w["published"].format(source=t.source, title=t.title),
                "columns": t.columns,
                "rows": t.rows,
            }
            for t in (record.published if record else [])
        ],
        "deployments": facts.deployments,
        "limitations": w["limitations_text"]
        + ("" if record and (record.tasks or record.published) else f" {w['limitations_no_eval']}"),
        "licence": licence_text(data, w),
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(versions_of(facts).items())),
        "citation": facts.citation,
        **what(facts, w),
        **divergence(facts, w),
    }
    text = environment.get_template("card.md.jinja").render(**context)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def command_for(command: str, checkpoint: str, model: str) -> str:
    """A record's command with another name for the checkpoint that it measures."""
    for form in ('pretrained="{}"', "halfbyte eval {} --"):
        command = command.replace(form.format(checkpoint), form.format(model))
    return command


def programs(facts: Facts, model: str, *, local: bool, chat: bool) -> dict[str, str]:
    """Programs that run the model, by engine; those of engines that cannot are empty."""
    found = dict.fromkeys(("text", "picture", "vllm", "llamacpp", "serve"), "")
    if facts.gguf_files:
        return found | {
            "llamacpp": snippets.llamacpp_snippet(model, facts.gguf_files[0], local=local, chat=chat),
            "serve": snippets.llamacpp_serve_snippet(model, facts.gguf_files, local=local, chat=chat),
        }
    found["text"] = snippets.transformers_snippet(model, chat=chat, pictures=facts.pictures)
    if facts.pictures:
        found["picture"] = snippets.picture_snippet(model)
    if served_by_vllm(facts):
        found["vllm"] = snippets.vllm_snippet(model, chat=chat)
        found["serve"] = snippets.serve_snippet(model, chat=chat)
    return found


def what(facts: Facts, w: Mapping[str, str]) -> dict[str, Any]:
    """What was quantised, and how: cells of the first table."""
    m = facts.manifest
    converted = conversion(facts, w)
    empty: dict[str, Any] = {"schemes": [], "calibration": "", "bits": "", "size": "", "error": "", "verified": ""}
    empty["converted"] = converted
    kept = ", ".join(f"`{p}`" for p in facts.kept)
    if m is None:
        return empty | {"kept": kept}
    schemes = []
    for use in facts.schemes:
        group = "" if use.group_size is None else w["group"].format(size=use.group_size)
        damp, effort = m.recipe.get("damp_fraction"), m.recipe.get("effort")
        method = w["gptq"].format(damp=damp, effort=effort) if use.method == "gptq" else w["rtn"]
        schemes.append(
            w["linears"].format(linears=use.linears, scheme=use.scheme, group=group or w["row"], method=method)
        )
    calibration = w["calibration_none"]
    if m.calibration is not None:
        c = m.calibration
        calibration = w["calibration_text"].format(
            samples=c.samples, tokens=f"{c.tokens:,}", spec=public_spec(c.spec), sha256=c.sha256
        )
        if c.images:
            calibration += "; " + w["pictures_used"].format(images=c.images, samples=c.image_samples)
    errors = [x.relative_error for x in m.linears if math.isfinite(x.relative_error)]
    verified = ""
    if facts.verify is not None:
        passed = sum(c.status == "passed" for c in facts.verify.checks)
        verified = w["verified_text"].format(tensors=facts.verify.tensors, checks=passed)
        failed = [c.name for c in facts.verify.checks if c.status == "failed"]
        if failed:
            verified += "; " + w["verify_failed"].format(checks=", ".join(failed))
    return {
        "converted": converted,
        "schemes": schemes,
        "calibration": calibration,
        "kept": ", ".join(filter(None, [kept, w["kept_rest"]])),
        "bits": f"{m.bits_per_weight:.3f}",
        "size": w["size_text"].format(before=size(m.bytes_before), after=size(m.bytes_after)),
        "error": f"{sum(errors) / len(errors):.4g}" if errors else "",
        "verified": verified,
    }


def conversion(facts: Facts, w: Mapping[str, str]) -> str:
    """What it was converted from, and what of that is unchanged; empty for what was not converted."""
    r = facts.convert
    if r is None:
        return ""
    source = public_name(str(r.source.get("name", "")))
    parts = [w["converted_text"].format(name=source, format=r.source.get("format", "?"), target=r.target)]
    if r.quantized:
        parts.append(w["converted_exact"].format(exact=r.exact, quantized=r.quantized))
    if r.requantized:
        names = [f"`{x.name}` ({x.grid}, {x.relative_error:.2g})" for x in r.requantized]
        listed = ", ".join(names[:5]) + (f", + {len(names) - 5}" if len(names) > 5 else "")
        parts.append(w["converted_rounded"].format(names=listed))
    return "; ".join(parts)


def divergence(facts: Facts, w: Mapping[str, str]) -> dict[str, Any]:
    """Divergence from eval.json, or else from compare.json."""
    metrics, text = None, ""
    if facts.evaluation is not None and facts.evaluation.divergence is not None:
        metrics, text = facts.evaluation.divergence, facts.evaluation.divergence_text or ""
    elif facts.compare is not None:
        metrics, text = facts.compare.metrics, f"{facts.compare.tokens:,} tokens of {Path(facts.compare.text).name}"
    if metrics is None:
        return {"divergence": [], "divergence_text": ""}
    lines = [
        (w["kl"], f"{metrics['kl_mean']:.5f} ± {metrics['kl_se']:.5f} nats"),
        (w["ppl"], f"{metrics['perplexity_ratio']:.4f} ± {metrics['perplexity_ratio_se']:.4f}"),
        (w["top1"], f"{100 * metrics['top1_agreement']:.2f}% ± {100 * metrics['top1_agreement_se']:.2f}%"),
    ]
    return {"divergence": lines, "divergence_text": w["divergence_text"].format(text=text)}


def evaluation_text(record: EvalRecord, w: Mapping[str, str]) -> str:
    """What the table's numbers are."""
    any_interval = any(t.recovery is not None and t.recovery.low is not None for t in record.tasks)
    parts = [w["interval_text"] if any_interval else w["no_interval_text"]]
    by_engine: dict[str, list[str]] = {}
    by_limit: dict[int, list[str]] = {}
    for t in record.tasks:
        measured = record.measured(t)
        engine = ENGINES.get(str(measured.backend.get("backend")))
        if engine:
            version = measured.versions.get(PACKAGES.get(engine, ""), "")
            by_engine.setdefault(f"{engine} {version}".strip(), []).append(t.title)
        if measured.limit:
            by_limit.setdefault(measured.limit, []).append(t.title)
    # Which rows are meant is said only where not all are.
    for words, found in (("engine", by_engine), ("limit", by_limit)):
        for value, titles in found.items():
            given = {words: value, "titles": ", ".join(titles)}
            parts.append(w[words if len(titles) == len(record.tasks) else f"{words}_some"].format(**given))
    return " ".join(parts)


def versions_of(facts: Facts) -> dict[str, str]:
    """Versions that made and measured it."""
    found: dict[str, str] = {}
    for record in (facts.convert, facts.manifest, facts.evaluation):
        found |= record.versions if record else {}
    for row in facts.evaluation.tasks if facts.evaluation else ():
        found |= {k: v for k, v in (row.measured.versions if row.measured else {}).items() if k not in found}
    return found


def licence_text(data: Any, w: Mapping[str, str]) -> str:
    """The licence in words; empty where it is not known."""
    if not data.license:
        return ""
    name = data.license_name or data.license
    shown = f"[{name}]({data.license_link})" if data.license_link else str(name)
    return w["licence_text"].format(licence=shown)


def served_by_vllm(facts: Facts) -> bool:
    """Whether the format is one of vLLM's."""
    return facts.quantization.get("quant_method") in ("compressed-tensors", "awq", "gptq") or not facts.quantization


def has_template(folder: Path) -> bool:
    """Whether the tokenizer has a chat template."""
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else name


def size(n: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"

"""Everything a card can say of a checkpoint, read from its folder: records, config, headers. Never imports torch.

What is not there is ``None``; nothing is guessed. Paths of the machine that wrote a record are cut down to their last
part.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from halfbyte.errors import CheckpointError
from halfbyte.evaluation_records import EVAL_NAME, EvalRecord
from halfbyte.records import (
    COMPARE_NAME,
    CONVERT_NAME,
    MANIFEST_NAME,
    VERIFY_NAME,
    CompareRecord,
    ConvertRecord,
    Manifest,
    VerifyRecord,
    read_json,
    read_record,
)

T = TypeVar("T")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICTURE_KEYS = ("vision_config", "vision_model", "visual")
CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeUse:
    """Linears that are stored alike."""

    scheme: str
    group_size: int | None
    linears: int
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a checkpoint.

    Attributes:
        folder: where it is; config: its config.json.
        manifest, verify, compare, convert, evaluation: records, where there are any.
        source_metadata: the front matter of the source's card.
        schemes: what the Linears became; kept: patterns of modules in original precision.
        deployments: kinds that ``halfbyte deploy`` has written for it, with their files.
        citation: the source card's BibTeX entry.
    """

    folder: Path
    config: dict[str, Any]
    manifest: Manifest | None
    verify: VerifyRecord | None
    compare: CompareRecord | None
    convert: ConvertRecord | None
    evaluation: EvalRecord | None
    source_metadata: dict[str, Any] = field(default_factory=dict)
    schemes: list[SchemeUse] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    deployments: dict[str, list[str]] = field(default_factory=dict)
    citation: str | None = None

    @property
    def pictures(self) -> bool:
        """Whether the model sees pictures."""
        return any(self.config.get(k) for k in PICTURE_KEYS)

    @property
    def quantization(self) -> dict[str, Any]:
        """The config's ``quantization_config``."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def source_id(self) -> str | None:
        """The hub id of what it was made from, where the manifest knows it to be one."""
        source = self.manifest.source if self.manifest else {}
        return source["name"] if source.get("origin") == "hub" else None

    @property
    def gguf_files(self) -> list[str]:
        """Files of a GGUF model, vision tower last; empty where the weights are in safetensors files."""
        if any(self.folder.glob("*.safetensors")):
            return []
        return sorted((f.name for f in self.folder.glob("*.gguf")), key=lambda n: ("mmproj" in n, n))

    @property
    def source_name(self) -> str | None:
        """What it was made from, as the records call it."""
        for found in (
            self.manifest.source.get("name") if self.manifest else None,
            self.evaluation.base if self.evaluation else None,
            self.compare.base if self.compare else None,
        ):
            if found:
                return found
        return None


def read_facts(folder: Path, source: Path | None = None) -> Facts:
    """Read a checkpoint's folder, and its source's for licence and languages.

    Raises:
        CheckpointError: there is no checkpoint, or a record in it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "config.json is missing", where=str(folder), remedy="Give a checkpoint folder that is on this machine."
        )
    config = read_json(folder / "config.json")
    manifest = optional(Manifest, folder / MANIFEST_NAME)
    source = source or known_source(manifest)
    metadata, text = source_card(source) if source else ({}, "")
    quantization = config.get("quantization_config")
    return Facts(
        folder=folder,
        config=config,
        manifest=manifest,
        verify=optional(VerifyRecord, folder / VERIFY_NAME),
        compare=optional(CompareRecord, folder / COMPARE_NAME),
        convert=optional(ConvertRecord, folder / CONVERT_NAME),
        evaluation=optional(EvalRecord, folder / EVAL_NAME),
        source_metadata=metadata,
        schemes=schemes_of(manifest),
        kept=list(quantization.get("ignore") or []) if isinstance(quantization, dict) else [],
        deployments=deployments_of(folder / "deploy"),
        citation=citation_of(text),
    )


def known_source(manifest: Manifest | None) -> Path | None:
    """The folder of what a checkpoint was made from, where the manifest alone says which: a whole path, or a hub id
    whose files are in the cache."""
    source = manifest.source if manifest else {}
    name, origin = source.get("name", ""), source.get("origin")
    if origin == "folder" and Path(name).is_absolute():
        return Path(name)
    if origin == "hub":
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "README.md")
        return Path(found).parent if isinstance(found, str) else None
    return None


def optional(kind: type[T], path: Path) -> T | None:
    """A record, ``None`` where there is no such file."""
    return read_record(kind, path) if path.is_file() else None


def source_card(source: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a model's README.md; both empty where it has none."""
    path = source / "README.md"
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*\n(.*)", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        metadata = yaml.safe_load(found.group(1))
    except yaml.YAMLError as e:
        raise CheckpointError(
            f"its metadata are not valid YAML: {str(e).splitlines()[0]}", where=str(path), remedy="Repair the header."
        ) from None
    return (metadata if isinstance(metadata, dict) else {}), found.group(2)


def citation_of(text: str) -> str | None:
    """The first BibTeX entry of a card."""
    found = re.search(r"^@\w+\{.*?^\}", text, re.DOTALL | re.MULTILINE)
    return found.group(0) if found else None


def schemes_of(manifest: Manifest | None) -> list[SchemeUse]:
    """How many Linears became what."""
    if manifest is None:
        return []
    counts: dict[tuple[str, int | None, str], int] = {}
    for linear in manifest.linears:
        key = (linear.scheme, linear.group_size, linear.method)
        counts[key] = counts.get(key, 0) + 1
    return [
        SchemeUse(scheme=s, group_size=g, linears=n, method=m)
        for (s, g, m), n in sorted(counts.items(), key=lambda item: -item[1])
    ]


def deployments_of(folder: Path) -> dict[str, list[str]]:
    """Files of each kind in a folder that ``halfbyte deploy`` wrote: ``deploy/KIND/...``."""
    if not folder.is_dir():
        return {}
    return {
        kind.name: sorted(str(f.relative_to(folder.parent)) for f in kind.rglob("*") if f.is_file())
        for kind in sorted(folder.iterdir())
        if kind.is_dir()
    }


def public_name(name: str) -> str:
    """The last part of what a record calls a model: a folder and a hub id look alike."""
    return Path(name).name


def public_spec(spec: str) -> str:
    """A calibration spec without folders of the machine that it was used on."""
    parts = re.split(r"([+*])", spec)
    return "".join(re.sub(r"^(text|jsonl|vlm):(.*/)?([^/]+)$", r"\1:\3", p) for p in parts)


def plain_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False)

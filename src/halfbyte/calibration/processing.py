"""A multimodal checkpoint's own processor: its tokenizer, its image processor, and how they go together.

It is put together from its parts instead of by ``AutoProcessor``, because that loads video processors too, which need
torchvision. Pictures go through Pillow wherever transformers has an image processor for it, with torchvision installed
or not: the same picture then becomes the same numbers on every machine. Code from the checkpoint is never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halfbyte.calibration.tokenizing import first_line, has_tokenizer, load_tokenizer, quiet
from halfbyte.errors import CalibrationError, CheckpointError, HalfbyteError, MissingDependencyError
from halfbyte.records import read_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
NAMED_IN = (*PROCESSOR_FILES, "tokenizer_config.json")
INSTALL_PILLOW = "Install it with: pip install 'halfbyte[vision]'."
PLACEHOLDER_KEYS = re.compile(r"(image|img|vision|boi|eoi)\w*_token_(id|index)$")
TEXT_INSTEAD = "or calibrate with text, which needs none"


def takes_pictures(config: Mapping[str, Any]) -> bool:
    """Whether a model of this ``config.json`` sees pictures."""
    return isinstance(config.get("vision_config"), dict) or any(re.match(r"(image|img)_token_", k) for k in config)


def picture_token_ids(config: Mapping[str, Any], processor: Any) -> frozenset[int]:
    """Ids of tokens that stand for pictures or frame them, by ``config.json`` and by the processor."""
    ids = [*(v for k, v in config.items() if PLACEHOLDER_KEYS.match(k)), *getattr(processor, "image_token_ids", ())]
    return frozenset(i for i in ids if isinstance(i, int))


def picture_problems(model_path: Path, config: Mapping[str, Any], spec: str) -> list[HalfbyteError]:
    """Why this model cannot be calibrated with pictures here and now; empty where it can.

    Loads the image processor, which is small, but no tokenizer.
    """
    where = f"--calibration {spec}"
    if not takes_pictures(config):
        remedy = "Calibrate it with self, text:FILE, jsonl:FILE or a data set of text."
        return [CalibrationError("this model takes text alone, no pictures", where=where, remedy=remedy)]
    try:
        require_packages(where)
        if not has_tokenizer(model_path):
            raise CheckpointError(
                "holds no tokenizer files",
                where=str(model_path),
                remedy=f"Copy the original model's into it, {TEXT_INSTEAD.replace('text', 'random-tokens')}.",
            )
        processor_class(model_path, config)
        load_image_processor(model_path)
    except HalfbyteError as e:
        return [e]
    return []


def require_packages(where: str) -> None:
    """Raise where Pillow is not installed, or where torchvision is and does not work: transformers then imports it."""
    if find_spec("PIL") is None:
        raise MissingDependencyError("reading pictures needs Pillow", where=where, remedy=INSTALL_PILLOW)
    if find_spec("torchvision") is not None:
        try:
            with quiet():
                import_module("torchvision")
        except Exception as e:  # built for another torch, it fails in several ways
            raise MissingDependencyError(
                f"torchvision is installed and cannot be imported: {type(e).__name__}: {first_line(e)}",
                where=where,
                remedy="Uninstall it, which most models do without, or install the one that belongs to your torch.",
            ) from None


def load_processor(model_path: Path) -> Any:
    """The checkpoint's processor, without its parts for video and sound.

    Raises:
        CheckpointError: files are missing or cannot be understood, or the class is not one of transformers'.
        MissingDependencyError: Pillow, torchvision or another package is needed and absent.
    """
    require_packages(str(model_path))
    kind = processor_class(model_path, read_json(model_path / "config.json"))
    parts = {"tokenizer": load_tokenizer(model_path), "image_processor": load_image_processor(model_path)}

    class WithoutVideo(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    try:
        with quiet():
            options, _ = kind.get_processor_dict(model_path, local_files_only=True)
            arguments = [parts.get(name) for name in kind.get_attributes()]
            processor = WithoutVideo.from_args_and_dict(arguments, options)
    except Exception as e:  # processors check what they are given in many ways
        raise _cannot(e, "processor", kind.__name__, model_path) from None
    if not isinstance(getattr(processor, "image_token", None), str):
        raise CheckpointError(
            f"its processor {kind.__name__} does not say which token stands for a picture",
            where=str(model_path),
            remedy="Calibrate this model with text.",
        )
    return processor


def processor_class(model_path: Path, config: Mapping[str, Any]) -> Any:
    """The class that the checkpoint's files name, or that transformers has for its model type."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    named = [read_json(model_path / file) for file in NAMED_IN if (model_path / file).exists()]
    names = [c["processor_class"] for c in named if isinstance(c, dict) and isinstance(c.get("processor_class"), str)]
    name = names[0] if names else PROCESSOR_MAPPING_NAMES.get(str(config.get("model_type")))
    if not isinstance(name, str):
        raise CheckpointError(
            "names no processor that would join pictures and text",
            where=str(model_path),
            remedy=f"Copy {' and '.join(PROCESSOR_FILES)} of the original model into it, {TEXT_INSTEAD}.",
        )
    if name == "PixtralProcessor":
        from halfbyte.calibration.pixtral import PixtralInPillow

        return PixtralInPillow
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.ProcessorMixin):
        raise CheckpointError(
            f"its processor {name} is not among those of transformers {transformers.__version__}",
            where=str(model_path),
            remedy=f"Code from a checkpoint is never run: install a newer transformers, {TEXT_INSTEAD}.",
        )
    return kind


def load_image_processor(model_path: Path) -> Any:
    """What turns pictures into numbers; in Pillow where transformers has that."""
    from transformers import AutoImageProcessor

    if not any((model_path / file).exists() for file in PROCESSOR_FILES):
        raise CheckpointError(
            f"holds neither {' nor '.join(PROCESSOR_FILES)}, which say how pictures are prepared",
            where=str(model_path),
            remedy=f"Copy them from the original model into it, {TEXT_INSTEAD}.",
        )
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(
                model_path, backend="pil", trust_remote_code=False, local_files_only=True
            )
    except Exception as e:  # loaders raise whatever their parsers raise
        raise _cannot(e, "image processor", "", model_path) from None


def _cannot(error: Exception, what: str, name: str, model_path: Path) -> HalfbyteError:
    """One error for what went wrong inside transformers, which words a missing package in several ways."""
    said = str(error)
    if re.search("torchvision", said, re.IGNORECASE):
        return MissingDependencyError(
            f"its {what} exists for torchvision alone, which cannot be imported here",
            where=str(model_path),
            why=first_line(error),
            remedy=f"Install the torchvision that belongs to your torch, {TEXT_INSTEAD}.",
        )
    package = re.search(r"pip install ([\w-]+)", said)
    if isinstance(error, ImportError) and package is not None:
        return MissingDependencyError(
            f"its {what} {name} needs the package {package[1]}".replace("  ", " "),
            where=str(model_path),
            remedy=f"Install it with: pip install {package[1]}.",
        )
    return CheckpointError(
        f"its {what} {name} cannot be loaded: {type(error).__name__}: {first_line(error)}".replace("  ", " "),
        where=str(model_path),
        remedy=f"Copy {' and '.join(PROCESSOR_FILES)} of the original model into it, {TEXT_INSTEAD}.",
    )

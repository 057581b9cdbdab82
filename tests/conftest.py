"""Fixtures that several test modules share: tiny models, made once a session, and a calibration text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import halfbyte
import tiny
from deployments import NAME, NEEDED

# Without a GPU, Triton's kernels run in its interpreter; it has to be told before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

Models = Callable[..., Path]
Deploy = Callable[..., Path]

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other lose a lot.
torch.set_num_threads(1)

# An example that takes long says that the machine is busy, not that the code is wrong.
hypothesis.settings.register_profile("halfbyte", deadline=None)
hypothesis.settings.load_profile("halfbyte")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``tiny_model("gemma3", tied=False, ...)``: a checkpoint folder, made once for equal arguments. Not to be changed.

    Arguments are those of :func:`tiny.build`.
    """
    made: dict[str, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = repr((family, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = tiny.build(tmp_path_factory.mktemp(family) / "source", family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text of our own, UTF-8."""
    path = tmp_path_factory.mktemp("text") / "ferry.txt"
    path.write_text(tiny.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ferry(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantised checkpoint, to be deployed. Not to be changed."""

    out = tmp_path_factory.mktemp("deploy") / "Ferry_1B.w4a16"
    halfbyte.quantize(tiny_model("llama"), out, group_size=32, method="rtn", device="cpu")
    return out


@pytest.fixture(scope="session")
def ferry_gguf(ferry: Path) -> Path:
    """The same for llama.cpp."""

    out = ferry.with_name("ferry-gguf")
    halfbyte.convert(ferry, out, to="gguf")
    return out


@pytest.fixture
def deployed(ferry: Path, tmp_path: Path) -> Deploy:
    """``deployed("kserve", gpus=2)``: the folder. ``source`` and ``name`` as well."""

    def make(target: str, source: Path | None = None, name: str = NAME, **wishes: Any) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        halfbyte.deploy(target, source or ferry, out, name=name, wishes=replace(NEEDED[target], **wishes))
        return out

    return make

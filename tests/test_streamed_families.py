"""Streaming is the model, for every family: block by block it gives the logits that transformers gives.

With pictures too: features are made by the model's own tower, placed by its own code, and may be added behind blocks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import halfbyte
import tiny
import zoo
from conftest import Models
from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.calibration import calibrate
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.progress import Silent
from halfbyte.weights import Weights
from pictures import save_pictured_rows

CPU = torch.device("cpu")
PICTURED = [
    name for name, family in zoo.FAMILIES.items() if family.pictures and not family.pictures.startswith("llama4")
]


def streamed_logits(folder: Path, ids: torch.Tensor, inputs: dict[str, torch.Tensor] | None) -> torch.Tensor:
    model = StreamedModel.of(Weights.of(open_checkpoint(folder)), CPU)
    with model.embeddings(torch.unique(ids), pictures=inputs is not None):
        hidden, calls = model.embed(ids, Interner(), inputs)
        again, further = model.embed(
            ids, Interner(), inputs
        )  # a second batch takes another way where features are added
    assert torch.equal(hidden, again)
    for call, other in zip(calls, further, strict=True):
        assert (call.added is None) == (other.added is None)
        if call.added is not None and other.added is not None:
            assert torch.equal(call.added, other.added)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            hidden = run_block(block, hidden, calls[index])
    with model.head():
        return model.logits(hidden)


def theirs(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it; by its type, for published names of classes need not be transformers'."""
    config = transformers.AutoConfig.from_pretrained(folder)
    seeing = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def expected_logits(folder: Path, ids: torch.Tensor, inputs: dict[str, torch.Tensor] | None) -> torch.Tensor:
    model = theirs(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, **(inputs or {})).logits
    return logits.float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_loading_gives_what_transformers_gives(family: str, tiny_model: Models) -> None:
    folder = tiny_model(family)
    expected = theirs(folder).state_dict()
    actual = halfbyte.load(folder, dtype=torch.float32).state_dict()
    assert actual.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, actual[name])]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_text(family: str, tiny_model: Models) -> None:
    folder = tiny_model(family)
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))
    assert relative(streamed_logits(folder, ids, None), expected_logits(folder, ids, None)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PICTURED)
def test_pictures(family: str, tiny_model: Models, tmp_path: Path) -> None:
    # Qwen3-VL adds to the hidden states behind two blocks, of which the last must not be one.
    folder = tiny_model(family, num_hidden_layers=3)
    rows = tmp_path / "rows.jsonl"
    save_pictured_rows(rows, 3)
    calibration = calibrate(
        f"vlm:{rows}", model_path=folder, samples=3, seq_len=200, seed=0, device="cpu", reporter=Silent()
    )
    batches = [b for b in calibration.batches(1024) if b.inputs is not None]
    assert batches
    for batch in batches:
        assert batch.inputs is not None
        inputs = batch.inputs()
        actual = streamed_logits(folder, batch.token_ids, inputs)
        expected = expected_logits(folder, batch.token_ids, inputs)
        assert relative(actual, expected) < 1e-5
        grey = {k: torch.full_like(v, 0.3) if v.is_floating_point() else v for k, v in inputs.items()}
        assert relative(streamed_logits(folder, batch.token_ids, grey), expected) > 1e-3  # pictures are seen at all

"""Streaming is the model: block by block it gives the logits that transformers gives, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
import zoo
from conftest import Models
from halfbyte import statistics
from halfbyte.blocks import Arguments, Interner, StreamedModel, all_finite, is_plain_causal, run_block
from halfbyte.calibration import Batch
from halfbyte.checkpoint.reader import open_checkpoint
from halfbyte.statistics import Collector, SecondMoment
from halfbyte.weights import Weights

CPU = torch.device("cpu")


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel.of(Weights.of(open_checkpoint(folder)), CPU)


def uneven_batch(longest: int = 40) -> Batch:
    """Four rows of different lengths, right-padded; longer than the sliding windows."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([longest, 31, 17, 5])
    ids = torch.randint(3, tiny.VOCAB, (4, longest), generator=generator)
    ids[torch.arange(longest) >= lengths[:, None]] = 0
    return Batch(token_ids=ids, lengths=lengths)


def whole(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def first_states(model: StreamedModel, batch: Batch) -> tuple[torch.Tensor, list[Arguments]]:
    with model.embeddings(torch.unique(batch.token_ids)):
        return model.embed(batch.token_ids, Interner())


def stream(model: StreamedModel, batch: Batch) -> torch.Tensor:
    hidden, calls = first_states(model, batch)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            hidden = run_block(block, hidden, calls[index])
    with model.head():
        return model.logits(hidden)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_streamed_logits_are_the_models(family: str, tied: bool, tiny_model: Models) -> None:
    folder = tiny_model(family, tied=tied, num_hidden_layers=4)
    batch, reference = uneven_batch(), whole(folder)
    logits = stream(streamed(folder), batch)
    with torch.no_grad():
        assert torch.equal(logits, reference(batch.token_ids).logits)
        for row, length in enumerate(batch.lengths.tolist()):  # what stands behind the real positions is never seen
            alone = reference(batch.token_ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row, :length], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("longest", [10, 16])
def test_a_window_that_is_long_enough_needs_no_mask(longest: int, tiny_model: Models) -> None:
    """transformers masks sliding layers all the same; left out, attention is causal, and not a bit changes."""
    folder = tiny_model("gemma3", num_hidden_layers=4)
    ids = torch.randint(3, tiny.VOCAB, (4, longest), generator=torch.Generator().manual_seed(longest))
    batch = Batch(token_ids=ids, lengths=torch.full((4,), longest))
    model = streamed(folder)
    _, calls = first_states(model, batch)
    assert [call.kwargs["attention_mask"] for call in calls] == [None] * 4
    with torch.no_grad():
        expected = whole(folder)(ids).logits
    assert torch.equal(stream(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_which_masks_say_no_more_than_causal(dtype: torch.dtype) -> None:
    def mask(seen: torch.Tensor) -> torch.Tensor:
        if dtype == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    assert is_plain_causal(mask(causal))
    assert not is_plain_causal(mask(causal & ~causal.tril(-4)))  # a window
    assert not is_plain_causal(mask(torch.ones_like(causal)))  # both ways
    assert not is_plain_causal(mask(causal)[:, :, -1:])  # one query of many keys
    padded = causal.clone()
    padded[1, :, :, 0] = False
    assert not is_plain_causal(mask(padded))
    if dtype != torch.bool:
        biased = mask(causal)
        biased[0, 0, 3, 1] = -1.0
        assert not is_plain_causal(biased)


def test_the_sliding_window_matters(tiny_model: Models) -> None:
    """The bit-for-bit test above would pass with one mask for all layers only if windows changed nothing; they do."""
    folder, batch = tiny_model("gemma3", num_hidden_layers=4), uneven_batch()
    model = streamed(folder)
    hidden, calls = first_states(model, batch)
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert masks[0] is not None
    assert masks[0].shape[-2:] == (40, 40)
    same_kind = [masks[0] is masks[2], masks[1] is masks[3], masks[0] is masks[1]]
    assert same_kind == [True, True, False]
    with model.block(0) as block:
        swapped = replace(calls[0], kwargs={**calls[0].kwargs, "attention_mask": masks[1]})
        a, b = run_block(block, hidden, calls[0]), run_block(block, hidden, swapped)
    assert torch.equal(a[:, : zoo.WINDOW], b[:, : zoo.WINDOW])
    assert not torch.allclose(a[:, zoo.WINDOW + 1 :], b[:, zoo.WINDOW + 1 :])


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_linears_with_one_input_share_one_statistic(family: str, tiny_model: Models) -> None:
    model, batch = streamed(tiny_model(family)), uneven_batch()
    rows = (torch.arange(40) < batch.lengths[:, None]).flatten()
    hidden, calls = first_states(model, batch)
    with model.block(0) as block, Collector(model.linears(0), CPU) as collector:
        looks: dict[str, torch.Tensor] = {}
        for path, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):

                def look(_: Any, inputs: Any, path: str = path) -> None:
                    looks[path] = inputs[0]

                module.register_forward_pre_hook(look, prepend=True)
        for _ in range(2):
            collector.run(lambda: run_block(block, hidden, calls[0]), rows)
    shared = [[n.rpartition(".")[2] for n in m.names] for m in collector.moments]
    assert shared == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert collector.never_called() == []
    for moment in collector.moments:
        assert moment.tokens == 2 * int(batch.lengths.sum())
        x = looks[moment.names[0].removeprefix("model.layers.0.")].flatten(0, 1)[rows].double()
        torch.testing.assert_close(moment.finish().double(), 2 * x.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 512, 513, 1100])
def test_strips_add_up_to_the_full_product(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPUs without instructions for bfloat16 do it; the others round, see test_statistics."""
    monkeypatch.setattr(statistics, "fast_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    moment, parts = SecondMoment.empty(width, CPU), []
    for tokens in (3, 50):
        parts.append(torch.randn(tokens, width, generator=generator).to(dtype))
        moment.add(parts[-1])
    x = torch.cat(parts).double()
    torch.testing.assert_close(moment.finish().double(), x.T @ x, rtol=1e-4, atol=1e-4)
    assert moment.tokens == 53


def test_blocks_leave_memory_when_done(tiny_model: Models) -> None:
    model = streamed(tiny_model("qwen2"))
    with model.block(1) as block:
        assert not any(p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in model.layers[0].parameters())
    assert all(p.is_meta for p in model.model.parameters())
    first_states(model, uneven_batch())
    with model.head():
        assert not any(p.is_meta for p in model.model.get_output_embeddings().parameters())  # type: ignore[operator]
    assert all(p.is_meta for p in model.model.parameters())


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([3e38] * 4, True),  # whose sum is not finite
        ([torch.inf, -torch.inf], False),
        ([torch.inf, 1.0], False),
        ([torch.nan, 1.0], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_finite_one_by_one(values: list[float], finite: bool, dtype: torch.dtype) -> None:
    assert all_finite(torch.tensor(values, dtype=dtype)) is finite

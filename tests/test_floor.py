"""benchmarks/operations.py: what the floor counts, against torch's own counter and against counting one by one."""

from __future__ import annotations

import floor
import operations
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from conftest import Models

SAMPLES, SEQ_LEN = 3, 40
TOKENS = SAMPLES * SEQ_LEN


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_products_are_those_of_the_model(tiny_model: Models, family: str) -> None:
    source = tiny_model(family)
    model = tiny.load(source).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(SAMPLES, SEQ_LEN, dtype=torch.long))
    linears = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    last = [m for n, m in model.named_modules() if n.endswith("down_proj")][-1].weight.numel()
    layers = len(model.layers)
    once, twice = (operations.operations(source, SAMPLES, SEQ_LEN, passes=n)["linears"] for n in (1, 2))
    assert once == linears - 2 * TOKENS * last
    # the first pass leaves out each block's last Linear, the second the whole last block
    assert twice == linears - 2 * TOKENS * last * layers + linears * (layers - 1) // layers


def test_attention_is_over_what_is_seen(tiny_model: Models) -> None:
    source = tiny_model("gemma3")
    config = tiny.load(source).config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window < SEQ_LEN
    pairs = 0
    for kind in config.layer_types:
        window = config.sliding_window if kind == "sliding_attention" else SEQ_LEN
        pairs += sum(1 for i in range(SEQ_LEN) for j in range(SEQ_LEN) if i - window < j <= i)
    # scores and their product with values, a multiplication and an addition each
    expected = 4 * SAMPLES * pairs * config.num_attention_heads * config.head_dim
    assert operations.operations(source, SAMPLES, SEQ_LEN, passes=1)["attention"] == pytest.approx(expected)


def test_second_moments_are_one_triangle_of_each_distinct_input(tiny_model: Models) -> None:
    source = tiny_model("llama")
    config = tiny.load(source).config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    widths = [hidden, config.num_attention_heads * config.head_dim, hidden, inner]  # q k v, o, gate up, down
    expected = layers * sum(TOKENS * w * (w + 1) for w in widths)
    for passes in (1, 2):
        assert operations.operations(source, SAMPLES, SEQ_LEN, passes=passes)["second moments"] == expected


def test_the_best_rate_of_all_runs_counts_for_all() -> None:
    operations = {"one pass": {"linears": 600.0, "second moments": 60.0}, "two passes": {"linears": 1200.0}}
    slow, fast = {"linears": 10.0, "second moments": 30.0}, {"linears": 20.0, "second moments": 20.0}
    runs = [
        {"operations": operations, "rates_around": [slow, slow], "wall_s": 99.0},
        {"operations": operations, "rates_around": [slow, fast], "wall_s": 66.0},
    ]
    for run, wall in zip(floor.by_the_best_rate(runs), (99.0, 66.0), strict=True):
        assert run["rates"] == {"linears": 20.0, "second moments": 30.0}
        assert run["floor_s"] == {"one pass": 32.0, "two passes": 60.0}
        assert run["wall_s"] == wall

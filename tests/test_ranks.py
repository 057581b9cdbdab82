"""Several processes make what one makes, up to the order of sums; and when one of them dies, the others say so and end.

Runs that matter are started by the real torchrun. Others, many and short, by a fork server with torchrun's environment.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import halfbyte
import tiny
from conftest import Models
from halfbyte.errors import counted
from halfbyte.ranks import Ranks
from halfbyte.records import Manifest, read_record
from halfbyte.sequential import Outliers, united
from halfbyte.statistics import SecondMoment
from interrupted import finish, finish_ranks, start, start_ranks
from test_resume import KILLED, contents, partial_of, stage_of

LAYERS = 6
WITHIN_S = 60.0
# Adam divides by the size of a gradient: where that is all noise, tuned scales differ. So most tests do not tune.
SETTINGS: dict[str, Any] = {"samples": 20, "seq_len": 240, "effort": "low", "dtype": "float32"}
W4A16: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}
W8A8: dict[str, Any] = {"scheme": "W8A8"}


@pytest.fixture(scope="module")
def source(tiny_model: Models) -> Path:
    return tiny_model("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of five batches; all but the first part is its words in any order."""
    chance, words, parts = random.Random(5), tiny.TEXT.split(), [tiny.TEXT]
    for _ in range(4):
        chance.shuffle(words)
        parts.append(" ".join(words))
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("\n".join(parts), encoding="utf-8")
    return f"text:{path}"


@pytest.fixture(scope="module")
def options(calibration: str) -> dict[str, Any]:
    return SETTINGS | W4A16 | {"calibration": calibration}


@pytest.fixture(scope="module")
def alone(source: Path, calibration: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``alone(scheme="W8A8", ...)``: the same run by one process."""

    def make(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("alone") / "out"
        assert finish(start(source, out, **(SETTINGS | {"calibration": calibration} | options))) == 0
        return out

    return make


@pytest.fixture(scope="module")
def whole(source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finish_ranks(start_ranks(2, source, out, **options)) == [0, 0]
    return out


def torchrun(world: int, source: Path, out: Path, options: Mapping[str, Any], *more: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "halfbyte", "quantize", str(source), str(out), "--device", "cpu", "--json", *more]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def require_alike(one: Path, several: Path, source: Path, calibration: str) -> None:
    """Of two checkpoints: hardly a code or scale of the first block differs, and predictions are much nearer to each
    other than to the original's.

    A last bit in a sum can tip a tie between codes, scales or strengths of smoothing, and what lies behind then sees
    other inputs: noise of 6e-8 on the second moments of one process does the same. So later blocks get more room.
    """
    a, b = tiny.stored(one), tiny.stored(several)
    assert a.keys() == b.keys()
    codes_a, codes_b = codes_of(one), codes_of(several)
    for prefix, share in (("model.layers.0.", 0.01), ("", 0.2)):
        names = [n for n in codes_a if n.startswith(prefix)]
        differing = sum(int((codes_a[n] != codes_b[n]).sum()) for n in names)
        count = sum(codes_a[n].numel() for n in names)
        assert differing <= share * count, f"{differing} of {count} codes differ in {prefix!r}"
    first = [n for n in codes_a if n.startswith("model.layers.0.")]
    assert sum(int((a[n] != b[n]).sum()) for n in first) <= 0.01 * sum(a[n].numel() for n in first)
    text = Path(calibration.removeprefix("text:"))
    apart = halfbyte.compare(one, several, text=text, tokens=720, window=240, device="cpu").metrics["kl_mean"]
    original = halfbyte.compare(source, one, text=text, tokens=720, window=240, device="cpu").metrics["kl_mean"]
    assert apart <= 0.4 * original


def codes_of(out: Path) -> dict[str, torch.Tensor]:
    """Dense weight over scale: the codes (zero points taken off), by module."""
    dense, tensors = tiny.decoded(out), tiny.stored(out)
    codes = {}
    for name in tensors:
        if name.endswith(".weight_scale"):
            scales, weight = tensors[name].float(), dense[name.removesuffix("_scale")]
            codes[name] = (weight / scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)).round()
    return codes


# The same result


def test_torchrun_makes_what_one_process_makes(
    source: Path, options: dict[str, Any], calibration: str, alone: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.run(torchrun(2, source, out, options), env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads(run.stdout)["recipe"]["ranks"] == 2
    assert sum(line.startswith(f"block {LAYERS}/{LAYERS}: ") for line in run.stderr.splitlines()) == 1
    assert contents(out) == contents(whole)
    one = alone(**W4A16)
    require_alike(one, out, source, calibration)
    require_same_records(one, out, ranks=2)
    assert halfbyte.verify(out, source=source).passed


def test_three_smooth_as_one_does(source: Path, calibration: str, alone: Callable[..., Path], tmp_path: Path) -> None:
    one, out = alone(**W8A8), tmp_path / "out"
    assert finish_ranks(start_ranks(3, source, out, calibration=calibration, **SETTINGS, **W8A8)) == [0, 0, 0]
    require_alike(one, out, source, calibration)
    require_same_records(one, out, ranks=3)
    assert read_record(Manifest, out / "halfbyte.json").smoothing
    assert halfbyte.verify(out, source=source).passed


@pytest.mark.parametrize("effort", ["standard", "high"])
def test_two_tune_as_one_does(
    effort: str, source: Path, calibration: str, alone: Callable[..., Path], tmp_path: Path
) -> None:
    """Each step is taken by the rank that has its batch; the first block starts from the same codes and inputs."""
    settings = SETTINGS | W4A16 | {"effort": effort}
    one, out = alone(**settings), tmp_path / "out"
    assert finish_ranks(start_ranks(2, source, out, calibration=calibration, **settings)) == [0, 0]
    a, b = (read_record(Manifest, o / "halfbyte.json").tuning for o in (one, out))
    assert [r.block for r in b] == list(range(LAYERS))
    assert b[0].loss_before == pytest.approx(a[0].loss_before, rel=1e-2)
    assert b[0].loss_after == pytest.approx(a[0].loss_after, rel=2e-2)
    assert [r.loss_after for r in b] == pytest.approx([r.loss_after for r in a], rel=0.1)
    both = [read_record(Manifest, o / "halfbyte.json").end_to_end for o in (one, out)]
    if effort == "standard":
        assert both == [None, None]
    else:
        assert all(r is not None and r.steps == 56 for r in both)
        assert both[1].kl_before == pytest.approx(both[0].kl_before, rel=0.1)  # type: ignore[union-attr]
        assert both[1].kl_after == pytest.approx(both[0].kl_after, rel=0.1)  # type: ignore[union-attr]
    text = Path(calibration.removeprefix("text:"))
    apart = halfbyte.compare(one, out, text=text, tokens=720, window=240, device="cpu").metrics["kl_mean"]
    original = halfbyte.compare(source, one, text=text, tokens=720, window=240, device="cpu").metrics["kl_mean"]
    assert apart <= 0.4 * original
    assert halfbyte.verify(out, source=source).passed


def test_two_tune_norms_as_one_does(source: Path, calibration: str, alone: Callable[..., Path], tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(W4A16 | {"gptq": {"tune_norms": True}}))
    settings = SETTINGS | {"recipe": recipe, "effort": "standard"}
    one = alone(**settings)
    assert finish_ranks(start_ranks(2, source, out, calibration=calibration, **settings)) == [0, 0]
    a, b = (read_record(Manifest, o / "halfbyte.json").tuning for o in (one, out))
    assert b[0].norms
    assert b[0].norms == a[0].norms
    assert b[0].loss_after == pytest.approx(a[0].loss_after, rel=2e-2)
    before, alike = tiny.stored(source), [tiny.stored(o) for o in (one, out)]
    for name in b[0].norms:
        moved = [t[name].float() - before[name].float() for t in alike]
        assert float((moved[0] - moved[1]).norm()) < 0.3 * float(moved[0].norm())
    assert halfbyte.verify(out, source=source).passed


def require_same_records(one: Path, several: Path, *, ranks: int) -> None:
    a, b = (read_record(Manifest, o / "halfbyte.json") for o in (one, several))
    assert "ranks" not in a.recipe
    assert b.recipe == a.recipe | {"ranks": ranks}
    assert b.calibration == a.calibration
    assert [r.norm for r in b.smoothing][:2] == [r.norm for r in a.smoothing][:2]
    assert a.run.keys() == b.run.keys()
    facts = [[(r.name, r.tokens, r.dead_columns, r.damp_fraction, r.damp_raises) for r in m.linears] for m in (a, b)]
    assert facts[0] == facts[1]
    assert [r.relative_error for r in b.linears] == pytest.approx([r.relative_error for r in a.linears], rel=0.1)


def test_files_hold_what_memory_holds(source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    assert finish_ranks(start_ranks(2, source, tmp_path / "out", offload=True, **options)) == [0, 0]
    assert contents(tmp_path / "out") == contents(whole)


def test_blocks_observed_at_once(source: Path, calibration: str, alone: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(W4A16 | {"gptq": {"true_sequential": False}}))
    one, out = alone(recipe=recipe), tmp_path / "out"
    run = start_ranks(3, source, out, recipe=recipe, calibration=calibration, **SETTINGS)
    assert finish_ranks(run) == [0, 0, 0]
    require_alike(one, out, source, calibration)


# Killed and resumed


@pytest.mark.filterwarnings("ignore")
def test_experts_are_dealt_out(tiny_model: Models, calibration: str, tmp_path: Path) -> None:
    """Second moments and counts are those of all ranks' tokens, and each expert is solved by one."""
    source, one, out = tiny_model("qwen3-moe"), tmp_path / "one", tmp_path / "out"
    options = {"calibration": calibration, **SETTINGS, **W4A16, "effort": "low"}
    assert finish(start(source, one, **options)) == 0
    assert finish_ranks(start_ranks(2, source, out, **options)) == [0, 0]
    require_alike(one, out, source, calibration)
    a, b = (read_record(Manifest, o / "halfbyte.json").linears for o in (one, out))
    assert [(r.name, r.tokens, r.pooled) for r in a if r.block == 0] == [
        (r.name, r.tokens, r.pooled) for r in b if r.block == 0
    ]
    # Behind the first block a last bit can send a token to another expert.
    assert [r.tokens for r in b] == pytest.approx([r.tokens for r in a], rel=0.1)
    assert sum(r.tokens for r in a if "experts" in r.name) == sum(r.tokens for r in b if "experts" in r.name)
    assert halfbyte.verify(out, source=source).passed


def test_a_rank_killed_under_torchrun(source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    with open(said, "w") as stderr:
        job = subprocess.Popen(
            torchrun(2, source, out, options), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr
        )
        while stage_of(out) < 1 and job.poll() is None:
            time.sleep(0.002)
        (second,) = (p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1")
        second.kill()
        begun = time.monotonic()
        assert job.wait(WITHIN_S) != 0
        assert time.monotonic() - begun < WITHIN_S
    lines = [line for line in said.read_text().splitlines() if line.startswith("halfbyte: ")]
    assert lines == [
        f"halfbyte: rank 1 (process {second.pid}) of 2 has ended without a word (killed, or out of memory). "
        "Run the same command again with --resume."
    ]
    assert 1 <= stage_of(out) < LAYERS
    assert not out.exists()

    # Another number of processes would end in other bytes.
    for world in (3, 1):
        said.unlink()
        run = start_ranks(world, source, out, resume=True, said=said, **options)
        assert finish_ranks(run) == [2] * world
        (line,) = said.read_text().splitlines()
        assert f"it would end in other bytes: ranks was 2, is {world}" in line

    again = subprocess.run(
        torchrun(2, source, out, options, "--resume"), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("offload", [False, True])
def test_ranks_killed_at_writes(
    offload: bool, source: Path, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Each run dies at another write of one of its ranks, and the other finds out; all but the first resume."""
    out, said, options = tmp_path / "out", tmp_path / "said", options | {"offload": offload}
    for rank, number in ((1, 0), (0, 40), (1, 4), (0, 30)):
        said.unlink(missing_ok=True)
        resume = partial_of(out).exists()
        begun = time.monotonic()
        codes = finish_ranks(start_ranks(2, source, out, {rank: ("kill", number)}, said, resume=resume, **options))
        assert time.monotonic() - begun < WITHIN_S
        assert codes == ([KILLED, 2] if rank == 0 else [2, KILLED])
        assert "Run the same command again with --resume." in said.read_text()
        assert not out.exists()
    assert finish_ranks(start_ranks(2, source, out, resume=True, **options)) == [0, 0]
    assert contents(out) == contents(whole)


def test_an_error_of_one_rank_is_everybodys(source: Path, options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """The second rank's disk is full; the first says so and keeps the run."""
    out, said = tmp_path / "out", tmp_path / "said"
    assert finish_ranks(start_ranks(2, source, out, {1: ("full", 12)}, said, **options)) == [2, 2]
    (line,) = said.read_text().splitlines()
    assert line.startswith(f"rank 1: {partial_of(out)}")
    assert line.endswith(f"With --resume it continues after {counted(stage_of(out), 'finished block')}.")
    assert 0 <= stage_of(out) < LAYERS
    assert finish_ranks(start_ranks(2, source, out, resume=True, **options)) == [0, 0]
    assert contents(out) == contents(whole)


def test_one_process_continues_a_run_from_before_there_were_ranks(
    source: Path, options: dict[str, Any], alone: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert finish(start(source, out, trap=("kill", 60), **options)) == KILLED
    assert "ranks" not in json.loads((partial_of(out) / "state" / "journal.json").read_text())["options"]
    assert finish(start(source, out, resume=True, **options)) == 0
    assert contents(out) == contents(alone(**W4A16))


# Refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"samples": 8},
            "--nproc-per-node: the calibration set makes at most 2 batches of 1024 tokens, too few for 3 ",
        ),
        ({"method": "rtn"}, "--method rtn: rounding to nearest needs no calibration, so there is nothing that 3 "),
    ],
    ids=["batches", "rtn"],
)
def test_nothing_for_a_rank_to_do(
    change: dict[str, Any], words: str, source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    said = tmp_path / "said"
    assert finish_ranks(start_ranks(3, source, tmp_path / "out", said=said, **(options | change))) == [2, 2, 2]
    (line,) = said.read_text().splitlines()
    assert line.startswith(words)
    assert [p.name for p in tmp_path.iterdir()] == ["said"]


def test_codes_are_tuned_in_one_process_only(source: Path, calibration: str, tmp_path: Path) -> None:
    """Told before anything is begun."""
    recipe, said = tmp_path / "recipe.json", tmp_path / "said"
    recipe.write_text(json.dumps(W4A16 | {"gptq": {"tune_codes": True}}))
    options = SETTINGS | {"recipe": recipe, "calibration": calibration, "effort": "standard"}
    assert finish_ranks(start_ranks(2, source, tmp_path / "out", said=said, **options)) == [2, 2]
    (line,) = set(said.read_text().splitlines())
    assert line.startswith("tune_codes under [gptq] in the recipe: codes are tuned in one process only (")
    assert line.endswith(" Run it without torchrun, or leave tune_codes out.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json", "said"]
    options["effort"] = "low"  # tunes nothing
    assert finish_ranks(start_ranks(2, source, tmp_path / "out", **options)) == [0, 0]


def test_a_text_too_short_for_all(source: Path, options: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """Only the calibration set itself tells, so it is made first; nothing is left behind."""
    said = tmp_path / "said"
    options = options | {"calibration": f"text:{text_file}"}
    assert finish_ranks(start_ranks(3, source, tmp_path / "out", said=said, **options)) == [2, 2, 2]
    (line,) = said.read_text().splitlines()
    one = "makes 1 batch of 1024 tokens, too few for 3 processes. Run it without torchrun, or take more --samples."
    two = "makes 2 batches of 1024 tokens, too few for 3 processes. Start at most 2, or take more --samples."
    assert line.endswith((one, two))
    assert [p.name for p in tmp_path.iterdir()] == ["said"]


# Parts


def test_work_is_dealt_evenly() -> None:
    assert Ranks(0, 2).owners([576, 192, 192]) == [0, 1, 1]
    assert Ranks(1, 2).owners([1536, 1536]) == [0, 1]
    assert Ranks(2, 3).owners([5]) == [0]
    assert Ranks().owners([3, 2, 1]) == [0, 0, 0]


def test_every_item_has_one_rank() -> None:
    items = list(range(7))
    assert [Ranks(r, 3).share(items) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().whole(items) == items


class Canned:
    """Stands for one of two ranks: what the other says is given."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank, self.world, self.others = rank, 2, others

    def gather(self, value: Any) -> list[Any]:
        other = self.others.pop(0)
        return [value, other] if self.rank == 0 else [other, value]

    def add_(self, value: torch.Tensor) -> None:
        value += self.others.pop(0)

    def whole(self, items: list[Any]) -> list[Any]:
        parts = self.gather(items)
        return [parts[i % 2][i // 2] for i in range(sum(map(len, parts)))]


def test_a_linear_that_only_another_ranks_batches_reach() -> None:
    """Experts: the other rank has seen b, and c with d; this one a and c."""
    linears = {n: nn.Linear(2, 3) for n in "abcd"}
    own = [SecondMoment(["a"], torch.ones(2, 2), 3), SecondMoment(["c"], torch.ones(2, 2), 4)]
    theirs: list[Any] = [[["b"], ["d", "c"]]]
    for tokens in (0, 8, 7):  # in the order a; c, d; b
        theirs += [torch.full((2, 2), float(tokens)), tokens]
    found = united(own, linears, torch.device("cpu"), Canned(0, theirs))  # type: ignore[arg-type]
    assert [(m.names, m.tokens, float(m.hessian[0, 0])) for m in found] == [
        (["a"], 3, 1.0),
        (["c", "d"], 12, 9.0),
        (["b"], 7, 7.0),
    ]


def test_outliers_are_sampled_in_the_order_of_one_process() -> None:
    x = torch.randn(3, 100, 4)
    one = Outliers("norm", torch.zeros(4, dtype=torch.float64))
    for batch in x:
        one.add(batch, 3)
    even, odd = (
        Outliers("norm", torch.zeros(4, dtype=torch.float64)),
        Outliers("norm", torch.zeros(4, dtype=torch.float64)),
    )
    for batch in x[::2]:
        even.add(batch, 3)
    odd.add(x[1], 3)
    even.unite(Canned(0, [odd.fourth, odd.sample]))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(even.sample), torch.cat(one.sample))
    assert torch.allclose(even.fourth, one.fourth, rtol=1e-12)
    assert torch.allclose(one.fourth, x.double().pow(4).sum((0, 1)), rtol=1e-5)


def test_one_process_exchanges_nothing() -> None:
    alone, scales = Ranks(), torch.ones(2, 3, dtype=torch.bfloat16)
    assert alone.spread(scales, 0) is scales
    assert alone.decide(lambda: 5) == 5
    assert alone.gather(5) == [5]
    alone.add_(scales)
    alone.agree()
    assert torch.equal(scales, torch.ones_like(scales))

"""The benchmark of single parts: variants that differ in one thing, paired errors, going on, and the table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import parts
import pytest
import report
import torch

from conftest import Models
from halfbyte.evaluation.divergence import Scores, mean_and_se
from halfbyte.recipe import GptqSteps, Recipe, load_recipe

EVERY = [(scheme, name) for scheme, variants in parts.VARIANTS.items() for name in variants]


def recipe_of(scheme: str, name: str, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(parts.VARIANTS[scheme][name].recipe(scheme, 64 if scheme == "W4A16" else None))
    return load_recipe(path)


@pytest.mark.parametrize(("scheme", "name"), EVERY)
def test_a_variant_differs_from_the_default_in_what_its_name_says(scheme: str, name: str, tmp_path: Path) -> None:
    usual, recipe = recipe_of(scheme, parts.DEFAULT, tmp_path), recipe_of(scheme, name, tmp_path)
    words = parts.VARIANTS[scheme][name].words
    key, _, value = name.partition("=")
    if name == parts.DEFAULT:
        assert usual == Recipe(groups=usual.groups)
        assert [g.scheme.weights.group_size for g in usual.groups] == [64 if scheme == "W4A16" else None]
    elif name == "rtn":
        assert recipe == replace(usual, method="rtn")
    elif "," in name:  # what only --effort high does
        assert name == "effort=high, end_to_end=off"
        assert recipe == replace(usual, effort="high", gptq=GptqSteps(end_to_end=False))
    elif key == "effort":
        assert recipe == replace(usual, effort=value)  # type: ignore[arg-type]
    elif key == "dtype":
        assert (recipe, words) == (usual, ("--dtype", value))
    elif key == "group_size":
        (group,) = usual.groups
        scheme_wanted = group.scheme.with_group_size(int(value))
        assert recipe == replace(usual, groups=(replace(group, scheme=scheme_wanted),))
    elif key == "target_bits":
        assert recipe == replace(usual, target_bits=float(value))
    else:
        assert value == ("on" if key in ("tune_codes", "tune_norms") else "off")
        assert recipe == replace(usual, gptq=GptqSteps(**{key: value == "on"}))  # type: ignore[arg-type]
    assert words == () or key == "dtype"


def scores(seed: int, sizes: list[int]) -> Scores:
    g = torch.Generator().manual_seed(seed)
    kl, nll_base, nll, change = torch.rand(4, sum(sizes), generator=g, dtype=torch.float64)
    agrees = (torch.rand(sum(sizes), generator=g) > 0.3).double()
    window_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Scores(nll_base=nll_base, nll=nll, kl=kl, agrees=agrees, change=change, window_of=window_of)


@pytest.mark.parametrize("sizes", [[7, 7, 7, 3], [1, 50]])
def test_a_paired_error_is_that_of_the_differences_of_tokens(sizes: list[int]) -> None:
    ours, usual = scores(1, sizes), scores(2, sizes)
    sums = [[asdict(w) for w in s.by_window()] for s in (ours, usual)]
    for key, apart in (
        ("kl", ours.kl - usual.kl),
        ("nll", ours.nll - usual.nll),
        ("agreements", ours.agrees - usual.agrees),
    ):
        assert parts.paired(*sums, key) == pytest.approx(mean_and_se(apart, ours.window_of))


def test_what_cannot_be_paired() -> None:
    one, other, short = (
        [asdict(w) for w in scores(s, sizes).by_window()] for s, sizes in ((1, [9]), (2, [9]), (3, [8]))
    )
    mean, se = parts.paired(one, other, "kl")
    assert mean == pytest.approx((one[0]["kl"] - other[0]["kl"]) / 9)
    assert se is None
    with pytest.raises(SystemExit, match="different windows"):
        parts.paired(one, short, "kl")


def variant(kl: list[float], wall: float) -> dict[str, Any]:
    windows = [{"tokens": 10, "kl": x, "nll_base": 10.0, "nll": 12.0, "agreements": 8} for x in kl]
    metrics = {
        "kl_mean": sum(kl) / (10 * len(kl)),
        "kl_se": 0.05,
        "perplexity_ratio": 1.25,
        "perplexity_ratio_se": 0.02,
        "top1_agreement": 0.8,
        "top1_agreement_se": 0.01,
    }
    figures = {"wall_s": wall, "cpu_s": 2 * wall, "peak_rss_bytes": 2**30, "other_cpu_share": 0.02}
    return {"what": "so", **figures, "score": {"tokens": 10 * len(kl), "metrics": metrics, "by_window": windows}}


@pytest.fixture
def result() -> dict[str, Any]:
    """Measured in another order than that of the table; a window is hard for both, and the difference is the same."""
    variants = {"effort=low": variant([1.5, 4.5], 70.0), "default": variant([1.0, 4.1], 100.0)}
    return {
        "benchmark": "parts",
        "date": "2026-01-02",
        "work": {"model": "m", "scheme": "W4A16", "group_size": 64, "samples": 4, "seq_len": 8, "threads": 3},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**33},
        "commit": {"commit": "0123456789abcdef", "modified": []},
        "versions": {},
        "variants": variants,
        "differences": parts.differences(variants),
    }


def test_the_table(result: dict[str, Any]) -> None:
    table, where = parts.render(result).split("\n\n")
    rows = [" | ".join(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()]
    rest = "1.2500 ± 0.0200 | 0.8000 ± 0.0100"
    assert rows[2:] == [
        f"default: so | 0.2550 ± 0.0500 |  | {rest} | 100 | 200 | 1.00 | 2%",
        f"effort=low: so | 0.3000 ± 0.0500 | +0.0450 ± 0.0050 | {rest} | 70 | 140 | 1.00 | 2%",
    ]
    assert where == (
        "m, W4A16 g64, 4 x 8 tokens, scored on 20 in 2 windows, 3 threads; a CPU, 2 cores, 8.00 GiB; 2026-01-02, "
        "commit 0123456789ab; other work used 2% to 2% of the processors meanwhile"
    )


def test_without_the_default_nothing_is_compared_with_it(result: dict[str, Any]) -> None:
    alone = {"effort=low": result["variants"]["effort=low"]}
    assert parts.differences(alone) == {}
    assert "+0.0450" not in parts.render({**result, "variants": alone, "differences": {}})


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*words: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["parts.py", *map(str, words)])
        parts.main()

    return run


def test_it_measures_goes_on_and_refuses_what_does_not_belong(
    command: Callable[..., None],
    tiny_model: Models,
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "result.json"
    given = ["--model", tiny_model("llama"), "--calibration-text", text_file, "--result", path, "--scheme", "W8A8"]
    usual = [*given, "--validation-text", text_file, "--samples", 4, "--seq-len", 32, "--threads", 1]
    command(*usual, "--only", "rtn")
    command(*usual, "--only", "default", "rtn")
    output = capfd.readouterr()
    assert f"rtn is in {path} already" in output.err
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["variants"]) == ["rtn", "default"]
    assert result["differences"].keys() == {"rtn"}
    assert all(v["wall_s"] > 0 and v["score"]["metrics"]["kl_mean"] > 0 for v in result["variants"].values())
    rounded, tuned = result["variants"]["rtn"], result["variants"]["default"]
    assert rounded["checkpoint_sha256"] != tuned["checkpoint_sha256"]
    assert (rounded["calibration_sha256"] is None, tuned["calibration_sha256"] is None) == (True, False)
    assert result["differences"]["rtn"]["kl"] == pytest.approx(
        rounded["score"]["metrics"]["kl_mean"] - tuned["score"]["metrics"]["kl_mean"], abs=1e-12
    )
    assert output.out.strip().endswith(parts.render(result).strip())
    assert str(tmp_path) not in path.read_text(encoding="utf-8")

    with pytest.raises(SystemExit, match=r"measured otherwise \(work: samples\) than would be now"):
        command(*usual, "--samples", 5)
    monkeypatch.setattr(parts, "measured", lambda *_: variant([1.0, 2.0], 1.0))
    command(*usual, "--only", "rtn")
    assert json.loads(path.read_text(encoding="utf-8")) == result
    monkeypatch.setattr(parts, "differences", lambda _: {})
    command(*usual, "--only", "rtn", "--again")
    assert json.loads(path.read_text(encoding="utf-8"))["variants"]["rtn"]["wall_s"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model and --calibration-text and --validation-text must be given"),
        (["--scheme", "W8A8", "--group-size", "64"], "W8A8 has no groups"),
        (["--scheme", "W8A8", "--only", "dtype=float32"], "W8A8 has no variant dtype=float32; there are rtn, default"),
        (["--only", "rtn"], "no such file: nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    words: list[str],
    message: str,
    command: Callable[..., None],
    tiny_model: Models,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", tiny_model("llama"), "--calibration-text", text_file, "--validation-text", "nowhere.txt"]
    with pytest.raises(SystemExit):
        command(*(given if words else []), *words)
    assert message in capsys.readouterr().err


def test_what_takes_as_many_bits_as_groups_of_32_is_no_variant_of_them(
    command: Callable[..., None],
    tiny_model: Models,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_out = []
    monkeypatch.setattr(parts, "measured", lambda *_: variant([1.0, 2.0], 1.0))
    given = ["--model", tiny_model("llama"), "--calibration-text", text_file, "--validation-text", text_file]
    for size in (32, 64):
        path = tmp_path / f"{size}.json"
        command(*given, "--group-size", size, "--result", path)
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["work"]["group_size"] == size
        left_out.append(" ".join(n for n in parts.VARIANTS["W4A16"] if n not in result["variants"]))
    assert left_out == ["group_size=32 target_bits=4.5", ""]
    with pytest.raises(SystemExit):
        command(*given, "--group-size", 32, "--only", "default", "target_bits=4.5")
    assert "groups of 32, beside which target_bits=4.5 cannot be measured" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*-parts-*.json")), ids=lambda p: p.name)
def test_results_that_are_kept_can_be_rendered(path: Path) -> None:
    """And say what their windows say."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["differences"] == parts.differences(stored["variants"])
    assert parts.render(stored).count("\n| ") == len(stored["variants"])
    for v in stored["variants"].values():
        windows = v["score"]["by_window"]
        mean = sum(w["kl"] for w in windows) / sum(w["tokens"] for w in windows)
        assert math.isclose(mean, v["score"]["metrics"]["kl_mean"], rel_tol=1e-9)

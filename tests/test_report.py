"""The report: whole in itself, true to the records, safe with hostile names. How it looks is told in docs/log.md."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import halfbyte
from conftest import Models
from halfbyte.cli.main import cli
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.evaluation_records import AverageResult, Estimated, EvalRecord, TaskResult
from halfbyte.records import CompareRecord, Manifest, read_record, write_json
from halfbyte.reporting.figures import axis_over, histogram, kind_of, layer_grid, recovery_figure
from halfbyte.reporting.page import read_run, report
from halfbyte.reporting.plots import write_plots

HOSTILE = '<script>alert("x")</script>'


def evaluation() -> EvalRecord:
    rows = [
        TaskResult(
            suite="s", category="Quick", task=f"t{i}", title=title, metric="acc", base=0.5, value=0.5 * r / 100,
            documents=60, recovery=Estimated(value=r, low=low, high=high), right_to_wrong=3, wrong_to_right=1,
            verdict="loss within the error",
        )
        for i, (title, r, low, high) in enumerate([("Opposites", 97.0, 91.0, 103.0), (HOSTILE, 101.0, 96.0, 106.5)])
    ]  # fmt: skip
    mean = AverageResult(
        category="Quick", tasks=["t0", "t1"], base=0.5, value=0.495,
        ratio_of_averages=Estimated(value=99.0, low=95.0, high=103.0), verdict="loss within the error",
    )  # fmt: skip
    return EvalRecord(
        format_version=1, base="/data/base", checkpoint="/data/small", base_sha256="a", checkpoint_sha256="b",
        suites=["quick"], backend={"backend": "hf"}, limit=None, tasks=rows, averages=[mean],
        gates=["recovery>=99.5", "kl_mean<=1"], gate_failures=["recovery>=99.5: it is 99"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint with every record that there is."""
    out = tmp_path_factory.mktemp("report") / "small"
    source = tiny_model("llama")
    halfbyte.quantize(
        source, out, scheme="W4A16", group_size=32, calibration="random-tokens", samples=4, seq_len=32, effort="low"
    )
    halfbyte.verify(out, source=source)
    halfbyte.compare(source, out, tokens=256, window=32)
    write_json(out / "eval.json", evaluation())
    level = {"clients": 4, "tokens_per_s": 123.4, "first_token_s": 0.05}
    (out / "bench.json").write_text(
        json.dumps({"measured": [{"target": "/data/small", "memory_bytes": 2_500_000_000, "levels": [level]}]})
    )
    return out


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether tags close in order."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_in_itself(run: Path, tmp_path: Path) -> None:
    """No script, no address, no file beside it; every tag closes."""
    text = report(run, tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not [a for a in page.attributes if a[0] in ("src", "href", "onclick")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert HOSTILE not in text
    assert HOSTILE in page.text
    assert "/data/" not in text


def test_the_page_shows_the_records_numbers(run: Path, tmp_path: Path) -> None:
    page = Page(report(run, tmp_path / "report.html").read_text())
    manifest = read_record(Manifest, run / "halfbyte.json")
    compared = read_record(CompareRecord, run / "compare.json")
    for shown in (
        f"{manifest.bits_per_weight:.2f}",
        f"{compared.metrics['kl_mean']:.5f} ± {compared.metrics['kl_se']:.5f} nats",
        "97.0%",
        "91.0 – 103.0",
        "99.0%",
        "recovery>=99.5: it is 99",
        "123.4",
        "2.50 GB",
        "50 ms",
    ):
        assert shown in page.text, shown
    labels = [v for k, v in page.attributes if k == "aria-label"]
    for section in ("Gates", "Recovery", "Divergence", "Layers", "Size", "Speed", "Verification"):
        assert section in labels
    cells = [v for k, v in page.attributes if k == "title" and v and v.startswith("block ")]
    assert len(cells) == len(manifest.linears)


def test_what_is_not_known_is_not_shown(run: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / "eval.json", only)
    page = Page(report(only, tmp_path / "report.html").read_text())
    labels = [v for k, v in page.attributes if k == "aria-label"]
    assert "Recovery" in labels
    assert not {"Divergence", "Layers", "Size", "Speed", "Verification"} & set(labels)
    with pytest.raises(CheckpointError, match="there is no record in it"):
        report(tmp_path, tmp_path / "x.html")


def test_positions_are_to_scale() -> None:
    figure = recovery_figure(evaluation())
    assert figure is not None
    axis = figure.axis
    assert (axis.low, axis.high) == (90.0, 110.0)
    first = figure.lines[0]
    assert first.dot == pytest.approx(35.0)
    assert first.left == pytest.approx(5.0)
    assert first.width == pytest.approx(60.0)
    assert figure.full == pytest.approx(50.0)
    assert [t for t, _ in axis.ticks] == ["90%", "95%", "100%", "105%", "110%"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 3.7e-4), (99.2, 100.3), (50, 150), (100, 100)])
def test_axes_hold_their_data_and_have_few_ticks(low: float, high: float) -> None:
    axis = axis_over(low, high)
    assert axis.low <= low
    assert axis.high >= high
    assert 2 <= len(axis.ticks) <= 7
    for text, at in axis.ticks:
        assert axis.at(float(text)) == pytest.approx(at, abs=1e-6)


def test_every_window_is_in_the_histogram(run: Path) -> None:
    compared = read_record(CompareRecord, run / "compare.json")
    found = histogram(compared)
    assert found is not None
    counts = [int(re.search(r": (\d+) windows", label).group(1)) for _, label in found.bars]  # type: ignore[union-attr]
    assert sum(counts) == len(compared.by_window)
    assert max(h for h, _ in found.bars) == 100


def test_experts_share_a_row() -> None:
    assert kind_of("model.layers.11.mlp.experts.3.down_proj", 11) == "mlp.experts.down_proj"
    assert kind_of("model.layers.1.self_attn.q_proj", 1) == "self_attn.q_proj"


def test_the_grid_has_a_cell_for_each_linear(run: Path, tmp_path: Path) -> None:
    manifest = read_record(Manifest, run / "halfbyte.json")
    grid = layer_grid(manifest)
    assert grid is not None
    assert sum(c is not None for row in grid.cells for c in row) == len(manifest.linears)
    assert grid.worst[0][1] == max(x.relative_error for x in manifest.linears)
    assert set(grid.kind_bits) == {f"{x.bits_per_weight:.2f}" for x in manifest.linears}
    assert f"<small>{grid.kind_bits[0]} bits</small>" in report(run, tmp_path / "report.html").read_text()


def test_plots(run: Path, tmp_path: Path) -> None:
    written = write_plots(read_run(run), tmp_path / "plots")
    assert sorted(p.name for p in written) == sorted(
        f"{n}.{f}" for n in ("recovery", "divergence", "layers") for f in ("svg", "png")
    )
    for path in written:
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_the_commands(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`report` and `card` say which files they wrote; what is not known is told on stderr."""
    copy = tmp_path / "small"
    shutil.copytree(run, copy)
    cli.main(["report", str(copy), "-o", str(tmp_path / "r.html"), "--json"], standalone_mode=False)
    assert json.loads(capfd.readouterr().out) == {"files": [str(tmp_path / "r.html")]}
    cli.main(["card", str(copy), "--json"], standalone_mode=False)
    said = capfd.readouterr()
    assert json.loads(said.out)["files"] == [str(copy / "README.md")]
    assert "the licence is not known" in said.err
    with pytest.raises(UsageError, match="--push: where to is not said"):
        cli.main(["card", str(copy), "--push"], standalone_mode=False)

"""The same figures as PNG and SVG files, for model cards and papers (needs matplotlib, the extra ``plots``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.cards.facts import Facts
from halfbyte.errors import MissingDependencyError
from halfbyte.reporting.figures import RecoveryFigure, histogram, layer_grid, recovery_figure

INK, MARK, WEAK, FULL = "#1d1d1b", "#2a62c4", "#b9cdf0", "#8a8a83"
FORMATS = ("svg", "png")


def write_plots(facts: Facts, folder: Path) -> list[Path]:
    """Draw what the records have; returns the files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "the package matplotlib is needed for plots", where="--plots", remedy='pip install "halfbyte[plots]"'
        ) from None
    plt.rcParams.update({"svg.hashsalt": "halfbyte", "font.size": 9, "text.color": INK, "axes.edgecolor": FULL})
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    recovery = recovery_figure(facts.evaluation) if facts.evaluation else None
    if recovery is not None:
        figure, axes = plt.subplots(figsize=(6.4, 0.6 + 0.32 * len(recovery.lines)))
        draw_recovery(axes, recovery)
        written += _save(figure, folder / "recovery", plt)
    spread = histogram(facts.compare) if facts.compare else None
    if spread is not None:
        figure, axes = plt.subplots(figsize=(6.4, 2.6))
        width = (spread.axis.high - spread.axis.low) / len(spread.bars)
        centres = [spread.axis.low + (i + 0.5) * width for i in range(len(spread.bars))]
        axes.bar(centres, [h for h, _ in spread.bars], 0.9 * width, color=MARK)
        axes.set_xlabel("mean KL divergence of a window, nats")
        axes.set_yticks([])
        _plain(axes)
        written += _save(figure, folder / "divergence", plt)
    grid = layer_grid(facts.manifest) if facts.manifest else None
    if grid is not None:
        figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.28 * len(grid.kinds)))
        cells = [[float("nan") if c is None else c[0] for c in row] for row in grid.cells]
        image = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        axes.set_yticks(range(len(grid.kinds)), grid.kinds)
        axes.set_xlabel("decoder block")
        bar = figure.colorbar(image, ticks=[0, 100])
        bar.ax.set_yticklabels([f"{grid.low:.1e}", f"{grid.high:.1e}"])
        bar.set_label("relative error (log)")
        written += _save(figure, folder / "layers", plt)
    return written


def draw_recovery(axes: Any, figure: RecoveryFigure) -> None:
    """Dots with intervals, the first task on top."""
    span = figure.axis.high - figure.axis.low
    for y, line in enumerate(reversed(figure.lines)):
        if line.left is not None and line.width is not None:
            left = figure.axis.low + span * line.left / 100
            axes.plot([left, left + span * line.width / 100], [y, y], color=WEAK, linewidth=5, solid_capstyle="round")
        axes.plot(figure.axis.low + span * line.dot / 100, y, "D" if line.average else "o", color=MARK, markersize=6)
    axes.axvline(100, color=FULL, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(figure.lines)), [line.title for line in reversed(figure.lines)])
    axes.set_ylim(-0.6, len(figure.lines) - 0.4)
    axes.set_xlim(figure.axis.low, figure.axis.high)
    axes.set_xlabel("recovery, % of the baseline's score (95 % interval)")
    _plain(axes)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def _save(figure: Any, stem: Path, plt: Any) -> list[Path]:
    paths = [stem.with_suffix(f".{f}") for f in FORMATS]
    for path in paths:
        figure.savefig(path, bbox_inches="tight", dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths

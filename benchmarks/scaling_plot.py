"""The picture of scaling.py: weak and strong scaling of each model size, one line for each contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "extrapcomm", "font.size": 8})

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

STYLES = {"fused": "C3-", "ring": "C7:", "hierarchical": "C0--", "sharded": "C2-.", "overlapped": "C1--"}


def draw(path: Path, rows: dict[int, list[dict[str, Any]]], title: str) -> None:
    """Rows of figures by number of parameters, a column of two pictures for each."""
    figure, axes = pyplot.subplots(2, len(rows), figsize=(9, 5), sharex=True, squeeze=False)
    for column, (parameters, figures) in enumerate(rows.items()):
        draw_weak(axes[0][column], figures, f"{parameters / 1e6:g} million parameters")
        draw_strong(axes[1][column], figures)
    axes[0][0].set_ylabel("weak scaling: efficiency")
    axes[1][0].set_ylabel("strong scaling: speed-up")
    axes[0][0].legend(loc="lower left", frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def draw_weak(axes: Axes, figures: list[dict[str, Any]], title: str) -> None:
    draw_lines(axes, figures, "weak")
    axes.set_title(title)
    axes.set_ylim(0, 1)


def draw_strong(axes: Axes, figures: list[dict[str, Any]]) -> None:
    draw_lines(axes, figures, "strong")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("ranks")


def draw_lines(axes: Axes, figures: list[dict[str, Any]], what: str) -> None:
    ranks = [each["ranks"] for each in figures]
    for name, style in STYLES.items():
        axes.plot(ranks, [each[what][name] for each in figures], style, label=name, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.grid(alpha=0.3)

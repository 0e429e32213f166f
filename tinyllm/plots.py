"""Pictures of all scripts: one look, drawn without a screen, written aside and renamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.files import write_files

COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"]


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> tuple[Any, Any]:
    """(figure, axes): a matplotlib figure of this size in inches; axes as `Figure.subplots` gives them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns)


def save(drawn: Any, path: str | Path) -> None:
    """Write the figure as a PNG; InputError if the disk refuses."""
    path = Path(path)
    write_files(path.parent, {path.name: lambda file: drawn.savefig(file, format="png", dpi=130)})


def training_curve(axes: Any, losses: Sequence[float], label: str, color: str) -> None:
    """The loss of every step faintly, and its running mean."""
    axes.plot(np.arange(1, len(losses) + 1), losses, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(*running_mean(losses), color=color, label=label)


def running_mean(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means): of the losses of steps 1, 2, ..., the mean over each fiftieth, at its middle."""
    width = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def finish(axes: Any, **labels: str) -> None:
    """Labels (xlabel, ylabel, title), a faint grid and, where lines have names, a legend."""
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()

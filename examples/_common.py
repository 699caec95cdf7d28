"""What the examples share: arguments, tables, a progress bar, data, and the look of the plots."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: the examples must run where there is no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

# Okabe and Ito's palette, which stays apart for colour-blind eyes.
GREY, ORANGE, BLUE, GREEN, PURPLE, SKY, YELLOW = (
    "#9a9a9a",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)

plt.rcParams.update(
    {
        "font.size": 12,
        "axes.titlesize": 14,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "lines.linewidth": 2.2,
        "savefig.dpi": 130,
    }
)

IN_NOTEBOOK = "ipykernel" in sys.modules


# -- arguments and output


def example_parser(description: str | None, output: str = "examples-output") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").strip().split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="plots' folder (default: %(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser, threads: int | None = 1) -> argparse.Namespace:
    """Parses the command line; makes the folder for plots. A notebook has no command line, but EXAMPLE_ARGUMENTS.

    One thread unless told: the examples' matrices are so small that threads would only wait for one another.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arguments = parser.parse_args(shlex.split(os.environ.get("EXAMPLE_ARGUMENTS", "")) if IN_NOTEBOOK else None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def make_console() -> Console:
    return Console(highlight=False)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def make_table(title: str, columns: Sequence[str], highlight: str | None = None) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_style="bold", title_justify="left")
    for i, column in enumerate(columns):
        style = "bold green" if column == highlight else None
        table.add_column(column, justify="left" if i == 0 else "right", style=style)
    return table


def show_number(value: float, digits: int = 6) -> str:
    """An exact zero as a bare 0, so that it cannot be mistaken for a small number."""
    if value == 0:
        return "0" + " " * (digits + 1)
    return f"{value:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else f"{value:.0e}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# -- data


class Split(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_split(
    load: Callable[..., Any] = load_digits,
    scale: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels / 16.0,
    **options: Any,
) -> Split:
    """Data of scikit-learn's, stratified. The split is fixed, so that another --seed changes the training only."""
    x, y = load(return_X_y=True)
    options = {"test_size": 0.25, "random_state": 0, "stratify": y, **options}
    train_x, test_x, train_y, test_y = train_test_split(scale(x), y, **options)
    dtype = torch.get_default_dtype()
    return Split(
        torch.from_numpy(train_x).to(dtype),
        torch.from_numpy(train_y),
        torch.from_numpy(test_x).to(dtype),
        torch.from_numpy(test_y),
    )


def standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / x.std(axis=0)


# -- plots


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(filename=path))
    return path


def print_plots(console: Console, plots: Iterable[Path]) -> None:
    for plot in plots:
        console.print(f"plot: {plot}", soft_wrap=True)


def draw_coefficients(axes: Axes, names: Sequence[str], theirs: np.ndarray, ours: np.ndarray, our_name: str) -> None:
    """Bars for what another library found, dots for ours, hollow where ours are exactly zero."""
    places = np.arange(len(names))
    is_zero = ours == 0
    dots: dict[str, Any] = {"color": BLUE, "markersize": 9, "linestyle": "none", "marker": "o"}
    axes.bar(places, theirs, width=0.72, color="#F0C9A6", label="scikit-learn")
    axes.plot(places[~is_zero], ours[~is_zero], **dots, label=our_name)
    if is_zero.any():
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 2}
        axes.plot(places[is_zero], ours[is_zero], **dots, **hollow, label=f"{our_name}, exactly 0")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, names)
    axes.grid(visible=False, axis="x")

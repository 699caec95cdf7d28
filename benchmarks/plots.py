"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# One colour a kind: torch in greys and blue, by hand in orange, fusedreg in greens.
COLORS = {
    "torch, fused": "#1f4e9e",
    "torch, foreach": "#8a8a8a",
    "torch, for-loop": "#bdbdbd",
    "by hand: clip, fused, shrink": "#e07b00",
    "L1 in the loss, clip, fused": "#b03030",
    "fusedreg cpp: decay, l1, l2": "#7bc47f",
    "fusedreg cpp: decay, l1, l2, clip": "#1b7837",
}


def _style(axes: Axes) -> None:
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def sweep(
    path: Path, title: str, label: str, sizes: Sequence[int], lines: dict[str, list[float]], floor: list[float] | None
) -> None:
    """Cost against work, both logarithmic: where overhead ends and bandwidth begins."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, milliseconds in lines.items():
        axes.loglog(sizes, milliseconds, "o-", color=COLORS.get(name), label=name, markersize=4)
    if floor is not None:
        axes.loglog(sizes, floor, ":", color="black", label="the bytes at the stream's bandwidth")
    axes.set(title=title, xlabel=label, ylabel="milliseconds a step")
    axes.legend(frameon=False, fontsize=9)
    _style(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ratios(path: Path, title: str, cases: dict[str, dict[str, float]]) -> None:
    """Case -> contender -> ratio to torch's fused step; bars, cut off where a for-loop would hide the rest."""
    names = [name for name in COLORS if any(name in ratios for ratios in cases.values())]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / len(names)
    top = 3.2
    for i, name in enumerate(names):
        for j, found in enumerate(cases.values()):
            if name not in found:
                continue
            x = j + (i - (len(names) - 1) / 2) * width
            axes.bar(x, min(found[name], top), width, color=COLORS[name], label=name if j == 0 else None)
            if found[name] > top:
                axes.text(x, top, f" {found[name]:.1f}", ha="center", va="bottom", fontsize=6, rotation=90)
    axes.axhline(1.0, color=COLORS["torch, fused"], linewidth=1)
    axes.set(title=title, ylabel="ratio to torch's fused step", ylim=(0, top * 1.08))
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    _style(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shares(path: Path, title: str, models: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Model -> contender -> milliseconds of forward and backward, of the step."""
    figure, all_axes = plt.subplots(
        1, len(models), figsize=(5.5 * len(models), 3.6), layout="constrained", squeeze=False
    )
    for axes, (model, found) in zip(all_axes[0], models.items(), strict=True):
        names = list(found)[::-1]
        passes = [found[name][0] for name in names]
        steps = [found[name][1] for name in names]
        axes.barh(names, passes, color="#bdbdbd", label="forward, backward")
        axes.barh(names, steps, left=passes, color="#1b7837", label="clip, step, shrink")
        for y, (a, b) in enumerate(zip(passes, steps, strict=True)):
            axes.text(a + b, y, f" {b / (a + b):.0%}", va="center", fontsize=8)
        axes.set(title=model, xlabel="milliseconds a training step")
        axes.margins(x=0.12)
        axes.tick_params(axis="y", labelsize=8)
        _style(axes)
    handles = all_axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)

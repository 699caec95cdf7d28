"""Draws docs/pictures/: the penalties' proxes, the rules' paths, and the examples' plots, shrunk.

Run `make demo examples` before: the plots are those that they left in demo-output/ and examples-output/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from _plots import BLUE, GREEN, GREY, ORANGE, save  # noqa: E402

from fusedreg import FusedRegAdam, FusedRegSGD, SparsitySchedule, param_groups, penalty  # noqa: E402
from fusedreg.rules.registry import OPTIMIZERS  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
EXAMPLE_PLOTS = ROOT / "examples-output"
DEMO_PLOTS = [
    ROOT / "demo-output" / f"{name}.png" for name in ("exact-zeros", "accuracy-against-size", "before-and-after")
]


def step_of(z: float, **strengths: Any) -> float:
    """Where one proximal step of size 1 takes a weight z that has no gradient."""
    w = nn.Parameter(torch.tensor([z], dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    FusedRegSGD([w], lr=1.0, **strengths).step()
    return w.item()


def draw_proxes() -> None:
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    z = np.linspace(-2, 2, 401)
    axes.plot(z, z, color=GREY, linestyle="--", label="no penalty: w = z")
    for strengths, colour, label in (
        ({"l2": 0.6}, GREEN, "l2: shrinks by a factor, to zero never"),
        ({"l1": 0.6}, BLUE, "l1: shrinks by an amount, to zero within it"),
        ({"l1": 0.6, "l2": 0.6}, ORANGE, "both (elastic net)"),
    ):
        axes.plot(z, [step_of(value, **strengths) for value in z], color=colour, label=label)
    axes.set(
        title="What a proximal step makes of a weight (tau = 1, strengths 0.6)",
        xlabel="z: the weight after the gradient step",
        ylabel="w: the weight after the prox",
    )
    axes.title.set_fontsize(13)
    axes.legend()
    save(figure, PICTURES / "prox.png")


# One picture each: its file, its strengths, its title.
PENALTIES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("l1", {"l1": 0.6}, "l1 = 0.6"),
    ("l2", {"l2": 0.6}, "l2 = 0.6"),
    ("elastic-net", {"l1": 0.6, "l2": 0.6}, "l1 = 0.6, l2 = 0.6"),
    ("mcp", {"l1": 0.6, "mcp_gamma": 2.5}, "l1 = 0.6, mcp_gamma = 2.5"),
    ("l0", {"l0": 0.3}, "l0 = 0.3"),
    ("box", {"lower": -0.5, "upper": 1.0}, "lower = -0.5, upper = 1"),
)


def draw_penalty(name: str, strengths: dict[str, Any], title: str) -> None:
    """What a penalty costs a weight, and what its proximal step makes of it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    z = np.linspace(-2, 2, 801)
    values = []
    for value in z:
        optimizer = FusedRegSGD([nn.Parameter(torch.tensor([value], dtype=torch.float64))], lr=1.0, **strengths)
        values.append(penalty(optimizer).item())
    costs = np.array(values)
    left.plot(z, np.where(np.isfinite(costs), costs, np.nan), color=ORANGE)
    for end in strengths.keys() & {"lower", "upper"}:
        left.axvline(strengths[end], color=ORANGE, linestyle="--")
    left.set(title=f"{title}: what it costs", xlabel="w", xlim=(-2.1, 2.1), ylim=(-0.05, 1.3))
    right.plot(z, z, color=GREY, linestyle="--")
    after = np.array([step_of(value, **strengths) for value in z])
    after[1:][np.abs(np.diff(after)) > 0.1] = np.nan  # a jump is no line
    right.plot(z, after, color=BLUE)
    right.set(title="what its step makes of z", xlabel="z: after the gradient step", ylabel="w")
    save(figure, PICTURES / f"prox-{name}.png")


UNIT_PENALTIES: tuple[tuple[dict[str, Any], float, str], ...] = (
    ({"group_l1": 0.6}, 0.6, "group_l1 = 0.6: a unit within the circle goes to zero"),
    ({"max_unit_norm": 1.0}, 1.0, "max_unit_norm = 1: a unit beyond it is drawn in"),
)


def draw_unit_penalties() -> None:
    """Arrows from where the gradient step takes a unit of two weights to where the prox does."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    ticks = np.linspace(-1.6, 1.6, 9)
    z = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    for axes, (strengths, radius, title) in zip(panels, UNIT_PENALTIES, strict=True):
        w = nn.Parameter(torch.from_numpy(z.copy()))
        w.grad = torch.zeros_like(w)
        FusedRegSGD([w], lr=1.0, **strengths).step()
        x = w.detach().numpy()
        axes.add_patch(plt.Circle((0, 0), radius, fill=False, color=ORANGE, linewidth=2))
        for start, end in zip(z, x, strict=True):
            if np.abs(start - end).max() > 1e-6:
                axes.annotate(
                    "", end, start, arrowprops={"arrowstyle": "->", "color": BLUE, "shrinkA": 0, "shrinkB": 0}
                )
            else:
                axes.plot(*start, marker=".", color=GREY)
        axes.set(title=title, xlabel="first weight", ylabel="second weight", aspect="equal")
        axes.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8))
    save(figure, PICTURES / "prox-units.png")


def draw_target() -> None:
    """Which weights of an MLP on digits the last renewal of a target sparsity takes, by their metric."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels / 16.0).float(), torch.from_numpy(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = FusedRegAdam(param_groups(model, sparsity=0.8), lr=3e-3)
    steps = 600
    # One renewal, so that all weights are there to be compared.
    schedule = SparsitySchedule(optimizer, total_steps=steps, begin=0.9, end=0.99, every=steps)
    weights = optimizer.param_groups[0]["params"]
    step = 0
    while step < int(0.99 * steps):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
            before = torch.cat([w.detach().abs().flatten() for w in weights])
            schedule.step()
            if step == int(0.99 * steps):
                break
    moments = torch.cat([optimizer.state[w]["exp_avg_sq"].flatten() for w in weights])
    d = (moments / (1 - 0.999**step)).sqrt() + 1e-8
    gone = torch.cat([(w == 0).flatten() for w in weights])
    q = (d.sqrt() * before)[gone].max().item()
    some = torch.randperm(len(d), generator=torch.Generator().manual_seed(0))[:3000]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for mask, colour, label in ((gone, GREY, "becomes zero"), (~gone, BLUE, "stays")):
        shown = some[mask[some] & (before[some] > 1e-4) & (d[some] > 1e-6)]
        axes.scatter(d[shown], before[shown], s=5, color=colour, label=label)
    line = np.logspace(-6, -0.5, 50)
    axes.plot(line, q / np.sqrt(line), color=ORANGE, label="sqrt(d) * |w| = q")
    axes.axhline(
        before.kthvalue(int(gone.sum())).values.item(), color="black", linestyle=":", label="where |w| alone would cut"
    )
    axes.set(
        title="sparsity=0.8: the weights of an MLP on digits",
        xlabel="d: the size of the weight's gradients",
        ylabel="|w|",
        xscale="log",
        yscale="log",
        xlim=(1e-5, 0.05),
        ylim=(1e-3, 3),
    )
    axes.legend(loc="lower left", markerscale=3)
    save(figure, PICTURES / "target.png")


def draw_modes() -> None:
    """One weight, loss (w - a)^2 / 2, l1 = 0.1: the minimiser is 0 where |a| <= l1, and a - l1 above."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharex=True)
    l1, steps = 0.1, 300
    styles = (("subgradient", ORANGE, "-"), ("decoupled", GREEN, "-"), ("proximal", BLUE, "--"))
    for axes, a in zip(panels, (0.05, 0.4), strict=True):
        for mode, colour, line in styles:
            w = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
            optimizer = FusedRegAdam([w], lr=0.01, l1=l1, penalty_mode=mode)
            path = [w.item()]
            for _ in range(steps):
                w.grad = w.detach() - a
                optimizer.step()
                path.append(w.item())
            at_end = "exactly 0" if path[-1] == 0 else f"{path[-1]:.4f}"
            axes.plot(path, color=colour, linestyle=line, label=f"{mode}: ends at {at_end}")
        minimiser = max(a - l1, 0.0)
        axes.axhline(minimiser, color="black", linestyle=":", linewidth=1.5, label=f"the minimiser, {minimiser:g}")
        axes.set(title=rf"loss $(w - {a:g})^2 / 2$, l1 = {l1:g}", xlabel="steps of Adam, lr 0.01")
        axes.legend(fontsize=11)
    panels[0].set_ylabel("w")
    figure.suptitle(
        "Subgradients come near zero, decoupled solves another problem, proximal ends at the minimiser", fontsize=15
    )
    save(figure, PICTURES / "modes.png")


def draw_thresholds() -> None:
    """How much l1 takes off a weight in one step, by how large the weight's gradients have been."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    lr, l1 = 1e-3, 1e-3
    scales = np.logspace(-6, 0, 200)
    for mode, colour in (("proximal", BLUE), ("decoupled", GREEN)):
        taken = []
        for scale in scales:
            moved = []
            for strength in (0.0, l1):
                w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
                w.grad = torch.full_like(w, scale)
                FusedRegAdam([w], lr=lr, l1=strength, penalty_mode=mode).step()
                moved.append(w.item())
            taken.append(moved[0] - moved[1])
        axes.plot(scales, taken, color=colour, label=mode)
    axes.axhline(2 * lr, color="black", linestyle=":", linewidth=1.5, label="2 lr: the safeguard")
    axes.set(
        title="What l1 takes off a weight in one step of Adam",
        xlabel=f"size of the weight's gradients, lr = {lr:g}, l1 = {l1:g}",
        ylabel="taken off",
        xscale="log",
        yscale="log",
    )
    axes.legend()
    save(figure, PICTURES / "thresholds.png")


# A rule's lr, and the share of it that is left at the end: the steps of most do not fall by themselves.
RULES: dict[str, tuple[dict[str, Any], float]] = {
    "Adam": ({"lr": 0.1}, 1e-2),
    "AdamW": ({"lr": 0.1, "weight_decay": 0.0}, 1e-2),
    "SGD": ({"lr": 0.1}, 1.0),
    "RMSprop": ({"lr": 0.03}, 1e-2),
    "Adagrad": ({"lr": 0.5}, 1.0),
    "NAdam": ({"lr": 0.1}, 1e-2),
    "RAdam": ({"lr": 0.1, "betas": (0.9, 0.99)}, 1e-2),
    "Adamax": ({"lr": 0.1}, 1e-2),
    "Adadelta": ({"lr": 1.0, "eps": 1e-3}, 1e-2),
    "ASGD": ({"lr": 0.1, "lambd": 0.0}, 1.0),
    "Rprop": ({"lr": 0.1}, 1.0),
    "FTRL": ({"lr": 0.5, "beta": 0.1}, 1.0),
    "Lion": ({"lr": 0.05}, 1e-2),
}


def draw_rules() -> None:
    """Every rule on one Lasso in two dimensions, whose minimiser has a zero."""
    curvature, centre, l1 = torch.tensor([[1.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([1.2, -0.25]).double(), 0.3
    first = float((curvature[0] @ centre - l1) / curvature[0, 0])  # the second is 0: its gradient is smaller than l1
    assert abs(float(curvature[1] @ (torch.tensor([first, 0.0]).double() - centre))) < l1
    assert {cls.__name__ for cls in OPTIMIZERS} == {f"FusedReg{name}" for name in RULES}
    x, y = np.meshgrid(np.linspace(-1.2, 2.1, 200), np.linspace(-0.9, 1.3, 200))
    from_centre = np.stack([x, y], -1) - centre.numpy()
    objective = np.einsum("...i,ij,...j", from_centre, curvature.numpy(), from_centre) / 2 + l1 * (abs(x) + abs(y))
    figure, panels = plt.subplots(3, 5, figsize=(15, 8.4), layout="constrained", sharex=True, sharey=True)
    for axes, cls in zip(panels.flat, OPTIMIZERS, strict=False):
        name = cls.__name__.removeprefix("FusedReg")
        options, falls_to = RULES[name]
        is_exact = "proximal" in cls.spec.modes
        w = nn.Parameter(torch.tensor([-0.9, 1.0], dtype=torch.float64))
        optimizer, path, steps = cls([w], l1=l1, **options), [w.tolist()], 600
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = options["lr"] * falls_to ** (i / steps)
            w.grad = curvature @ (w.detach() - centre)
            optimizer.step()
            path.append(w.tolist())
        axes.contour(x, y, objective, levels=14, colors="#dddddd", linewidths=0.8)
        axes.plot(*zip(*path, strict=True), color=BLUE if is_exact else ORANGE, linewidth=1.6)
        axes.plot(first, 0, "o", color="black", markersize=5)
        axes.plot(*path[-1], "x", color=BLUE if is_exact else ORANGE, markersize=9, markeredgewidth=2)
        axes.set_title(f"{name}: ({path[-1][0]:.3f}, {path[-1][1]:.3g})", fontsize=12)
        axes.grid(visible=False)
    for axes in panels.flat[len(OPTIMIZERS) :]:
        axes.axis("off")
    figure.suptitle(
        f"One Lasso, its minimiser at ({first:.3f}, 0): blue is proximal and ends there, orange is decoupled",
        fontsize=15,
    )
    save(figure, PICTURES / "rules.png")


def shrink(path: Path, to: Path, width: int = 1200) -> None:
    image = Image.open(path).convert("RGB")
    image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image.quantize(256).save(to, optimize=True)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    draw_proxes()
    for name, strengths, title in PENALTIES:
        draw_penalty(name, strengths, title)
    draw_unit_penalties()
    draw_target()
    draw_modes()
    draw_thresholds()
    draw_rules()
    for path in sorted(PICTURES.glob("*.png")):
        if not path.name.startswith("sparsity-"):  # experiments/sparsity draws those
            shrink(path, path, width=900)
    for path in (*DEMO_PLOTS, *sorted(EXAMPLE_PLOTS.glob("*.png"))):
        shrink(path, PICTURES / path.name)


if __name__ == "__main__":
    main()

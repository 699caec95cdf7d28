"""Tables and plots of the results, and the pages that show them."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from . import strengths, survivors
from .problems import PROBLEMS, UNSEEN
from .runner import COMPARISONS, SANITY, Comparison, Row, read
from .ways import UNIT_WAYS, WAYS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "minibatch.md"
PICTURES = ROOT / "docs" / "pictures"
TABLE = re.compile(r"(<!-- table: (?P<name>\S+) -->\n\n)(?:\|.*\n)*\n*")


def _cell(row: Row) -> str:
    percents = [100 * accuracy for accuracy in row.accuracies]
    return f"{statistics.median(percents):.1f} ({min(percents):.1f} to {max(percents):.1f})"


def table(comparison: Comparison, rows: list[Row]) -> str:
    """Median (worst to best seed) of each way and share; the best median of a share is bold."""
    found = {
        (row.way, row.share): row
        for row in rows
        if (row.problem, row.optimizer, row.units) == (comparison.problem, comparison.optimizer, comparison.units)
    }
    ways = {
        name: way
        for name, way in comparison.all_ways.items()
        if all((name, share) in found for share in comparison.shares)
    }
    best = {
        share: max(statistics.median(found[name, share].accuracies) for name in ways) for share in comparison.shares
    }
    lines = [
        f"| dense: {_cell(found['dense', 0.0])} | {' | '.join(f'{share:.0%}' for share in comparison.shares)} |",
        f"| --- |{' ---: |' * len(comparison.shares)}",
    ]
    for name, way in ways.items():
        cells = []
        for share in comparison.shares:
            row = found[name, share]
            cell = _cell(row)
            if statistics.median(row.accuracies) == best[share]:
                median, spread = cell.split(" ", 1)
                cell = f"**{median}** {spread}"
            zeros = statistics.median(row.zeros)
            cells.append(cell + (f", at {zeros:.1%}" if abs(zeros - share) > 0.01 else ""))
        has_metric = comparison.optimizer != "SGD"
        title = way.title if has_metric else way.title.replace("sqrt(d) * abs(w)", "abs(w), global")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("%", " %")


def means(problem: str, way: str, rows: list[Row]) -> dict[float, float]:
    """The mean accuracy with Adam, by share."""
    return {
        row.share: statistics.mean(row.accuracies)
        for row in rows
        if (row.problem, row.optimizer, row.units, row.way) == (problem, "Adam", False, way)
    }


def tables() -> dict[str, str]:
    rows = read()
    done = {(row.problem, row.optimizer, row.units) for row in rows}
    return {
        **{
            each.name: table(each, rows)
            for each in (*COMPARISONS, *SANITY)
            if (each.problem, each.optimizer, each.units) in done
        },
        **(strengths.tables() if strengths.RESULTS.exists() else {}),
        **({"survivors": survivors.table()} if survivors.RESULTS.exists() else {}),
    }


def renewed(page: str, all_tables: dict[str, str]) -> str:
    """The page with each table that it has a mark for: ``<!-- table: digits-Adam -->`` and an empty line."""
    return TABLE.sub(lambda match: f"{match[1]}{all_tables[match['name']]}\n\n", page).rstrip("\n") + "\n"


# -- plots


def plot() -> list[Path]:
    sys.path.insert(0, str(ROOT / "examples"))
    sys.path.insert(0, str(ROOT / "docs"))
    import matplotlib.pyplot as plt
    from _plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, save
    from draw_pictures import shrink

    colours = {
        "metric": BLUE,
        "magnitude": ORANGE,
        "damage": SKY,
        "uniform": YELLOW,
        "lamp": PURPLE,
        "l1": GREEN,
        "mcp": "#004d36",
        "tp": PURPLE,
        "taylor": SKY,
        "group_l1": GREEN,
        "finetuned": "black",
    }
    rows = read()
    files = []
    for units in (False, True):
        comparisons = [each for each in COMPARISONS if each.units == units and each.optimizer == "Adam"]
        figure, panels = plt.subplots(
            1, len(comparisons), figsize=(6.2 * len(comparisons), 6.6), layout="constrained", squeeze=False
        )
        ways = UNIT_WAYS if units else WAYS
        for axes, comparison in zip(panels.flat, comparisons, strict=True):
            its = [
                row for row in rows if (row.problem, row.optimizer, row.units) == (comparison.problem, "Adam", units)
            ]
            places = range(len(comparison.shares))
            for name, way in ways.items():
                by_share = {row.share: [100 * each for each in row.accuracies] for row in its if row.way == name}
                if len(by_share) < len(comparison.shares):
                    continue
                runs = [by_share[share] for share in comparison.shares]
                medians = [statistics.median(each) for each in runs]
                shift = 0.05 * (list(ways).index(name) - len(ways) / 2)
                label = way.title.replace("`", "")
                (line,) = axes.plot(
                    [place + shift for place in places],
                    medians,
                    marker="o",
                    markersize=4,
                    color=colours[name],
                    label=label,
                    linewidth=3 if name == "metric" else 1.5,
                    zorder=5 if name == "metric" else 3,
                    linestyle="--" if name in ("mcp", "finetuned") else "-",
                )
                axes.vlines(
                    [place + shift for place in places],
                    [min(each) for each in runs],
                    [max(each) for each in runs],
                    color=line.get_color(),
                    linewidth=1,
                )
            for row in its:
                if row.way == "dense":
                    axes.axhline(100 * statistics.median(row.accuracies), color=GREY, linestyle=":", label="dense")
            axes.set_xticks(list(places), [f"{share:.0%}" for share in comparison.shares])
            axes.set(title=PROBLEMS[comparison.problem].title, xlabel=f"zeros{', hidden units' if units else ''}")
            worst = min(min(row.accuracies) for row in its)
            if comparison.problem in ("digits", "deep", "wide"):
                axes.set_ylim(bottom=max(100 * worst - 1, 80))
        panels[0, 0].set_ylabel("test accuracy in %")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle("Adam, equal budgets: medians, and lines from the worst to the best of 5 seeds", fontsize=15)
        file = PICTURES / f"sparsity-{'units' if units else 'weights'}.png"
        save(figure, file)
        shrink(file, file, width=1400)
        files.append(file)
    return files


TITLES = {name: problem.title for name, problem in (PROBLEMS | UNSEEN).items()}

"""What was measured, as rows: on the terminal, in Markdown, and in JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Seconds
from peers import Contender, Rule
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass
class Grid:
    """A table, wherever it is printed."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    caption: str = ""

    def show(self, console: Console) -> None:
        table = Table(
            title=escape(self.title), caption=escape(self.caption), title_justify="left", caption_justify="left"
        )
        for i, header in enumerate(self.headers):
            table.add_column(header, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print("", table, sep="\n")

    def markdown(self) -> str:
        lines = [self.headers, ["---", *["---:"] * (len(self.headers) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.caption}\n" if self.caption else "")


@dataclass
class Row:
    contender: str
    milliseconds: float
    quartiles: tuple[float, float]
    ratio: float
    """To torch's plain fused step, which does no regularization but its decay."""
    gb_per_s: float
    """Of the bytes that the job takes at the least."""
    extra: dict[str, Any] = field(default_factory=dict)


def rows_of(contenders: list[Contender], seconds: Seconds, plain: str, rule: Rule, dtype: Any, numel: int) -> list[Row]:
    plain_s = statistics.median(seconds[plain])
    rows = []
    for contender in contenders:
        first, median, third = statistics.quantiles(seconds[contender.name], n=4)
        size = numel * rule.bytes_per_element(dtype, contender.clips)
        rows.append(
            Row(contender.name, median * 1e3, (first * 1e3, third * 1e3), median / plain_s, size / median / 1e9)
        )
    return rows


def format_ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:.1f} us"


def grid_of(title: str, rows: list[Row], stream_gb_per_s: float | None, caption: str = "") -> Grid:
    """``stream_gb_per_s``: of the in-place stream, None where the tensors fit in a cache. Spread: between quartiles."""
    headers = ["one step of", "median", "spread", "ratio"]
    if stream_gb_per_s is not None:
        headers += ["GB/s", "of stream"]
    headers += list(rows[0].extra)
    cells = []
    for row in rows:
        line = [
            row.contender,
            format_ms(row.milliseconds),
            f"{(row.quartiles[1] - row.quartiles[0]) / row.milliseconds:.0%}",
            f"{row.ratio:.2f}",
        ]
        if stream_gb_per_s is not None:
            line += [f"{row.gb_per_s:.1f}", f"{row.gb_per_s / stream_gb_per_s:.0%}"]
        line += [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.extra.values()]
        cells.append(line)
    return Grid(title, headers, cells, caption)


def write(folder: Path, stem: str, heading: str, about: dict[str, Any], grids: list[Grid], results: Any) -> None:
    """``stem``.json and ``stem``.md, and whatever pictures named ``stem``-*.png stand in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
    pictures = [f"![{path.stem}]({path.name})" for path in sorted(folder.glob(f"{stem}-*.png"))]
    stamp = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n\n".join([f"# {heading}", stamp, *pictures, *(grid.markdown() for grid in grids)])
    (folder / f"{stem}.md").write_text(text.rstrip() + "\n")

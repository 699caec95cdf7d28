"""What a compaction has done, for its reader."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CompactLayer:
    """A layer of which something was cut: the shape of its first parameter, before and after."""

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class LeftWhole:
    """What ``compact`` could not follow or fold, and so left as it was."""

    where: str
    reason: str
    dead: int
    """How many channels there are constants, and would have gone otherwise, as far as that is known."""


@dataclass(frozen=True)
class CompactReport:
    """Numbers before and after; ``print(small.report)`` shows all of it."""

    parameters: tuple[int, int]
    flops: tuple[int, int]
    """Of one forward on the example inputs, as torch.utils.flop_counter counts: matrix products, convolutions,
    attention."""
    max_difference: float
    """Between the two models' outputs on the example inputs, in the model's own dtype."""
    max_difference_float64: float | None
    """The same in float64; None for a model that does not run in float64."""
    folded: int
    """How many constants other than 0 became a part of a bias, or, beside a convolution's padding, of another channel.
    They are those of eval mode. If there are none, training goes on as the model's with these units standing still."""
    layers: list[CompactLayer] = field(default_factory=list)
    left: list[LeftWhole] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            _ratio("parameters", self.parameters),
            _ratio("FLOPs", self.flops),
            f"outputs differ by at most {self.max_difference:.1e}"
            + ("" if self.max_difference_float64 is None else f", in float64 by {self.max_difference_float64:.1e}"),
            f"constants folded: {self.folded}",
        ]
        if self.layers:
            width = max(len(layer.name) for layer in self.layers)
            kinds = max(len(layer.kind) for layer in self.layers)
            lines += ["", "layers that were cut:"]
            for layer in self.layers:
                before, after = ("x".join(map(str, shape)) for shape in (layer.before, layer.after))
                lines.append(f"  {layer.name:<{width}}  {layer.kind:<{kinds}}  {before} -> {after}")
        if self.left:
            lines += ["", "left whole:"]
            for left in self.left:
                dead = f" ({left.dead} dead channels)" if left.dead else ""
                lines.append(f"  {left.where}: {left.reason}{dead}")
        return "\n".join(lines)


def _ratio(name: str, numbers: tuple[int, int]) -> str:
    before, after = numbers
    times = f" ({before / after:.1f} times fewer)" if after and after != before else ""
    return f"{name}: {before:,} -> {after:,}{times}"

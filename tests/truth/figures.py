"""The figures behind the claims: each test says by how much it held; the worst of each claim is printed at the end."""

from __future__ import annotations

FIGURES: dict[str, tuple[float, float]] = {}
"""Claim -> the worst that was measured, and the bar."""


def at_most(bar: float, value: float, claim: str) -> None:
    """Asserts ``value <= bar``, which a NaN is not."""
    worst = FIGURES.get(claim, (0.0, bar))[0]
    FIGURES[claim] = (worst if value <= worst else float(value), bar)
    assert value <= bar, f"{claim}: {value:.2e} (allowed: {bar:.2e})"

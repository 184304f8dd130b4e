"""Numbers and nouns as they are written in captions, notes and table cells."""

from __future__ import annotations

from typing import Any

DASH = "—"
"""Printed in place of a missing value."""


def plural(count: int, noun: str) -> str:
    """Return the count and its noun: "1 step", "2 steps". The plural is formed with an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def sentence(text: str) -> str:
    """Capitalize the first letter and add a full stop; an empty text stays empty."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def to_points(fraction: float | None) -> float | None:
    """Convert a fraction to points (percent); null stays null."""
    return None if fraction is None else 100 * fraction


def interval_text(bounds: list[float] | None) -> str:
    """Return an interval of fractions in points, "[40.0, 60.0]", or a dash."""
    return DASH if bounds is None else f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]".replace("-", "−")


def difference_text(comparison: dict[str, Any]) -> str:
    """Return a difference of fractions in points with its interval, "+1.2 [0.3, 2.1]".

    The interval is left out where it is null; a null difference gives a dash.
    """
    if comparison["difference"] is None:
        return DASH
    text = f"{100 * comparison['difference']:+.1f}".replace("-", "−")
    if comparison["ci_low"] is None:
        return text
    return f"{text} {interval_text([comparison['ci_low'], comparison['ci_high']])}"

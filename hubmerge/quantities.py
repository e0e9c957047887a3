"""How quantities are written for people."""

from __future__ import annotations


def size(n_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}" if unit != "B" else f"{int(n_bytes)} B"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def percent(fraction: float) -> str:
    """A fraction in percent, three digits."""
    value = 100 * fraction
    return f"{value:.3g} %" if value < 1000 else f"{value:.0f} %"

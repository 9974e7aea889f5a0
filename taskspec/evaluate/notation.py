"""How shares and their differences are written for people: in percent, with one decimal and real signs.

Path: statistics → [here] → comparison, its text and its report.
"""

from __future__ import annotations

from taskspec.evaluate.statistics import Difference, Interval


def percent(share: float) -> str:
    """`26.1` of 0.261."""
    return f"{100 * share:.1f}"


def signed(difference: float) -> str:
    """`+0.4` of 0.004, with a real minus sign; what rounds to zero is `+0.0`."""
    return f"{100 * difference:+z.1f}".replace("-", "−")


def average_text(average: float, std: float | None) -> str:
    """`26.1 ± 0.4`; `26.1` where there is no spread."""
    return percent(average) + ("" if std is None else f" ± {percent(std)}")


def interval_text(interval: Interval | None) -> str:
    """`−0.9 to +0.2`; `one seed` for no interval."""
    return "one seed" if interval is None else f"{signed(interval.low)} to {signed(interval.high)}"


def difference_text(difference: Difference) -> str:
    """`−0.4, over queries −0.9 to +0.2, over seeds −1.0 to +0.3`."""
    seeds = "one seed" if difference.seeds is None else f"over seeds {interval_text(difference.seeds)}"
    return f"{signed(difference.mean)}, over queries {interval_text(difference.queries)}, {seeds}"

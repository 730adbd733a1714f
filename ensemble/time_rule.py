"""Reads times by one rule, wherever they come in: shop files, events, options.

A number's size says its unit: Unix seconds (from 1973 on), milliseconds, microseconds and nanoseconds lie
three decimal places apart from each other. What reads as a calendar day (20231204), minute (202312040623) or
moment (20231204062340) is one.
Smaller numbers are positions: they order, and are no clock.
"""

from __future__ import annotations

import datetime
import re
import time as clock
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidArgument

CLOCK_SKEW_S = 86_400  # local times may run up to a day ahead of UTC
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
NAMES = {
    "position": "positions (they order, no clock)",
    "s": "Unix seconds",
    "ms": "Unix milliseconds",
    "us": "Unix microseconds",
    "ns": "Unix nanoseconds",
    "day": "calendar days, YYYYMMDD",
    "minute": "calendar minutes, YYYYMMDDhhmm",
    "moment": "calendar moments, YYYYMMDDhhmmss",
}
CALENDAR = {"day": 1, "minute": 10_000, "moment": 1_000_000}  # what a day's number is multiplied by
UNITS = tuple(NAMES)
_BOUNDS = (1e8, 1e11, 1e14, 1e17)  # where seconds (1973), milliseconds, microseconds and nanoseconds begin
_LONGEST_MONTH = np.array([0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])


def units_of(numbers: Array) -> Array:
    """Gives the unit that each number's [n] size says: [n] int64, places in UNITS."""
    sizes = np.searchsorted(_BOUNDS, numbers, side="right")
    sizes = np.where((sizes == 0) & _are_days(numbers), UNITS.index("day"), sizes)
    for unit in ("minute", "moment"):
        maybe = (sizes == UNITS.index("ms")) & _are_days(numbers // CALENDAR[unit])
        if maybe.any():
            rest = np.where(maybe, numbers, 0).astype(np.int64) % CALENDAR[unit]
            hour, minute, second = _clock(rest, unit)
            is_clock = (hour < 24) & (minute < 60) & (second < 60)
            sizes = np.where(maybe & is_clock, UNITS.index(unit), sizes)
    return sizes


def _clock(rest: Array, unit: str) -> tuple[Array, Array, Array]:
    """Takes what stands behind the day in a calendar number apart: hour, minute, second, [n] int64 each."""
    rest = rest * (CALENDAR["moment"] // CALENDAR[unit])
    return rest // 10_000, rest // 100 % 100, rest % 100


def _are_days(numbers: Array) -> Array:
    """Says which numbers [n] read as a day from 1990 to 2099, YYYYMMDD: [n] bool."""
    inside = (numbers >= 19_900_101) & (numbers < 21_000_000) & (numbers == np.floor(numbers))
    if not inside.any():
        return inside
    whole = np.where(inside, numbers, 0).astype(np.int64)
    months, days = whole // 100 % 100, whole % 100
    good = inside & (months >= 1) & (months <= 12) & (days >= 1)
    return good & (days <= _LONGEST_MONTH[np.where(good, months, 0)])


def seconds_from_numbers(numbers: Array, unit: str) -> Array:
    """Gives numbers [n] of one unit as seconds: int64 where they are whole numbers, else float64."""
    if unit in CALENDAR:
        whole, rest = np.divmod(numbers.astype(np.int64), CALENDAR[unit])
        months = (whole // 10_000 - 1970) * 12 + whole // 100 % 100 - 1
        first = months.astype("datetime64[M]").astype("datetime64[s]").astype(np.int64)
        hour, minute, second = _clock(rest, unit)
        return first + (whole % 100 - 1) * 86_400 + hour * 3_600 + minute * 60 + second
    per_second = PER_SECOND.get(unit, 1)
    if numbers.dtype.kind == "i":
        return numbers // per_second
    return numbers / per_second


def date_of(time_s: float) -> str:
    """Gives the day of a time in seconds, 2100-01-01; "no date" where there is none."""
    try:
        return f"{datetime.datetime.fromtimestamp(int(time_s), datetime.UTC):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        return "no date"


def check_time(value: Any, now_s: float | None = None) -> tuple[float, str]:
    """Gives one time in seconds, and the unit in which it came (`iso` for a text); InvalidArgument says what
    is wrong with it."""
    is_text = isinstance(value, str)
    number = _number(value)
    if number is None and is_text:
        seconds, unit = _seconds_from_iso(value), "iso"
    elif number is None:
        raise InvalidArgument(f"time: must be a finite number or an ISO 8601 time, got {value!r:.60}")
    else:
        unit = UNITS[int(units_of(np.array([number]))[0])]
        fine = number if unit not in CALENDAR else np.floor(number)
        seconds = float(seconds_from_numbers(np.array([fine], np.float64), unit)[0])
    if seconds > (clock.time() if now_s is None else now_s) + CLOCK_SKEW_S:
        raise InvalidArgument(
            f"time: {value!r:.60} is in the future ({date_of(seconds)}); it would stay the newest for ever"
        )
    return seconds, unit


def _number(value: Any) -> float | None:
    """Gives a finite number, also one written as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, np.integer, np.floating)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e300 else None  # false for NaN, too


def _seconds_from_iso(text: str) -> float:
    """Reads ISO 8601 text, UTC where it names no zone, as seconds since 1970."""
    try:
        moment = datetime.datetime.fromisoformat(re.sub(" ?(UTC|GMT)$", "Z", text.strip().upper()))
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise InvalidArgument(f"time: must be a number or an ISO 8601 time, got {text!r:.60}") from None

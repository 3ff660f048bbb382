"""Durations as Slurm writes them, and for people."""

import re

_DURATION = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")


def seconds_of(duration: str) -> int | None:
    """Seconds of `D-HH:MM:SS`, `HH:MM:SS`, `MM:SS` or seconds; None for anything else, such as Slurm's UNLIMITED."""
    found = _DURATION.fullmatch(duration.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def in_words(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

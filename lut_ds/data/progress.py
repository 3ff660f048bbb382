"""The progress of a long command over many samples."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, total: int, done: int = 0, unit: str = "image") -> Any:
    """A tqdm bar on standard error with rate and time left: live on a terminal, a line every half minute elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=f" {unit}s",
        file=sys.stderr,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 30.0,
        smoothing=0.05,
        delay=1.0,  # what is refused at once, or done at once, shows none
    )

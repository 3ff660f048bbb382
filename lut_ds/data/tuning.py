"""How a machine loads fastest: threads, prefetch and the hardware decoder's share, found once and kept for the machine."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DEFAULT_PREFETCH = 2
_MOST_THREADS = 8  # of a rank that nobody tuned: beyond, the readers of a node's other ranks need the cores


@dataclass(frozen=True)
class GpuDecoder:
    """How a GPU decodes.

    Attributes:
        hw_decoder_load: share of a batch's JPEGs that its hardware decoder takes, where it has one; DALI's default.
        preallocate_side: buffers for images of this side are made at the start, pixels; 0: as images come.
    """

    hw_decoder_load: float = 0.65
    preallocate_side: int = 0


DALI_DEFAULTS = GpuDecoder()


@dataclass(frozen=True)
class Loading:
    """How to load; none of it changes a pixel.

    Attributes:
        threads: decoding threads of a rank.
        prefetch: micro-batches prepared ahead.
        gpu_decoder: how a GPU decodes.
    """

    threads: int
    prefetch: int = DEFAULT_PREFETCH
    gpu_decoder: GpuDecoder = DALI_DEFAULTS


def machine_key(cores: int, gpu: str | None, image_size: int) -> str:
    """What a tuning holds for: cores of a rank, its GPU's name, and the views' side."""
    return f"{cores} cores, {gpu or 'no GPU'}, {image_size} px"


def tuning_file() -> Path:
    """Where tunings are kept: $XDG_CACHE_HOME/lut_ds/loader.json, below ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lut_ds" / "loader.json"


def load_tuning(key: str) -> Loading | None:
    """The stored tuning of a machine; None without one, or with one that another version wrote."""
    try:
        stored = _read()[key]
        decoder = GpuDecoder(float(stored["hw_decoder_load"]), int(stored["preallocate_side"]))
        return Loading(int(stored["threads"]), int(stored["prefetch"]), decoder)
    except (KeyError, TypeError, ValueError):
        return None


def save_tuning(key: str, loading: Loading) -> Path:
    """Keep a machine's tuning; returns the file."""
    file = tuning_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    values = {"threads": loading.threads, "prefetch": loading.prefetch, **asdict(loading.gpu_decoder)}
    aside.write_text(json.dumps({**_read(), key: values}, indent=1) + "\n")
    os.replace(aside, file)
    return file


def choose_loading(
    threads: int | None, prefetch: int | None, hw_decoder_load: float | None, cores: int, gpu: str | None, size: int
) -> Loading:
    """What is given; for what is None, the machine's stored tuning, or else a cautious default.

    Args:
        cores: CPU cores that this rank may use; gpu: its GPU's name, or None; size: side of a view.
    """
    found = load_tuning(machine_key(cores, gpu, size)) or Loading(max(1, min(_MOST_THREADS, cores)))
    decoder = found.gpu_decoder
    return Loading(
        found.threads if threads is None else threads,
        found.prefetch if prefetch is None else prefetch,
        decoder if hw_decoder_load is None else replace(decoder, hw_decoder_load=hw_decoder_load),
    )


def _read() -> dict[str, Any]:
    try:
        stored = json.loads(tuning_file().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}

"""NVIDIA DALI's parts, imported in one place: it comes with an extra, and its absence is the user's to repair."""

from typing import Any

from lut_ds.errors import UserError

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import Pipeline, do_not_convert
    from nvidia.nvimgcodec import CodeStream  # the decoder's own parser; comes with DALI
except ImportError as error:
    raise UserError(
        f"nvidia-dali: expected it to be installed, found: {error}; install lut-ds with the extra cuda13 or cuda12"
    ) from error

Node = Any  # DALI's DataNode: the library has no types

__all__ = ["CodeStream", "Node", "Pipeline", "do_not_convert", "fn", "math", "pipeline_def", "types"]

"""What makes a file a usable image: a header of a known format, sides and pixels within bounds, and pixels that decode."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from lut_ds.data.dali import CodeStream
from lut_ds.data.pipeline import decode_each
from lut_ds.errors import RunFault

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what the pipeline decodes
LONGEST = 1024  # times the shorter side: a longer image would be gigabytes once its shorter side is resized
MOST_PIXELS = 100_000_000  # 300 MB decoded; a file of a few kilobytes can claim more than any memory holds


def image_hw(data: bytes, name: str) -> tuple[int, int]:
    """Height and width that an encoded image decodes to (EXIF not applied), from its header alone.

    The header is read as the decoder reads it, which matters beyond the size: in a batch of 32 or more, one that its parser
    refuses crashes the process (nvidia-dali 2.4 throws past tasks that are still running), so none may get there.

    RunFault naming it when it is not an image, has more than `MOST_PIXELS`, or one side over `LONGEST` times the other.
    """
    if not data:
        raise RunFault(f"data: {name}: expected an image, found an empty file")
    try:
        header = CodeStream(data)
        height, width, channels = header.height, header.width, header.num_channels
        usable = channels > 0 and header.codec_name.upper() in FORMATS and np.dtype(header.dtype).kind in "iu"
    except (RuntimeError, TypeError) as error:  # TypeError: a depth that there is no type for
        raise RunFault(f"data: {name}: {_reason(data)}") from error
    if not usable:
        raise RunFault(f"data: {name}: {_reason(data)}")
    if min(height, width) < 1 or max(height, width) > LONGEST * min(height, width):
        raise RunFault(f"data: {name}: expected sides of at most 1 to {LONGEST}, found {width}x{height}")
    if height * width > MOST_PIXELS:
        raise RunFault(
            f"data: {name}: expected at most {MOST_PIXELS:,} pixels, found {width}x{height}; make it smaller"
        )
    return height, width


def undecodable(
    encoded: Sequence[bytes], sizes_hw: Sequence[tuple[int, int]], device_id: int | None
) -> Iterator[str | None]:
    """Why each image does not decode, on that device, to the size that its header says; None for those that do."""
    for data, (height, width), found in zip(encoded, sizes_hw, decode_each(encoded, device_id)):
        if isinstance(found, RuntimeError):
            yield _reason(data)
        elif found.shape != (height, width, 3):
            yield f"decodes to {found.shape[1]}x{found.shape[0]}, but its header says {width}x{height}"
        else:
            yield None


def _reason(data: bytes) -> str:
    """Why an image does not decode, in Pillow's words."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Image.UnidentifiedImageError:
        return f"expected one of {', '.join(FORMATS)}, found something that starts with {data[:8]!r}"
    except Exception as error:  # noqa: BLE001 - what Pillow raises for damaged data is open-ended, and only its words count
        return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
    return "cannot be decoded: the decoder does not support it"

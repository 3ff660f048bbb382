"""The image operators of the DALI graph, in formulations that DALI's kernels do exactly enough and fast.

Each takes and returns an HWC RGB uint8 node of any size and has no parameter but those given, on the CPU as on a GPU. How far
each is from PIL is held by the golden tests. PIL truncates where DALI rounds, hence the half steps.
"""

from collections.abc import Callable, Iterable

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from lut_ds.data.dali import Node, do_not_convert, fn, math, types
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import BRIGHTNESS, CONTRAST, SATURATION

Image = NDArray[np.uint8]  # [H, W, 3]
Resizer = Callable[[list[Image], list[NDArray[np.float32]]], list[Image]]
_TRUNCATE = -0.499 / 255  # the unit of a brightness shift is the largest value of the output type
_TRUNCATE16 = -0.499 / 32767


def decode(encoded: Node, gpu: bool, gpu_decoder: GpuDecoder = DALI_DEFAULTS) -> Node:
    """Decode to RGB as PIL does: the same chroma upsampling, and EXIF orientation not applied.

    On a GPU as `gpu_decoder` says: its hardware takes a share of the JPEGs it can, CUDA cores the rest.
    """
    return fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        adjust_orientation=False,
        hw_decoder_load=gpu_decoder.hw_decoder_load,  # this and the next two: the GPU decoder alone reads them
        preallocate_height_hint=gpu_decoder.preallocate_side,
        preallocate_width_hint=gpu_decoder.preallocate_side,
    )


def resize(x: Node, size: Node, resizer: Resizer | None) -> Node:
    """Antialiased bicubic resize to `size` (height, width), by `resizer` on the CPU and, where that is None, by DALI.

    DALI's own kernel is up to 12 grey levels from Pillow at sharp edges (Pillow clips to 8 bits between its two passes) and
    takes almost three times as long on a CPU; `resizer` is within one level.
    """
    if resizer is None:
        return fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.python_function(x, size, function=resizer, batch_processing=True, output_layouts="HWC")


@do_not_convert
def make_resizer(parallel_map: Callable[..., Iterable[Image]]) -> Resizer:
    """The CPU's resize of a batch, whose samples go through `parallel_map` (for example an executor's)."""

    def resize_batch(images: list[Image], sizes: list[NDArray[np.float32]]) -> list[Image]:
        return list(parallel_map(resize_image, images, sizes))

    return resize_batch


def resize_image(image: Image, size: NDArray[np.float32]) -> Image:
    """Resize uint8 [H, W, 3] to `size` (height, width) as Pillow does (bicubic, antialiased): within one grey level."""
    to_height, to_width = int(size[0]), int(size[1])
    if (to_height, to_width) == image.shape[:2]:
        return image
    if not _torch_matches_pillow(image.shape[0], image.shape[1], to_height, to_width):
        resized = PIL.Image.fromarray(image).resize((to_width, to_height), PIL.Image.Resampling.BICUBIC)
        return np.asarray(resized)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, size=(to_height, to_width), mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).contiguous().numpy()


def _torch_matches_pillow(height: int, width: int, to_height: int, to_width: int) -> bool:
    """Whether torch's kernel, which is five times as fast, is within one grey level of Pillow's.

    Not where it enlarges (coarser weights: two levels), and not where Pillow goes down before it goes across, which its
    newer versions do for some tall images; between the passes both round and clip to 8 bits.
    """
    if to_height > height or to_width > width:
        return False
    tall = 3 * width < 2 * height
    less_across = 1.05 * width * to_height < height * to_width and 5 * to_width > 3 * width
    return not (tall or less_across)


def crop_reflect(x: Node, start: Node, shape: Node) -> Node:
    """The window of `shape` (height, width) at `start`, which may lie outside: it reflects at the edge, not repeating it."""
    return fn.slice(x, start=start, shape=shape, axes=[0, 1], out_of_bounds_policy="reflect_101")


def jitter(x: Node, op: Node, factor: Node, gpu: bool) -> Node:
    """One operator of ColorJitter: `op` BRIGHTNESS, CONTRAST, SATURATION with their factor, or HUE with its `hue_sextants`."""
    if op == BRIGHTNESS:
        x = fn.brightness_contrast(x, brightness=factor, brightness_shift=_TRUNCATE)
    elif op == CONTRAST:
        x = _contrast(x, factor, gpu)
    elif op == SATURATION:
        x = _saturation(x, factor)
    else:
        x = hue(x, factor)
    return x


def _gray(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def gray3(x: Node) -> Node:
    """The luma (ITU-R 601) in all three channels."""
    return fn.color_space_conversion(_gray(x), image_type=types.GRAY, output_type=types.RGB)


def _contrast(x: Node, factor: Node, gpu: bool) -> Node:
    center = math.floor(fn.reductions.mean(_gray(x)) + 0.5)
    if gpu:  # an argument cannot come from the GPU, so there the mean enters through arithmetic
        return _blend(x, center, factor.gpu())
    return fn.brightness_contrast(x, contrast=factor, contrast_center=center, brightness_shift=_TRUNCATE)


def _blend(x: Node, center: Node, factor: Node) -> Node:
    """factor * x + (1 - factor) * center, truncated."""
    return fn.cast(x * factor + (1.0 - factor) * center - 0.499, dtype=types.UINT8)


def _saturation(x: Node, factor: Node) -> Node:
    own = fn.brightness_contrast(x, brightness=factor, brightness_shift=_TRUNCATE16, dtype=types.INT16)
    gray = fn.brightness_contrast(gray3(x), brightness=1.0 - factor, dtype=types.INT16)
    return fn.cast(own + gray, dtype=types.UINT8)


def hue(x: Node, sextants: Node) -> Node:
    """Rotate the hue at constant HSV saturation and value by `sextants` in (-1, 1), without going through HSV.

    On the HSV hexagon a channel is r = clamp(2r - median, min, max), falling on one side of its peak and rising on the other,
    in steps of the chroma c = max - min a sextant: r' = clamp(2r - median - sextants * c * sign(g - b), min, max), and so on
    around the circle.
    """
    planes = fn.reinterpret(_interchange(x, "CHW"), layout="HWC")  # brightness_contrast knows no other layout
    r, g, b = planes[0:1], planes[1:2], planes[2:3]
    low, high = math.min(r, g), math.max(r, g)
    top, bottom = math.max(high, b), math.min(low, b)
    median = math.max(low, math.min(high, b))
    step = fn.brightness_contrast(top - bottom, brightness=sextants, dtype=types.INT16)
    falling, twice = -(step + median), step * np.int16(2)
    turned = [
        math.max(math.min(own * np.int16(2) + falling + twice * (following <= previous), top), bottom)
        for own, following, previous in ((r, g, b), (g, b, r), (b, r, g))
    ]
    return _interchange(fn.reinterpret(fn.cat(*turned, axis=0), layout="CHW"), "HWC")


def _interchange(x: Node, layout: str) -> Node:
    """The image as uint8 in another layout; faster than a transpose."""
    return fn.crop_mirror_normalize(x, dtype=types.UINT8, output_layout=layout, mean=[0.0], std=[1.0])


def solarize(x: Node, threshold: int) -> Node:
    """Invert the values from `threshold` on."""
    table = [v if v < threshold else 255 - v for v in range(256)]
    return fn.lookup_table(x, keys=list(range(256)), values=table, dtype=types.UINT8)


def blur(x: Node, kernel: Node, gpu: bool) -> Node:
    """Convolve with `kernel` [taps], of `blur_kernels`, down and across; the edge pixel repeats outside."""
    kernel = kernel.gpu() if gpu else kernel
    down = fn.filter(x, fn.reshape(kernel, shape=[-1, 1]), border="clamp")
    return fn.filter(down, fn.reshape(kernel, shape=[1, -1]), border="clamp")


def hue_sextants(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """PIL's hue shift in sixths of a turn: it adds trunc(255 * turns) to a hue that it truncated to 8 bits (half a step)."""
    sextants: NDArray[np.float64] = (np.trunc(turns * 255.0) - 0.5) * (6.0 / 255.0)
    return sextants


def blur_kernels(sigma: NDArray[np.float64], largest: float) -> NDArray[np.float32]:
    """The kernels [n, taps] that PIL's GaussianBlur(sigma) [n] amounts to: an extended box, three times.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", SSVM 2011. `taps` fits
    the `largest` sigma, and is the same for all.
    """
    reach = int(_box_radius(np.array([largest]))[0]) + 1
    kernels = []
    for radius in _box_radius(sigma):
        whole = int(radius)
        box = np.zeros(2 * reach + 1)
        box[reach - whole : reach + whole + 1] = 1.0
        box[[reach - whole - 1, reach + whole + 1]] = radius - whole
        box /= box.sum()
        kernels.append(np.convolve(np.convolve(box, box), box))
    return np.array(kernels, np.float32)


def _box_radius(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fractional radius of the box whose threefold application has the variance sigma ** 2."""
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius: NDArray[np.float64] = whole + part
    return radius

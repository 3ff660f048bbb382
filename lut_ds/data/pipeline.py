"""The DALI pipeline: encoded bytes in, decoded once, one uint8 HWC tensor [S, S, 3] out for each view.

One definition runs on the CPU (device_id None) and on a GPU ("mixed" decoder). No operator draws anything: `pipeline_inputs`
turns ViewParams into the arrays that the graph reads. Samples that an operator does not touch skip it (conditionals), and the
formulations are those that DALI's CPU kernels do fast; how far each is from PIL is held by the golden tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.views import BLUR, BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, SOLARIZE, ViewParams, ViewSpec
from lut_ds.errors import UserError

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import Pipeline
except ImportError as error:
    raise UserError(
        f"nvidia-dali: expected it to be installed, found: {error}; install lut-ds with the extra cuda13 or cuda12"
    ) from error

Node = Any  # DALI's DataNode: the library has no types
_TRUNCATE = -0.499 / 255  # PIL truncates where DALI rounds; the unit of a shift is the output type's largest value
_TRUNCATE16 = -0.499 / 32767


def build_pipeline(
    views: Sequence[ViewSpec],
    image_size: int,
    source: Callable[[], dict[str, Any]],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
) -> Pipeline:
    """The pipeline for `views` at side `image_size`: one [b, S, S, 3] uint8 a view for each `pipeline_inputs` of `source`.

    `source` is called ahead of the consumer, up to `prefetch` batches, and raises StopIteration at the end. `device_id` None
    runs everything on the CPU; otherwise decoding is shared with, and all else runs on, that GPU.
    """
    names = _input_names(views)

    def ordered() -> tuple[Any, ...]:
        inputs = source()
        return tuple(inputs[name] for name in names)

    return _definition(
        tuple(views),
        image_size,
        ordered,
        device_id is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )


def _input_names(views: Sequence[ViewSpec]) -> list[str]:
    names = ["encoded"]
    if any(spec.kind == "resize_crop" for spec in views):
        names += ["resize.size", "resize.start", "resize.end"]
    for i, spec in enumerate(views):
        own = ["start"]
        own += ["shape"] if spec.kind == "random_resized_crop" else []
        own += ["flip"] if spec.hflip else []
        if spec.photometric is not None:
            own += ["jitter", *(f"op{k}" for k in range(4)), *(f"factor{k}" for k in range(4)), "choice", "blur"]
        names += [f"view{i}.{name}" for name in own]
    return names


def pipeline_inputs(
    views: Sequence[ViewSpec], encoded: Sequence[bytes], sizes_hw: NDArray[np.int32], params: Sequence[ViewParams]
) -> dict[str, Any]:
    """What `build_pipeline` reads, by input name: the bytes, and the parameters of each view as arrays of n rows."""
    inputs: dict[str, Any] = {"encoded": [np.frombuffer(data, np.uint8) for data in encoded]}
    origin = _shared_resize_inputs(views, sizes_hw, params, inputs)
    for i, (spec, p) in enumerate(zip(views, params)):
        inputs[f"view{i}.start"] = p.crop_yx - origin if spec.kind == "resize_crop" else p.crop_yx
        if spec.kind == "random_resized_crop":
            inputs[f"view{i}.shape"] = p.crop_hw
        if spec.hflip:
            inputs[f"view{i}.flip"] = p.flip.astype(np.int32)
        if spec.photometric is not None:
            inputs |= _photometric_inputs(f"view{i}", p, spec.photometric.blur_sigma[1])
    return inputs


def _shared_resize_inputs(
    views: Sequence[ViewSpec], sizes_hw: NDArray[np.int32], params: Sequence[ViewParams], inputs: dict[str, Any]
) -> NDArray[np.int32]:
    """Add the inputs of the resize that all "resize_crop" views share; its origin [n, 2] in the whole resized image.

    Only the smallest window that holds every view's crop is computed: the resize is the dearest operator, and a very long
    image never becomes a very long resized one.
    """
    shared = [p for spec, p in zip(views, params) if spec.kind == "resize_crop"]
    if not shared:
        return np.zeros((len(sizes_hw), 2), np.int32)
    resized = shared[0].resize_hw
    low = np.maximum(np.min([p.crop_yx for p in shared], axis=0), 0)
    high = np.minimum(np.max([p.crop_yx + p.crop_hw for p in shared], axis=0), resized)
    scale = sizes_hw / resized
    inputs["resize.size"] = (high - low).astype(np.float32)
    inputs["resize.start"] = (low * scale).astype(np.float32)
    inputs["resize.end"] = (high * scale).astype(np.float32)
    return low.astype(np.int32)


def _photometric_inputs(name: str, p: ViewParams, largest_sigma: float) -> dict[str, Any]:
    rows = np.arange(len(p.op_order))
    order = np.ascontiguousarray(p.op_order.T)
    inputs: dict[str, Any] = {f"{name}.jitter": p.jitter, f"{name}.choice": p.choice}
    for k in range(4):
        op = order[k]
        factor = p.factors[rows, op]
        inputs[f"{name}.op{k}"] = op
        inputs[f"{name}.factor{k}"] = np.where(op == HUE, hue_sextants(factor), factor).astype(np.float32)
    inputs[f"{name}.blur"] = blur_kernels(p.blur_sigma, largest_sigma)
    return inputs


def hue_sextants(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """PIL's hue shift in sixths of a turn: it adds trunc(255 * turns) to a hue that it truncated to 8 bits (half a step)."""
    steps = np.trunc(turns * 255.0)
    return np.where(steps == 0, 0.0, steps - 0.5) * (6.0 / 255.0)


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


@pipeline_def(enable_conditionals=True)
def _definition(
    views: tuple[ViewSpec, ...], image_size: int, source: Callable[[], tuple[Any, ...]], gpu: bool
) -> tuple[Node, ...]:
    names = _input_names(views)
    inputs = dict(zip(names, fn.external_source(source=source, num_outputs=len(names))))
    image = _decode(inputs["encoded"], gpu)
    resized = None
    if "resize.size" in inputs:
        roi = {"roi_start": inputs["resize.start"], "roi_end": inputs["resize.end"]}
        resized = _resize(image, inputs["resize.size"], **roi)
    outputs = []
    for i, spec in enumerate(views):
        own = {name.partition(".")[2]: node for name, node in inputs.items() if name.startswith(f"view{i}.")}
        outputs.append(_view(spec, image, resized, own, image_size, gpu))
    return tuple(outputs)


def _decode(encoded: Node, gpu: bool) -> Node:
    """Decode to RGB as PIL does: the same chroma upsampling, and EXIF orientation not applied."""
    return fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        adjust_orientation=False,
    )


def _view(spec: ViewSpec, image: Node, resized: Node, inputs: dict[str, Node], image_size: int, gpu: bool) -> Node:
    square = [image_size, image_size]
    if spec.kind == "resize_crop":
        x = fn.slice(resized, start=inputs["start"], shape=square, axes=[0, 1], out_of_bounds_policy="reflect_101")
    else:
        x = _resize(fn.slice(image, start=inputs["start"], shape=inputs["shape"], axes=[0, 1]), square)
    if spec.hflip:
        x = fn.flip(x, horizontal=inputs["flip"])
    if spec.photometric is not None:
        x = _photometric(x, inputs, spec.photometric.solarize_threshold, gpu)
    return x


def _resize(x: Node, size: Node, **roi: Node) -> Node:
    return fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=True, **roi)


def _blur(x: Node, kernel: Node, gpu: bool) -> Node:
    """Convolve with `kernel` [taps] down and across."""
    kernel = kernel.gpu() if gpu else kernel
    down = fn.filter(x, fn.reshape(kernel, shape=[-1, 1]), border="clamp")
    return fn.filter(down, fn.reshape(kernel, shape=[1, -1]), border="clamp")


def _photometric(x: Node, inputs: dict[str, Node], threshold: int, gpu: bool) -> Node:
    if inputs["jitter"]:
        for k in range(4):
            x = _jitter(x, inputs[f"op{k}"], inputs[f"factor{k}"], gpu)
    if inputs["choice"] == GRAY:
        x = _gray3(x)
    elif inputs["choice"] == SOLARIZE:
        table = [v if v < threshold else 255 - v for v in range(256)]
        x = fn.lookup_table(x, keys=list(range(256)), values=table, dtype=types.UINT8)
    elif inputs["choice"] == BLUR:
        x = _blur(x, inputs["blur"], gpu)
    return x


def _jitter(x: Node, op: Node, factor: Node, gpu: bool) -> Node:
    if op == BRIGHTNESS:
        x = fn.brightness_contrast(x, brightness=factor, brightness_shift=_TRUNCATE)
    elif op == CONTRAST:
        x = _contrast(x, factor, gpu)
    elif op == SATURATION:
        x = _saturation(x, factor)
    else:
        x = _hue(x, factor)
    return x


def _gray(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _gray3(x: Node) -> Node:
    return fn.color_space_conversion(_gray(x), image_type=types.GRAY, output_type=types.RGB)


def _contrast(x: Node, factor: Node, gpu: bool) -> Node:
    center = math.floor(fn.reductions.mean(_gray(x)) + 0.5)
    if gpu:  # an argument cannot come from the GPU, so there the mean enters through arithmetic
        return _blend(x, center, factor.gpu())
    return fn.brightness_contrast(x, contrast=factor, contrast_center=center, brightness_shift=_TRUNCATE)


def _blend(x: Node, center: Node, factor: Node) -> Node:
    return fn.cast(x * factor + (1.0 - factor) * center - 0.499, dtype=types.UINT8)


def _saturation(x: Node, factor: Node) -> Node:
    own = fn.brightness_contrast(x, brightness=factor, brightness_shift=_TRUNCATE16, dtype=types.INT16)
    gray = fn.brightness_contrast(_gray3(x), brightness=1.0 - factor, dtype=types.INT16)
    return fn.cast(own + gray, dtype=types.UINT8)


def _hue(x: Node, sextants: Node) -> Node:
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


def decode_one(data: bytes) -> NDArray[np.uint8]:
    """Decode one image on the CPU exactly as the pipeline does: uint8 [H, W, 3]; RuntimeError when it cannot be."""
    pipe = _decoding(np.frombuffer(data, np.uint8), batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    return np.array(pipe.run()[0].at(0))


@pipeline_def
def _decoding(data: NDArray[np.uint8]) -> Node:
    return _decode(fn.external_source(source=lambda: [data]), False)

"""The DALI pipeline: encoded bytes in, decoded once, one uint8 HWC tensor [S, S, 3] out for each view.

One definition runs on the CPU (device_id None) and on a GPU ("mixed" decoder). No operator draws anything: `pipeline_inputs`
turns ViewParams into the arrays that the graph reads. Samples that an operator does not touch skip it (conditionals).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.dali import Node, Pipeline, fn, pipeline_def
from lut_ds.data.operators import (
    Resizer,
    blur,
    blur_kernels,
    crop_reflect,
    decode,
    gray3,
    hue_sextants,
    jitter,
    make_resizer,
    resize,
    solarize,
)
from lut_ds.data.tuning import DALI_DEFAULTS, GpuDecoder
from lut_ds.data.views import BLUR, GRAY, HUE, SOLARIZE, ViewParams, ViewSpec


def build_pipeline(
    views: Sequence[ViewSpec],
    image_size: int,
    source: Callable[[], dict[str, Any]],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
    parallel_map: Callable[..., Iterable[Any]] = map,
    gpu_decoder: GpuDecoder = DALI_DEFAULTS,
) -> Pipeline:
    """The pipeline for `views` at side `image_size`: one [b, S, S, 3] uint8 a view for each `pipeline_inputs` of `source`.

    `source` is called ahead of the consumer, up to `prefetch` batches, and raises StopIteration at the end. `device_id` None
    runs everything on the CPU, its Python parts through `parallel_map`; otherwise decoding is shared with, and all else runs
    on, that GPU, and `gpu_decoder` says how its decoder works.
    """
    names = _input_names(views)

    def ordered() -> tuple[Any, ...]:
        inputs = source()
        return tuple(inputs[name] for name in names)

    return _definition(
        tuple(views),
        image_size,
        ordered,
        make_resizer(parallel_map) if device_id is None else None,
        gpu_decoder,
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )


def _input_names(views: Sequence[ViewSpec]) -> list[str]:
    names = ["encoded"]
    if any(spec.kind == "resize_crop" for spec in views):
        names.append("resize")  # one for all views of that kind
    for i, spec in enumerate(views):
        own = ["start"]
        own += ["shape", "resize"] if spec.kind == "random_resized_crop" else []
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
    for i, (spec, p) in enumerate(zip(views, params)):
        size = p.resize_hw.astype(np.float32)
        inputs[f"view{i}.start"] = p.crop_yx
        if spec.kind == "resize_crop":
            inputs["resize"] = size
        else:
            inputs |= {f"view{i}.resize": size, f"view{i}.shape": p.crop_hw}
        if spec.hflip:
            inputs[f"view{i}.flip"] = p.flip.astype(np.int32)
        if spec.photometric is not None:
            inputs |= _photometric_inputs(f"view{i}", p, spec.photometric.blur_sigma[1])
    return inputs


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


@pipeline_def(enable_conditionals=True)
def _definition(
    views: tuple[ViewSpec, ...],
    image_size: int,
    source: Callable[[], tuple[Any, ...]],
    resizer: Resizer | None,
    gpu_decoder: GpuDecoder,
) -> tuple[Node, ...]:
    """The graph; without a `resizer` it is the GPU's."""
    names = _input_names(views)
    inputs = dict(zip(names, fn.external_source(source=source, num_outputs=len(names))))
    image = decode(inputs["encoded"], resizer is None, gpu_decoder)
    resized = resize(image, inputs["resize"], resizer) if "resize" in inputs else None
    outputs = []
    for i, spec in enumerate(views):
        own = {name.partition(".")[2]: node for name, node in inputs.items() if name.startswith(f"view{i}.")}
        if spec.kind == "resize_crop":
            x = crop_reflect(resized, own["start"], [image_size, image_size])
        else:
            x = resize(fn.slice(image, start=own["start"], shape=own["shape"], axes=[0, 1]), own["resize"], resizer)
        if spec.hflip:
            x = fn.flip(x, horizontal=own["flip"])
        if spec.photometric is not None:
            x = _photometric(x, own, spec.photometric.solarize_threshold, resizer is None)
        outputs.append(x)
    return tuple(outputs)


def _photometric(x: Node, inputs: dict[str, Node], threshold: int, gpu: bool) -> Node:
    if inputs["jitter"]:
        for k in range(4):
            x = jitter(x, inputs[f"op{k}"], inputs[f"factor{k}"], gpu)
    if inputs["choice"] == GRAY:
        x = gray3(x)
    elif inputs["choice"] == SOLARIZE:
        x = solarize(x, threshold)
    elif inputs["choice"] == BLUR:
        x = blur(x, inputs["blur"], gpu)
    return x


def decode_one(data: bytes) -> NDArray[np.uint8]:
    """Decode one image on the CPU exactly as the pipeline does: uint8 [H, W, 3]; RuntimeError when it cannot be."""
    (found,) = decode_each([data])
    if isinstance(found, RuntimeError):
        raise found
    return found


def decode_each(encoded: Iterable[bytes], device_id: int | None = None) -> Iterator[NDArray[np.uint8] | RuntimeError]:
    """Decode images one by one, as the pipeline does on that device: uint8 [H, W, 3], or the error of one that cannot be."""
    arrays = ([np.frombuffer(data, np.uint8)] for data in encoded)
    pipe = _decoding(arrays, device_id is not None, num_threads=1, device_id=device_id)
    while True:
        try:
            (image,) = pipe.run()
            yield np.array(image.as_cpu().at(0))
        except RuntimeError as error:  # the dynamic executor loses this batch of one, and goes on
            yield error
        except StopIteration:
            return


@pipeline_def(batch_size=1, prefetch_queue_depth=1)
def _decoding(source: Iterator[list[NDArray[np.uint8]]], gpu: bool) -> Node:
    return decode(fn.external_source(source=source), gpu)

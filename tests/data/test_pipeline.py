"""The DALI graph: the same pixels as the PIL reference for any size and format, and every view on the GPU in GPU builds."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lut_ds.data.operators import _blend, jitter
from lut_ds.data.pipeline import build_pipeline, decode_one, pipeline_inputs
from lut_ds.data.validity import image_hw
from lut_ds.data.views import (
    CONTRAST,
    EVAL_VIEW,
    LUT_VIEW1,
    LUT_VIEW2,
    MAE_VIEW,
    ViewSpec,
    apply_reference,
    view_params,
)
from tests.data.images import difference, encode, photo, run_operator


def views_of(specs: list[ViewSpec], images: list[Image.Image], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pipeline, reference) for every view of every image."""
    sizes = np.array([[image.height, image.width] for image in images], np.int32)
    samples = np.arange(len(images))
    params = [view_params(spec, size, 5, 2, samples, i, sizes) for i, spec in enumerate(specs)]
    inputs = pipeline_inputs(specs, [encode(image, "PNG") for image in images], sizes, params)
    pipe = build_pipeline(specs, size, lambda: inputs, batch_size=len(images), threads=1, device_id=None, prefetch=1)
    outputs = pipe.run()
    return [
        (np.array(output.at(i)), apply_reference(p.row(i), spec, images[i]))
        for spec, p, output in zip(specs, params, outputs)
        for i in range(len(images))
    ]


ODD_SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (33, 40), (40, 33), (64, 64), (90, 121), (150, 61), (260, 255), (31, 500)]


@pytest.mark.parametrize(
    ("specs", "mean", "worst"), [([LUT_VIEW1], 0.3, 2), ([MAE_VIEW], 0.3, 2), ([LUT_VIEW2], 1.5, 60)]
)
def test_parity_with_the_reference_for_any_size(specs: list[ViewSpec], mean: float, worst: int) -> None:
    images = [photo(h, w, seed=h + w) for h, w in ODD_SIZES]
    for (h, w), (found, expected) in zip(ODD_SIZES, views_of(specs, images, 33)):
        error = difference(found, expected)
        assert error[0] <= mean, (h, w)
        assert error[1] <= worst, (h, w)


def test_two_views_of_one_decode() -> None:
    images = [photo(60 + i, 80, seed=i) for i in range(6)]
    pairs = views_of([LUT_VIEW1, LUT_VIEW2], images, 48)
    assert all(difference(found, expected)[0] <= 1.5 for found, expected in pairs)
    views1, views2 = [p[0] for p in pairs[:6]], [p[0] for p in pairs[6:]]
    assert all(difference(a, b)[0] > 1 for a, b in zip(views1, views2))


def formats() -> dict[str, bytes]:
    image = photo(37, 53)
    turned = Image.Exif()
    turned[0x112] = 6  # rotate by a quarter: must not be applied
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.arange(53, dtype=np.uint8) * 4, (37, 1))))
    return {
        "jpeg": encode(image),
        "progressive": encode(image, progressive=True),
        "jpeg gray": encode(image.convert("L")),
        "jpeg cmyk": encode(image.convert("CMYK")),
        "jpeg exif": encode(image, exif=turned),
        "jpeg 4:2:0": encode(image, subsampling=2),
        "png": encode(image, "PNG"),
        "png gray alpha": encode(alpha.convert("LA"), "PNG"),
        "png alpha": encode(alpha, "PNG"),
        "png palette": encode(image.convert("P"), "PNG", transparency=3),
        "png bits": encode(image.convert("1"), "PNG"),
        "png exif": encode(image, "PNG", exif=turned),
        "webp": encode(image, "WEBP"),
        "webp alpha": encode(alpha, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff gray": encode(image.convert("L"), "TIFF"),
    }


@pytest.mark.parametrize("name", formats())
def test_formats_decode_as_in_pillow(name: str) -> None:
    data = formats()[name]
    found = decode_one(data)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_hw(data, name) == found.shape[:2]


def test_sixteen_bits_and_turned_tiff() -> None:
    """Where Pillow differs on purpose: it cuts 16 bits off instead of scaling them, and turns TIFFs by their tag."""
    image = photo(37, 53)
    gray = np.asarray(image.convert("L"))
    deep = encode(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    assert difference(decode_one(deep), np.repeat(gray[..., None], 3, axis=2))[1] <= 1
    turned = Image.Exif()
    turned[0x112] = 6
    tiff = encode(image, "TIFF", exif=turned)
    assert image_hw(tiff, "tiff") == (37, 53)
    assert np.array_equal(decode_one(tiff), np.asarray(image))


def operator_devices(pipe: Any) -> dict[str, set[str]]:
    """Output devices of the graph's operators by their name."""
    devices: dict[str, set[str]] = {}
    for operator in pipe._ops:
        for output in operator.outputs:
            devices.setdefault(type(operator._op).__name__, set()).add(output.device)
    return devices


@pytest.mark.parametrize("specs", [[LUT_VIEW1, LUT_VIEW2], [MAE_VIEW], [EVAL_VIEW]])
def test_gpu_placement(specs: list[ViewSpec]) -> None:
    """The GPU's graph, traced without a GPU: bytes and parameters on the CPU, everything with pixels on the GPU."""
    pipe = build_pipeline(specs, 32, dict, batch_size=4, threads=1, device_id=0, prefetch=2)
    pipe._build_graph()
    assert [output.device for output in pipe._graph_outputs] == ["gpu"] * len(specs)
    decoders = [op for op in pipe._ops if type(op._op).__name__ == "Image"]
    assert [decoder._op.device for decoder in decoders] == ["mixed"]
    devices = operator_devices(pipe)
    on_cpu = {name for name, where in devices.items() if "cpu" in where}
    assert on_cpu <= {
        "ExternalSource",
        "Split",
        "_ArithmeticGenericOp",
    }  # parameters: split by branch, compared, 1 - factor
    assert devices["Resize"] == devices["Slice"] == {"gpu"}


def test_the_gpus_contrast_is_the_cpus() -> None:
    """The formulation for the GPU, whose mean cannot become an argument, run on the CPU."""
    image = np.asarray(photo(50, 70))
    for factor in (0.6, 0.93, 1.4):
        value = np.array(factor, np.float32)
        own = run_operator(lambda x, o, f: jitter(x, o, f, False), image, np.int32(CONTRAST), value)
        center = np.array(np.floor(np.asarray(Image.fromarray(image).convert("L")).mean() + 0.5), np.float32)
        assert difference(run_operator(_blend, image, center, value), own)[1] <= 1

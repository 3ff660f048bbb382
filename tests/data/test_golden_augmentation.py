"""Golden parity of the views with PIL: the DALI graph within its tolerances, the reference rendering exactly."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lut_ds.data.operators import (
    blur,
    blur_kernels,
    crop_reflect,
    gray3,
    hue_sextants,
    jitter,
    make_resizer,
    resize,
    solarize,
)
from lut_ds.data.pipeline import build_pipeline, pipeline_inputs
from lut_ds.data.views import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    EVAL_VIEW,
    GRAY,
    HUE,
    LUT_VIEW1,
    LUT_VIEW2,
    MAE_VIEW,
    NO_CHOICE,
    SATURATION,
    SOLARIZE,
    Photometric,
    ViewParams,
    ViewSpec,
    apply_reference,
    eval_params,
    resized_hw,
)
from tests.data.images import difference, run_operator
from tests.golden_data import GOLDEN_DIR, golden_json, load_golden

AUG = GOLDEN_DIR / "aug"
MANIFEST = golden_json("aug/manifest.json")
CONFIG: dict[str, Any] = MANIFEST["config"]
FILES: dict[str, dict[str, Any]] = {entry["file"].removesuffix(".png"): entry for entry in MANIFEST["files"]}
OPERATORS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
CHOICES = {"gray": GRAY, "solarize": SOLARIZE, "blur": BLUR}
VIEW1 = replace(LUT_VIEW1, pad=CONFIG["pad"])
VIEW2 = replace(LUT_VIEW2, pad=CONFIG["pad"], photometric=Photometric(blur_sigma=(0.1, max(2.0, *CONFIG["radii"]))))


def names(prefix: str) -> list[str]:
    found = [name for name in FILES if name.startswith(prefix)]
    assert found, f"no golden named {prefix}*"
    return found


def png(name: str) -> np.ndarray:
    return np.asarray(Image.open(AUG / f"{name}.png").convert("RGB"))


def source_of(name: str) -> np.ndarray:
    return png(FILES[name]["params"]["of"])


def adjust(image: np.ndarray, operator: str, factor: float) -> np.ndarray:
    op = OPERATORS[operator]
    value = hue_sextants(np.array(factor)) if op == HUE else np.array(factor)
    return run_operator(lambda x, o, f: jitter(x, o, f, False), image, np.int32(op), value.astype(np.float32))


def view_row(
    resize_hw: tuple[int, int],
    crop_yx: tuple[int, int],
    crop_hw: tuple[int, int],
    *,
    flip: bool = False,
    choice: int = -1,
) -> ViewParams:
    """Parameters of one sample with the golden jitter (applied where `choice` is set) and radius."""
    order = [OPERATORS[name] for name, _ in CONFIG["jitter"]]
    factors = np.zeros(4)
    factors[order] = [factor for _, factor in CONFIG["jitter"]]
    radius = FILES["view2_jitter_blur"]["params"]["radius"]
    row = (resize_hw, crop_yx, crop_hw, flip, choice != NO_CHOICE, order, factors, choice, radius)
    kinds = (np.int32, np.int32, np.int32, np.bool_, np.bool_, np.int32, np.float64, np.int32, np.float64)
    return ViewParams(*(np.array([value], kind) for value, kind in zip(row, kinds)))


def lut_row(*, flip: bool = False, choice: int = NO_CHOICE) -> ViewParams:
    crop = FILES["crop"]["params"]
    pad = FILES[crop["of"]]["params"]["pad"]
    height, width = png("resize").shape[:2]
    yx = (crop["top"] - pad, crop["left"] - pad)
    return view_row((height, width), yx, (crop["size"], crop["size"]), flip=flip, choice=choice)


def render(spec: ViewSpec, row: ViewParams, size: int) -> np.ndarray:
    """One view of source.png through the whole pipeline."""
    sizes = np.array([png("source").shape[:2]], np.int32)
    inputs = pipeline_inputs([spec], [(AUG / "source.png").read_bytes()], sizes, [row])
    pipe = build_pipeline([spec], size, lambda: inputs, batch_size=1, threads=1, device_id=None, prefetch=1)
    return np.array(pipe.run()[0].at(0))


CROPS = {"crop": {}, "crop_hflip": {"flip": True}}
SECOND_VIEWS = {f"view2_jitter_{name}": choice for name, choice in CHOICES.items()}


def test_golden_resize() -> None:
    expected = png("resize")
    size = resized_hw(np.array([source_of("resize").shape[:2]], np.int32), FILES["resize"]["params"]["size"])[0]
    assert tuple(size) == expected.shape[:2]
    resizer = make_resizer(map)
    found = run_operator(lambda x, s: resize(x, s, resizer), source_of("resize"), size.astype(np.float32))
    assert difference(found, expected)[1] <= 1


@pytest.mark.parametrize("name", names("pad_reflect"))
def test_golden_reflect_pad(name: str) -> None:
    image, pad = source_of(name), FILES[name]["params"]["pad"]
    shape = np.array(image.shape[:2]) + 2 * pad
    found = run_operator(crop_reflect, image, np.array([-pad, -pad], np.int32), shape.astype(np.int32))
    assert np.array_equal(found, png(name))


@pytest.mark.parametrize("name", CROPS)
def test_golden_crop_and_flip(name: str) -> None:
    found = render(VIEW1, lut_row(**CROPS[name]), FILES["crop"]["params"]["size"])
    assert difference(found, png(name))[1] <= 1


def test_golden_gray() -> None:
    assert difference(run_operator(gray3, source_of("grayscale")), png("grayscale"))[1] <= 1


def test_golden_solarize() -> None:
    threshold = FILES["solarize"]["params"]["threshold"]
    found = run_operator(lambda x: solarize(x, threshold), source_of("solarize"))
    assert np.array_equal(found, png("solarize"))


@pytest.mark.parametrize("name", names("only_"))
def test_golden_single_jitter_operator(name: str) -> None:
    found = adjust(source_of(name), name.removeprefix("only_"), FILES[name]["params"]["factor"])
    assert difference(found, png(name))[0] <= 1.0


def test_golden_whole_jitter() -> None:
    image = png("source")
    for name in names("jitter_"):
        image = adjust(image, name.split("_")[2], FILES[name]["params"]["factor"])
        assert difference(image, png(name))[0] <= 1.5


@pytest.mark.parametrize("name", names("blur_"))
def test_golden_blur(name: str) -> None:
    radius = FILES[name]["params"]["radius"]
    largest = max(*CONFIG["radii"], 2.0)  # as in the pipeline, every kernel has the taps of the largest
    kernel = blur_kernels(np.array([radius]), largest)[0]
    found = run_operator(lambda x, k: blur(x, k, False), source_of(name), kernel)
    assert difference(found, png(name))[0] <= 1.0


@pytest.mark.parametrize("name", SECOND_VIEWS)
def test_golden_whole_second_view(name: str) -> None:
    found = render(VIEW2, lut_row(choice=SECOND_VIEWS[name]), FILES["crop"]["params"]["size"])
    assert difference(found, png(name))[0] <= 1.5


def mae_row() -> tuple[ViewParams, int]:
    p = FILES["mae_resized_crop"]["params"]
    return view_row((p["size"], p["size"]), (p["top"], p["left"]), (p["h"], p["w"])), p["size"]


def test_golden_mae_view() -> None:
    row, size = mae_row()
    assert difference(render(MAE_VIEW, row, size), png("mae_resized_crop"))[1] <= 1


def test_golden_eval_view() -> None:
    size = FILES["eval_resize_centercrop"]["params"]["size"]
    row = eval_params(size, np.array([png("source").shape[:2]], np.int32))
    assert difference(render(EVAL_VIEW, row, size), png("eval_resize_centercrop"))[1] <= 1


def test_golden_reference_is_exact() -> None:
    """The PIL rendering of the same parameters is the published one, to the bit."""
    image = Image.open(AUG / "source.png")
    mae, _ = mae_row()
    size = FILES["eval_resize_centercrop"]["params"]["size"]
    evaluation = eval_params(size, np.array([[image.height, image.width]], np.int32))
    rows = {name: (VIEW1, lut_row(**options)) for name, options in CROPS.items()}
    rows |= {name: (VIEW2, lut_row(choice=choice)) for name, choice in SECOND_VIEWS.items()}
    rows |= {"mae_resized_crop": (MAE_VIEW, mae), "eval_resize_centercrop": (EVAL_VIEW, evaluation)}
    for name, (spec, params) in rows.items():
        assert np.array_equal(apply_reference(params.row(0), spec, image), png(name)), name


def test_golden_normalised_views() -> None:
    """The views are what the published code hands to the model, once normalised: within one grey level for view 1."""
    stored = load_golden(AUG / "normalized.safetensors")
    mean, std = np.array(stored.meta["mean"]), np.array(stored.meta["std"])
    view1 = render(VIEW1, lut_row(flip=True), FILES["crop"]["params"]["size"])
    error = np.abs((view1 / 255 - mean) / std - stored["view1"].numpy().transpose(1, 2, 0))
    assert error.max() <= 1.001 / 255 / std.min()

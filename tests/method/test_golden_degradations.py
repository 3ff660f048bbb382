"""Degradations, targets and losses of Beyond Masking against the stored numbers (golden README, section 7).

The published blur has no counterpart here: its output, of seven channels and another size, fits no encoder. `*_intent` in that
file is the reading that `blurred` follows.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lut_ds.method.degradations import DEGRADATIONS
from lut_ds.method.degradations.blurred import Blurred, convolve_each
from lut_ds.method.degradations.decolorized import Decolorized
from lut_ds.method.degradations.distorted import Distorted, fish_eye
from lut_ds.method.degradations.zoomed_in import ZoomedIn
from lut_ds.method.degradations.zoomed_out import ZoomedOut, mirror_pad, mirror_sources
from lut_ds.method.pixels import area_matrix, area_resize, normalised, patch_targets, redrawn, to_image, to_patches
from lut_ds.method.posembed import position_table
from tests.golden_data import GOLDEN_DIR, Golden, golden_files, load_golden

LOSS = {"atol": 5e-6, "rtol": 0}
PIXEL = {"atol": 2e-5, "rtol": 0}
NO_DRAWS = torch.empty(0)


def bm(name: str) -> Golden:
    """One file of the folder."""
    return load_golden(GOLDEN_DIR / "bm" / f"{name}.safetensors")


def only(golden: Golden, pattern: str) -> tuple[Tensor, tuple[int, ...]]:
    """The one tensor whose name matches, and the numbers in its name that the groups catch."""
    ((name, found),) = [(n, m) for n in golden.tensors if (m := re.fullmatch(pattern, n))]
    return golden[name], tuple(int(number) for number in found.groups())


def view_of(pixels: Tensor) -> Tensor:
    """Normalised view from stored uint8 [N, 3, V, V], through the uint8 HWC that the loader gives."""
    return normalised(pixels.permute(0, 2, 3, 1).contiguous())


def prediction(golden: Golden) -> Tensor:
    """The stored prediction, asking for a gradient."""
    return (golden["in.pred_i8"].float() * golden["param.pred_scale"]).requires_grad_()


def patch_of(pred: Tensor) -> int:
    """P of predictions [N, L, P*P*3]."""
    return round((pred.shape[2] / 3) ** 0.5)


@pytest.mark.parametrize("path", golden_files("bm/distorted_[0-9].safetensors"), ids=lambda path: path.stem)
def test_golden_distorted_grid_and_image(path: Path) -> None:
    golden = load_golden(path)
    image, centre, magnitude = golden["in.image"], golden["param.center_xy"].float(), golden["param.magnitude"].float()
    height, width = image.shape[2:]
    grid = fish_eye(centre[None], magnitude[None], height, width)
    torch.testing.assert_close(grid, golden["out.grid_xy"], atol=1e-6, rtol=0)
    law = Distorted()
    strength = (magnitude - law.magnitude_low) / (law.magnitude_high - law.magnitude_low)
    draws = torch.cat([(centre + 1) / 2, strength[None]]).expand(len(image), 3)
    found = law.degrade(image, draws, height)
    torch.testing.assert_close(found, golden["out.image"], atol=5e-5, rtol=0)


def test_golden_distorted_target_and_loss() -> None:
    golden = bm("distorted_target")
    view, pred, patch = view_of(golden["in.image_u8"]), golden["in.pred"].clone(), golden.meta["patch_size"]
    torch.testing.assert_close(patch_targets(view, patch, True), golden["out.target"], **PIXEL)
    torch.testing.assert_close(patch_targets(view, patch, False), golden["out.target_unnormalized"], **PIXEL)
    counted = torch.zeros(pred.shape[:2])  # where nothing is masked, or not, all patches count
    for norm_pix, name in ((True, "out.loss"), (False, "out.loss_unnormalized")):
        pred.grad = None
        loss = Distorted().loss(pred.requires_grad_(), view, counted, NO_DRAWS, patch, norm_pix)
        torch.testing.assert_close(loss.detach(), golden[name], **LOSS)
        if norm_pix:
            loss.backward()
            torch.testing.assert_close(pred.grad, golden["grad.pred"], atol=1e-7, rtol=1e-4)


def test_golden_distorted_large_grid() -> None:
    golden = bm("distorted_target")
    rows, (side,) = only(golden, r"out\.grid(\d+)_rows")
    centre, magnitude = golden[f"param.center_xy_{side}"].float(), golden[f"param.magnitude_{side}"].float()
    grid = fish_eye(centre[None], magnitude[None], side, side)[0]
    total = golden[f"out.grid{side}_sum"]
    torch.testing.assert_close(grid.double().sum((0, 1)), total, atol=1e-6 * side * side, rtol=0)
    distance = (grid[:, None] - rows).abs().flatten(2).amax(2)  # which rows were kept is not stored
    assert distance.amin(0).max() < 1e-6


def test_golden_decolorized() -> None:
    golden = bm("decolorized")
    view, patch = view_of(golden["in.image_u8"]), golden.meta["patch_size"]
    low, high = golden.meta["weight_range"]
    law = Decolorized(weight=high)
    assert (low, law) == (0.0, Decolorized())
    draws = (golden["param.weights_rgb"] / high).float().expand(len(view), 3)
    seen = law.degrade(view, draws, view.shape[2])
    for channel in seen.split(1, dim=1):
        torch.testing.assert_close(channel, golden["out.encoder_input"], **PIXEL)
    torch.testing.assert_close(patch_targets(view, patch, True), golden["out.target"], **PIXEL)
    pred = golden["in.pred"].clone().requires_grad_()
    loss = law.loss(pred, view, torch.zeros(pred.shape[:2]), draws, patch, True)
    torch.testing.assert_close(loss.detach(), golden["out.loss"], **LOSS)
    loss.backward()
    torch.testing.assert_close(pred.grad, golden["grad.pred"], atol=1e-7, rtol=1e-4)


def test_golden_blurred_intent() -> None:
    golden = bm("blurred")
    image, kernels = golden["in.image"], only(golden, r"param\.weight_\d+x\d+_intent")[0][:, 0]
    expected = only(golden, r"out\.\d+x\d+_intent")[0]
    torch.testing.assert_close(convolve_each(image, kernels.expand(len(image), -1, -1, -1)), expected, **PIXEL)
    law = Blurred()
    draws = torch.special.ndtr((kernels.double() - 1 / kernels[0].numel()) / law.spread).float()
    found = law.degrade(image, draws.flatten().expand(len(image), -1), image.shape[2])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # a draw has 24 bits, which costs most in the tails


def test_golden_zoomed_in() -> None:
    golden = bm("zoomed_in")
    pixels, (full,) = only(golden, r"in\.image(\d+)_u8")
    view, pred, hidden = view_of(pixels), prediction(golden), golden["in.mask"]
    patch = patch_of(pred)
    side = round(hidden.shape[1] ** 0.5) * patch
    margin = (full - side) // 2
    law = ZoomedIn(margin=margin / side)
    assert law.view_side(side) == full
    seen = law.degrade(view, NO_DRAWS, side)
    assert torch.equal(seen, view[:, :, margin : margin + side, margin : margin + side])

    centre, edge = law.parts(pred, view, hidden, patch, True)
    for part, name in ((centre, "center"), (edge, "edge")):
        torch.testing.assert_close(part.detach(), golden[f"out.loss_{name}"], **LOSS)
        (gradient,) = torch.autograd.grad(part, pred, retain_graph=True)
        torch.testing.assert_close(gradient[0], golden[f"grad.pred_{name}_sample0"], atol=1e-8, rtol=1e-4)
    total = law.loss(pred, view, hidden, NO_DRAWS, patch, True)
    torch.testing.assert_close(total.detach(), golden["out.total"], **LOSS)

    drawn = area_resize(to_image(pred.detach(), patch), full)
    sampled, (_, step) = only(golden, r"out\.pred(\d+)_every(\d+)px")
    torch.testing.assert_close(drawn[:, :, ::step, ::step], sampled, **PIXEL)
    whole = redrawn(view, side, patch, True)
    sampled, (_, step) = only(golden, r"out\.target_overall(\d+)_every(\d+)px")
    torch.testing.assert_close(whole[:, :, ::step, ::step], sampled, atol=1e-4, rtol=1e-4)
    line, (_, row) = only(golden, r"out\.target_overall(\d+)_row(\d+)_sample0")
    torch.testing.assert_close(whole[0, :, row], line, atol=1e-4, rtol=1e-4)


def test_golden_zoomed_out() -> None:
    golden = bm("zoomed_out")
    pixels, (small,) = only(golden, r"in\.image(\d+)_u8")
    view, pred, hidden = view_of(pixels), prediction(golden), golden["in.mask"]
    patch = patch_of(pred)
    side = round(hidden.shape[1] ** 0.5) * patch
    law = ZoomedOut(view=small / side)
    assert law.view_side(side) == small
    left_top = golden["param.left_top"]
    draws = ((left_top + 0.5) / (side - small)).float().expand(len(view), 2)

    seen = law.degrade(view, draws, side)
    sampled, (step,) = only(golden, r"out\.encoder_input_sample0_every(\d+)px")
    torch.testing.assert_close(seen[0, :, ::step, ::step], sampled, **PIXEL)

    loss = law.loss(pred, view, hidden, draws, patch, True)
    torch.testing.assert_close(loss.detach(), golden["out.loss"], **LOSS)
    loss.backward()
    torch.testing.assert_close(pred.grad[0], golden["grad.pred_sample0"], atol=1e-8, rtol=1e-4)

    left, top = (offset.expand(len(view)) for offset in left_top)
    sources = (mirror_sources(top, small, side), mirror_sources(left, small, side))
    target = to_patches(mirror_pad(redrawn(view, side, patch, True), *sources), patch)
    torch.testing.assert_close(target[0], golden["out.target_patches_sample0"], atol=1e-4, rtol=1e-4)
    drawn = mirror_pad(area_resize(to_image(pred.detach(), patch), small), *sources)
    sampled, (step,) = only(golden, r"out\.pred_patches_sample1_every(\d+)")
    torch.testing.assert_close(to_patches(drawn, patch)[1, ::step], sampled, **PIXEL)


def test_golden_zoomed_out_maps() -> None:
    golden = bm("zoomed_out")
    pixels, _ = only(golden, r"in\.image(\d+)_u8")
    maps = {name: m for name in golden.tensors if (m := re.fullmatch(r"map\.left(\d+)_top(\d+)\.(rows|cols)", name))}
    assert maps
    for name, found in maps.items():
        offset = torch.tensor([int(found[2] if found[3] == "rows" else found[1])])
        expected = golden[name]
        assert torch.equal(mirror_sources(offset, pixels.shape[2], len(expected))[0], expected)


def test_golden_area_resize() -> None:
    golden = bm("area_resize")
    cases = {m[1]: int(m[2]) for name in golden.tensors if (m := re.fullmatch(r"(area\.\d+to(\d+))\.in", name))}
    assert cases
    for case, side in cases.items():
        image, expected = golden[f"{case}.in"], golden[f"{case}.out"]
        torch.testing.assert_close(area_resize(image, side), expected, atol=1e-6, rtol=0)
        with_gradient = area_resize(image.clone().requires_grad_(), side)  # the other of its two ways
        torch.testing.assert_close(with_gradient.detach(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(area_matrix(image.shape[2], side, image).sum(1), torch.ones(side))


def test_golden_sinusoid_positions() -> None:
    golden = bm("sinusoid_1d")
    assert golden.tensors
    for name, expected in golden.tensors.items():
        patches, width = (int(number) for number in name.removeprefix("pos.").split("x"))
        table = position_table(
            "sinusoid_1d", width, math.isqrt(patches - 1) + 1
        )  # of the smallest grid that has as many
        assert not table[0, 0].any()
        # The reference takes sines of float64 angles, too: only the last step is fp32.
        torch.testing.assert_close(table[0, 1 : 1 + patches], expected, atol=1e-6, rtol=0)


def test_golden_degradations_are_all_covered() -> None:
    covered = {"distorted", "decolorized", "blurred", "zoomed_in", "zoomed_out"}
    assert covered == set(DEGRADATIONS)

"""Every degradation: shapes, ranges, gradients, where the loss counts, and training with masks and with LUT's teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lut_ds.config import load_recipe, parse_recipe
from lut_ds.engine.build import build_encoder, build_student
from lut_ds.engine.reading import draws_per_sample
from lut_ds.errors import UserError
from lut_ds.method.degradations import DEGRADATIONS, Degradation, make_degradation, register
from lut_ds.method.degradations.zoomed_out import ZoomedOut, mirror_pad, mirror_sources
from lut_ds.method.lut import LUT, MAE
from lut_ds.method.pixels import (
    area_resize,
    normalise_patches,
    normalised,
    patch_targets,
    redrawn,
    to_image,
    to_patches,
    unit_range,
)
from tests.engine.test_step import WAITS
from tests.method.builders import decoder_from, encoder_from, head_from, lut_from, mae_from, small, teacher_from

NAMES = sorted(DEGRADATIONS)
LARGEST = 1 - 2.0**-24  # what the generator's largest draw is
SIZES = st.sampled_from([(24, 8), (28, 7), (32, 8), (48, 16), (30, 5)])


def made(name: str, **parameters: Any) -> Degradation:
    """A degradation of a name."""
    degradation = make_degradation(name, parameters)
    assert degradation is not None
    return degradation


def inputs(degradation: Degradation, side: int, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 views as the loader gives them, and draws."""
    generator = torch.Generator().manual_seed(seed)
    full = degradation.view_side(side)
    views = torch.randint(0, 256, (batch, full, full, 3), dtype=torch.uint8, generator=generator)
    return views, torch.rand((batch, degradation.draws), generator=generator)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=8)
@given(sizes=SIZES, batch=st.integers(1, 3), seed=st.integers(0, 2**31), extreme=st.sampled_from([None, 0.0, LARGEST]))
def test_the_encoder_sees_an_image_of_its_own_side(
    name: str, sizes: tuple[int, int], batch: int, seed: int, extreme: float | None
) -> None:
    side, _ = sizes
    degradation = made(name)
    pixels, draws = inputs(degradation, side, batch, seed)
    if extreme is not None:
        draws = torch.full_like(draws, extreme)
    view = normalised(pixels)
    seen = degradation.degrade(view, draws, side)
    assert (seen.shape, seen.dtype) == ((batch, 3, side, side), torch.float32)
    assert seen.isfinite().all()
    if name in ("zoomed_in", "zoomed_out", "distorted"):  # nothing new: colours of the view, means of them, or 0
        assert seen.amin() >= min(view.amin(), 0)
        assert seen.amax() <= max(view.amax(), 0)
    alone = [degradation.degrade(view[i : i + 1], draws[i : i + 1], side) for i in range(batch)]
    torch.testing.assert_close(torch.cat(alone), seen, atol=1e-5, rtol=1e-5)
    assert torch.equal(degradation.degrade(view, draws, side), seen)


@pytest.mark.parametrize("name", [name for name in NAMES if DEGRADATIONS[name].draws])
def test_draws_decide_what_is_seen_sample_by_sample(name: str) -> None:
    degradation = made(name)
    pixels, draws = inputs(degradation, 32, 2)
    view = normalised(pixels)
    other = draws.clone()
    other[1] = torch.rand(draws.shape[1], generator=torch.Generator().manual_seed(7))
    before, after = degradation.degrade(view, draws, 32), degradation.degrade(view, other, 32)
    torch.testing.assert_close(before[0], after[0], atol=1e-6, rtol=1e-6)
    assert (before[1] - after[1]).abs().amax() > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_pix", [True, False])
@settings(deadline=None, max_examples=5)
@given(sizes=SIZES, seed=st.integers(0, 2**31))
def test_the_gradient_is_that_of_the_loss(name: str, norm_pix: bool, sizes: tuple[int, int], seed: int) -> None:
    """The loss is quadratic in the prediction: its central difference along any direction is exact."""
    side, patch = sizes
    degradation = made(name)
    pixels, draws = inputs(degradation, side, 2, seed)
    view, patches = normalised(pixels), (side // patch) ** 2
    counted = (torch.rand(2, patches) < 0.75).float()
    counted[0, 0] = 1
    pred = torch.randn(2, patches, patch**2 * 3, requires_grad=True)
    loss = degradation.loss(pred, view, counted, draws, patch, norm_pix)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss > 0
    loss.backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    step = torch.randn_like(pred)
    with torch.no_grad():
        ahead, behind = (degradation.loss(p, view, counted, draws, patch, norm_pix) for p in (pred + step, pred - step))
    torch.testing.assert_close((ahead - behind) / 2, (pred.grad * step).sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_target_is_the_clean_view(name: str, norm_pix: bool) -> None:
    """Whoever draws the clean view, at the encoder's side, has nothing to improve (zoomed-in: at the edges)."""
    degradation = made(name, **({"w_centre": 0.0} if name == "zoomed_in" else {}))
    pixels, draws = inputs(degradation, 32, 3)
    view = normalised(pixels)
    perfect = patch_targets(view if view.shape[2] == 32 else area_resize(view, 32), 8, norm_pix)
    counted = torch.ones(3, 16)
    assert degradation.loss(perfect, view, counted, draws, 8, norm_pix) < 1e-8
    assert degradation.loss(perfect + 1, view, counted, draws, 8, norm_pix) > 0.1


@pytest.mark.parametrize("name", ["distorted", "blurred", "decolorized"])
def test_the_loss_counts_everywhere_or_at_hidden_patches(name: str) -> None:
    pixels, draws = inputs(made(name), 32, 2)
    counted = torch.zeros(2, 16)
    counted[0, 3] = counted[1, 5] = 1
    for loss_on in ("all", "hidden"):
        pred = torch.randn(2, 16, 192, requires_grad=True)
        loss = made(name, loss_on=loss_on).loss(pred, normalised(pixels), counted, draws, 8, True)
        loss.backward()
        touched = pred.grad.abs().amax(2) > 0
        assert torch.equal(touched, counted.bool() if loss_on == "hidden" else torch.ones(2, 16, dtype=torch.bool))
        error = (pred - patch_targets(normalised(pixels), 8, True)).square().mean(2)
        expected = error.mean() if loss_on == "all" else error[counted.bool()].mean()
        torch.testing.assert_close(loss, expected)


def test_zoomed_in_counts_the_edge_whatever_is_hidden() -> None:
    degradation = made("zoomed_in")
    pixels, draws = inputs(degradation, 28, 1)
    counted = torch.zeros(1, 16)
    counted[0, 5] = 1  # row 1, column 1
    pred = torch.randn(1, 16, 147, requires_grad=True)
    degradation.loss(pred, normalised(pixels), counted, draws, 7, True).backward()
    touched = (pred.grad.abs().amax(2) > 0).view(4, 4)
    border = torch.ones(4, 4, dtype=torch.bool)
    border[1:3, 1:3] = False
    border[1, 1] = True  # the hidden one
    assert torch.equal(touched, border | touched)
    assert not touched[2, 2]
    whole = made("zoomed_in", loss_on="all").loss(pred, normalised(pixels), counted, draws, 7, True)
    all_counted = degradation.loss(pred, normalised(pixels), torch.ones(1, 16), draws, 7, True)
    torch.testing.assert_close(whole, all_counted)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), sizes=SIZES, ratio=st.floats(0.1, 1.0))
def test_zoomed_out_equals_the_loss_on_padded_images(seed: int, sizes: tuple[int, int], ratio: float) -> None:
    side, patch = sizes
    degradation = ZoomedOut()
    pixels, draws = inputs(degradation, side, 2, seed)
    view, small = normalised(pixels), pixels.shape[1]
    patches = (side // patch) ** 2
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand((2, patches), generator=generator) < ratio).float()
    hidden[0, 0] = 1
    pred = torch.randn((2, patches, 3 * patch**2), generator=generator)
    left, top = (draws * (side - small)).floor().long().unbind(1)
    rows, columns = mirror_sources(top, small, side), mirror_sources(left, small, side)
    drawn = mirror_pad(area_resize(to_image(pred, patch), small), rows, columns)
    target = mirror_pad(redrawn(view, side, patch, True), rows, columns)
    error = (to_patches(drawn, patch) - to_patches(target, patch)).square().mean(2)
    expected = (error * hidden).sum() / hidden.sum()
    torch.testing.assert_close(degradation.loss(pred, view, hidden, draws, patch, True), expected, atol=1e-5, rtol=1e-5)
    padded = degradation.degrade(view, draws, side)
    for i in range(2):  # where the view lies in it
        y, x = int(top[i]), int(left[i])
        assert torch.equal(padded[i, :, y : y + small, x : x + small], view[i])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), sizes=SIZES, batch=st.integers(1, 3))
def test_patches_and_pixels(seed: int, sizes: tuple[int, int], batch: int) -> None:
    side, patch = sizes
    pixels = torch.randint(
        0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    view = normalised(pixels)
    assert torch.equal(to_image(to_patches(view, patch), patch), view)
    torch.testing.assert_close(unit_range(view), pixels.permute(0, 3, 1, 2) / 255, atol=1e-6, rtol=0)
    rows = normalise_patches(view, patch).unflatten(2, (-1, 3))
    torch.testing.assert_close(rows.mean(2), torch.zeros_like(rows.mean(2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(2), torch.ones_like(rows.mean(2)), atol=1e-3, rtol=0)


def model(name: str, method: str, mask_ratio: float) -> MAE:
    """A small MAE or LUT of degraded views."""
    config = small(head_norm_layer="LN")
    parts = (encoder_from(config), decoder_from(config))
    options = {"mask_ratio": mask_ratio, "degradation": made(name)}
    if method == "mae":
        return MAE(*parts, **options)
    return LUT(*parts, head_from(config, "depth_head"), head_from(config, "depth_pred"), **options)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("method", ["mae", "lut"])
@pytest.mark.parametrize("name", NAMES)
def test_every_combination_trains(name: str, method: str, mask_ratio: float) -> None:
    student = model(name, method, mask_ratio)
    teacher = teacher_from(small(head_norm_layer="LN")) if method == "lut" else None
    assert student.degradation is not None
    views = [inputs(student.degradation, 32, 4, seed)[0] for seed in range(student.views)]
    draws = torch.rand(4, student.views * student.degradation.draws)
    noise = torch.rand(4, 16)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        out = student(views, noise, teacher(views) if teacher is not None else None, draws)
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.98 * losses[0]
    latents = []
    student.encoder.register_forward_hook(lambda _m, _i, out: latents.append(out))
    student(views, noise, teacher(views) if teacher is not None else None, draws)
    assert latents[0].shape[:2] == (4 * student.views, 1 + (4 if mask_ratio else 16))


@pytest.mark.parametrize("name", NAMES)
def test_the_student_sees_degraded_views_and_the_teacher_clean_ones(name: str) -> None:
    student, teacher = model(name, "lut", 0.75), teacher_from(small(head_norm_layer="LN"))
    assert student.degradation is not None
    views = [inputs(student.degradation, 32, 2, seed)[0] for seed in (0, 1)]
    draws = torch.rand(2, 2 * student.degradation.draws)
    seen = student.degrade(views, draws)
    count = student.degradation.draws
    for i, view in enumerate(views):
        own = draws[:, i * count : (i + 1) * count]
        assert torch.equal(seen[i], student.degradation.degrade(normalised(view), own, 32))
    clean = [view if view.shape[1] == 32 else area_resize(normalised(view), 32) for view in views]
    assert all(torch.equal(a, b) for a, b in zip(teacher(views), teacher(clean), strict=True))


class Calls(TorchDispatchMode):
    """The names of the operators that run inside it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_one_piece_and_nothing_is_read_back(name: str) -> None:
    """As many operators for one image as for seven, and none after which the host would wait for a GPU."""
    degradation, runs = made(name), []
    for batch in (1, 7):
        pixels, draws = inputs(degradation, 32, batch)
        view, pred = normalised(pixels), torch.randn(batch, 16, 192, requires_grad=True)
        with Calls() as calls:
            degradation.degrade(view, draws, 32)
            degradation.loss(pred, view, torch.ones(batch, 16), draws, 8, True).backward()
        runs.append(calls.names)
    assert runs[0] == runs[1]
    assert len(runs[0]) > 10
    assert not WAITS & set(runs[0])


def test_draws_that_are_missing_are_an_error() -> None:
    student = model("distorted", "mae", 0.75)
    pixels, _ = inputs(made("distorted"), 32, 2)
    for draws in (None, torch.rand(2, 2), torch.rand(1, 3)):
        with pytest.raises(ValueError, match=r"draws: expected \[2, 3\]"):
            student([pixels], torch.rand(2, 16), None, draws)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from([0.5, 0.75]))
def test_lut_without_its_second_loss_is_mae(seed: int, ratio: float) -> None:
    config = small(seed=seed, w_bc=0.0, mask_ratio=ratio)
    lut, mae, teacher = lut_from(config), mae_from(config), teacher_from(config)
    mae.load_state_dict({k: v for k, v in lut.state_dict().items() if k in mae.state_dict()})
    views, noise = [torch.randn(4, 3, 32, 32) for _ in range(2)], torch.rand(4, 16)
    found, expected = lut(views, noise, teacher(views)), mae(views[:1], noise)
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-6, rtol=1e-6)
    assert found["bc"] > 0
    for out in (found, expected):
        out["loss"].backward()
    ours = dict(lut.named_parameters())
    for name, parameter in mae.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["none", "zoomed_in", "distorted"])
def test_lut_without_its_second_loss_trains_as_mae(name: str) -> None:
    """Ten steps of AdamW apart: one extra gradient, or draws of the wrong view, would move the losses by far more."""
    config = small(seed=1, w_bc=0.0, head_norm_layer="LN")
    lut, mae, teacher = lut_from(config), mae_from(config), teacher_from(config)
    mae.load_state_dict({k: v for k, v in lut.state_dict().items() if k in mae.state_dict()})
    lut.degradation = mae.degradation = degradation = make_degradation(name)
    side, count = (degradation.view_side(32), degradation.draws) if degradation is not None else (32, 0)
    optimizers = [torch.optim.AdamW(model.parameters(), 3e-3, eps=1e-4) for model in (lut, mae)]
    losses: list[list[float]] = [[], []]
    for _ in range(10):
        views = [torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8) for _ in range(2)]
        noise, draws = torch.rand(4, 16), torch.rand(4, 2 * count)
        found = [lut(views, noise, teacher(views), draws), mae(views[:1], noise, None, draws[:, :count])]
        for out, optimizer, curve in zip(found, optimizers, losses, strict=True):
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            curve.append(out["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][9] / losses[0][0] - 1) > 1e-2


EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'solarized.py'}:Solarized"


@pytest.mark.parametrize("method, ratio", [("mae", 0.0), ("mae", 0.75), ("lut", 0.0), ("lut", 0.75)])
def test_a_degradation_of_ones_own_is_one_file(method: str, ratio: float) -> None:
    own = [f"method.degradation={EXAMPLE}", "method.degradation_params.lowest=0.5"]
    recipe = load_recipe("demo", [*own, f"method.name={method}", f"method.mask_ratio={ratio}"])
    views = recipe.method.views
    assert (recipe.view_side, draws_per_sample(recipe)) == (24, views)
    student = build_student(recipe)
    assert vars(student.degradation) == {"loss_on": "all", "lowest": 0.5}
    pixels = [torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8) for _ in range(views)]
    draws = torch.rand(2, views)
    for view, seen, level in zip(pixels, student.degrade(pixels, draws), draws.T, strict=True):
        bright = normalised(view) > 0.5 + level[:, None, None, None]
        assert torch.equal(seen, torch.where(bright, -normalised(view), normalised(view)))
        assert 0 < bright.float().mean() < 1
    teacher_q = torch.randn(2, 2, recipe.model.width).unbind(0)
    student(pixels, torch.rand(2, 36), teacher_q, draws)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_a_file_may_be_called_as_a_library_and_postpone_its_annotations(tmp_path: Path) -> None:
    own = tmp_path / "random.py"
    text = Path(EXAMPLE.rpartition(":")[0]).read_text()
    own.write_text(text.replace("from dataclasses", "from __future__ import annotations\n\nfrom dataclasses", 1))
    recipe = load_recipe("demo", [f"method.degradation={own}:Solarized", "method.degradation_params.lowest=0.5"])
    assert vars(build_student(recipe).degradation) == {"loss_on": "all", "lowest": 0.5}
    import random

    assert random.random() < 1


def test_a_recipe_of_a_checkpoint_runs_no_file(tmp_path: Path) -> None:
    """Only recipes that users name do: `load_recipe`, and then training."""
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    tree = load_recipe("demo").model_dump(mode="json")
    tree["method"]["degradation"] = f"{tmp_path / 'own.py'}:Own"
    recipe = parse_recipe(tree, "state.json")
    build_encoder(recipe)
    assert not ran.exists()
    with pytest.raises(UserError, match=r"own\.py:Own: expected a file and a class in it"):
        load_recipe("demo", [f"method.degradation={tree['method']['degradation']}"])
    assert ran.exists()


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "FileNotFoundError"),
        ("class Own", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("class Other: ...", "has no attribute 'Own'"),
        ("class Own: ...", "subclass of lut_ds.method.degradations.Degradation"),
        ("from lut_ds.method.degradations import Degradation\nclass Own(Degradation): ...", "with its degrade"),
        (
            "from lut_ds.method.degradations import Degradation\nclass Own(Degradation):\n    strength: float = 1.0\n"
            "    def degrade(self, view, draws, side): return view",
            "expected @dataclass(frozen=True) above",
        ),
    ],
)
def test_a_file_that_holds_no_degradation_is_one_line(text: str | None, named: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        load_recipe("demo", [f"method.degradation={tmp_path / 'own.py'}:Own"])
    assert len(str(caught.value).splitlines()) == 1
    assert "method.degradation" in str(caught.value)


@pytest.mark.parametrize(
    "body, named",
    [
        ("return view[:, :, ::2]", "degrade: expected float32 [2, 3, 24, 24], found float32 [2, 3, 12, 24]"),
        ("return view.double()", "found float64"),
        ("return None", "degrade: expected a tensor, found NoneType"),
        ("return view.log()", "degrade: expected finite values"),
        ("return view @ draws", "expected it to take images of 24 px, found RuntimeError: "),
        ("return view\n    def loss(self, *_, **__): return torch.zeros(())", "loss: expected a gradient for `pred`"),
    ],
)
def test_a_file_whose_degradation_cannot_be_trained_on_is_one_line(body: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom lut_ds.method.degradations import Degradation\nclass Own(Degradation):\n"
        f"    draws = 1\n    def degrade(self, view, draws, side): {body}\n"
    )
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        load_recipe("demo", [f"method.degradation={tmp_path / 'own.py'}:Own"])
    assert len(str(caught.value).splitlines()) == 1
    assert "method.degradation: " in str(caught.value)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register("distorted")(DEGRADATIONS["distorted"])


@pytest.mark.parametrize(
    "name, parameters, named",
    [
        ("zoomd_in", {}, "zoomed_in"),
        ("none", {"margin": 1.0}, "margin"),
        ("distorted", {"magnitude": 1.0}, "magnitude_low"),
        ("distorted", {"magnitude_low": "x"}, "expected a float"),
        ("distorted", {"magnitude_low": 0.5}, "low <= high"),
        ("distorted", {"magnitude_high": 1e30}, "high <= 1, found 0.15, 1e"),
        ("examples/solarized.py", {}, r"expected none, .* or FILE\.py:CLASS"),
        ("blurred", {"spread": 1e30}, "at most 1"),
        ("decolorized", {"weight": 1e30}, "at most 10"),
        ("blurred", {"spread": -1}, "spread"),
        ("blurred", {"loss_on": "visible"}, "all or hidden"),
        ("decolorized", {"weight": 0}, "weight"),
        ("zoomed_in", {"margin": 0}, "margin"),
        ("zoomed_in", {"w_edge": -1.0}, "w_edge"),
        ("zoomed_in", {"w_edge": 0, "w_centre": 0}, "nothing to learn"),
        ("zoomed_out", {"view": 0.3}, "view"),
        ("zoomed_out", {"view": 1}, "view"),
    ],
)
def test_what_makes_no_sense_is_named(name: str, parameters: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_degradation(name, parameters)


@pytest.mark.parametrize(
    "name, parameters, side", [("zoomed_in", {"margin": 0.01}, 32), ("zoomed_out", {"view": 0.99}, 32)]
)
def test_a_side_that_cannot_be_is_named(name: str, parameters: dict[str, float], side: int) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        made(name, **parameters).view_side(side)


def test_published_sides() -> None:
    assert made("zoomed_in").view_side(224) == 288
    assert made("zoomed_out").view_side(224) == 160

"""A step on a GPU that is not here: devices, layouts and dtypes of its operators, on tensors without storage."""

from collections.abc import Iterator

import pytest
import torch
from lut_kernels import kernels_mode
from lut_kernels.dispatch import forget_table
from lut_kernels.fp8 import fp8_linear, quantise_rows
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lut_ds.config import parse_recipe
from lut_ds.engine.build import build_student, build_teacher
from lut_ds.engine.guards.spike import LossWindow
from lut_ds.method.fp8 import Fp8Linear
from tests.engine.tiny import tiny_tree

H200 = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The look-ups of a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    forget_table()
    yield
    forget_table()


def moved(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with empty tensors on the GPU, its parameters in another dtype where one is given."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=dtype or p.dtype, device=H200)
                part._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=H200)
    return module


@pytest.mark.parametrize("degradation", ["none", "blurred", "zoomed_in"])
def test_everything_stays_on_the_gpu(degradation: str) -> None:
    tree = tiny_tree()
    tree["precision"] = {"compute": "bf16", "teacher": "fp8"}
    tree["method"] = {**tree.get("method", {}), "degradation": degradation}
    recipe = parse_recipe(tree, "tiny")
    student = build_student(recipe)
    teacher = build_teacher(recipe, student, torch.device("cpu"))
    assert teacher is not None
    draws = 0 if student.degradation is None else 2 * student.degradation.draws
    # Attention of the library asks the driver what it can do.
    with FakeTensorMode(), kernels_mode("triton"):
        moved(student, torch.bfloat16)
        moved(teacher)
        views = [torch.empty((4, recipe.view_side, recipe.view_side, 3), dtype=torch.uint8, device=H200)] * 2
        for layer in teacher.modules():
            if isinstance(layer, Fp8Linear):
                layer.load_weight(torch.empty(layer.weight.shape, dtype=torch.bfloat16, device=H200))
        noise = torch.empty((4, recipe.model.patches), device=H200)
        losses = student(views, noise, teacher(views), torch.empty((4, draws), device=H200) if draws else None)
        window = LossWindow(8, 3.0, H200)
        window.add(losses["loss"].detach(), torch.ones((), device=H200))
        assert {loss.device for loss in (*losses.values(), window.limit())} == {H200}
        assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_fp8_products_are_laid_out_as_torch_wants_them() -> None:
    with FakeTensorMode():
        x = torch.empty((4, 197, 64), dtype=torch.bfloat16, device=H200)
        for width, fits in ((96, True), (90, False)):  # tensor cores take multiples of 16
            weight, scale = quantise_rows(torch.empty((width, 64), dtype=torch.bfloat16, device=H200))
            if fits:
                out = fp8_linear(x, weight, scale, torch.empty(width, dtype=torch.bfloat16, device=H200))
                assert (out.shape, out.dtype, out.device) == ((4, 197, width), torch.bfloat16, H200)
                with pytest.raises(RuntimeError, match="scale"):
                    torch._scaled_mm(x[0].to(weight.dtype), weight.t(), scale, scale, out_dtype=x.dtype)
            else:
                with pytest.raises(RuntimeError, match="divisible by 16"):
                    fp8_linear(x, weight, scale)

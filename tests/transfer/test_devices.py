"""Evaluation and fine-tuning on a GPU that is not here: devices, dtypes and what the host waits for, on tensors without storage."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lut_kernels import kernels_mode
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lut_ds.config import Model
from lut_ds.data.erasing import draw_erasures, erase_
from lut_ds.engine.build import compile_blocks
from lut_ds.method.pixels import normalised
from lut_ds.transfer.classifier import make_classifier
from lut_ds.transfer.features import computing
from lut_ds.transfer.lars import LARS
from lut_ds.transfer.linear import Head
from lut_ds.transfer.mixing import Mixing, mix_images, soft_cross_entropy, soft_targets
from lut_ds.transfer.models import load_model
from lut_ds.transfer.probe import Sweep, train_heads
from lut_ds.transfer.segmentation.sliding import classes_at, slide
from lut_ds.transfer.segmentation.step import pixel_loss
from lut_ds.transfer.segmentation.upernet import PyramidViT, Segmenter
from tests.engine.test_devices import H200, hopper, moved  # noqa: F401 - a fixture for every test
from tests.engine.test_step import NoConstants, NoWaiting

CLASSES = 5


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=H200)


class Copies(TorchDispatchMode):
    """Counts the tensors that go from the CPU to the GPU; one that is not pinned, for which the host would wait, is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self._pinned = 0, set[int]()
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(id(tensor))
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        copied = func.name() == "aten::_to_copy" and given.get("device") is not None
        if copied and args[0].device.type == "cpu" and torch.device(given["device"]).type == "cuda":
            assert id(args[0]) in self._pinned, "from pageable memory: the host would wait"
            assert given.get("non_blocking"), "the host would wait"
            self.count += 1
        return func(*args, **given)


@pytest.fixture
def gpu() -> Iterator[None]:
    """Tensors without storage, among them the GPU's; what is made outside stays real."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def classifier(depth: int = 3) -> VisionTransformer:
    return make_classifier(
        image_size=32,
        patch_size=8,
        width=32,
        depth=depth,
        heads=2,
        mlp_ratio=2.0,
        classes=CLASSES,
        drop_path=0.4,
    )


def segmenter() -> Segmenter:
    sizes = Model(image_size=64, patch_size=16, width=32, depth=4, heads=2)
    return Segmenter(PyramidViT(sizes, (0, 1, 2, 3), drop_path=0.2), CLASSES, channels=16, aux_channels=8)


def test_a_fine_tuning_step_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier().train()
    erasures = draw_erasures(1.0, 32, 0, 0, np.arange(4))
    copies = Copies(monkeypatch)
    # Attention of the library asks the driver what it can do.
    with FakeTensorMode(allow_non_fake_inputs=True), NoConstants(), NoWaiting(), copies, kernels_mode("triton"):
        moved(model, torch.bfloat16)
        images = normalised(on_gpu(4, 32, 32, 3, dtype=torch.uint8))
        erase_(images, erasures)
        for mixing in (Mixing(0.3), Mixing(0.75, (0, 16, 0, 16))):
            mixed = mix_images(images, mixing)
            targets = soft_targets(on_gpu(4, dtype=torch.int64), CLASSES, mixing, 0.1)
            loss = soft_cross_entropy(model(mixed.bfloat16()), targets)
            assert (loss.device, loss.dtype) == (H200, torch.float32)
    assert len(erasures) == 4
    assert copies.count == 1


def test_a_segmentation_step_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = segmenter().train(), load_model("timm:vit_tiny_patch16_224")
    waits = NoConstants(), NoWaiting(), Copies(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True), waits[0], waits[1], waits[2], kernels_mode("triton"):
        moved(model, torch.bfloat16)
        for buffer in model.buffers():
            buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
        pixels, masks = on_gpu(2, 64, 64, 3, dtype=torch.uint8), on_gpu(2, 64, 64, dtype=torch.uint8)
        logits, auxiliary = model(found.normalised(pixels).bfloat16())
        loss = pixel_loss(logits, masks) + pixel_loss(auxiliary, masks)
        assert (loss.device, loss.dtype) == (H200, torch.float32)


def test_windows_and_scores_stay_on_the_gpu(gpu: None) -> None:
    pixels = on_gpu(40, 100, 3, dtype=torch.uint8)
    told = slide(lambda windows: on_gpu(len(windows), 20, 64, 64), pixels, 64, 32, 2)
    predicted = classes_at(told, 80, 200)
    assert (told.shape, predicted.shape, predicted.device) == ((20, 40, 100), (80, 200), H200)


def test_probes_stay_on_the_gpu(gpu: None) -> None:
    head = moved(Head(8, CLASSES, seed=0))
    optimizer = LARS(head.parameters(), 0.1)
    for parameter in head.parameters():
        parameter.grad = torch.empty_like(parameter)
    with NoConstants(), NoWaiting():
        loss = F.cross_entropy(head(on_gpu(6, 8)), on_gpu(6, dtype=torch.int64))
        optimizer.step()
    assert loss.device == H200
    features, labels = on_gpu(10, 8), on_gpu(10, dtype=torch.int64)
    weight, bias = train_heads(features, labels, CLASSES, Sweep().heads()[:2], Sweep(epochs=2, batch=4))
    assert (weight.device, bias.device, weight.dtype) == (H200, H200, torch.float32)


def test_blocks_with_stochastic_depth_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, model = classifier(12), classifier(12)
    model.load_state_dict(plain.state_dict())
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend=counter, **how))
    compile_blocks(model)
    images = torch.rand(4, 3, 32, 32)
    for mode, graphs in ((True, 2), (False, 4)):  # the first block drops nothing
        expected, found = (each.train(mode) for each in (plain, model))
        torch.manual_seed(0)
        told = expected(images)
        torch.manual_seed(0)
        torch.testing.assert_close(found(images), told)
        assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_stochastic_depth_drops_at_its_rate() -> None:
    layer = classifier().train().blocks[-1].drop_path1
    dropped = layer(torch.ones(4000, 2, 3))
    assert layer.drop_prob == pytest.approx(0.4)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (dropped[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)


@pytest.fixture
def after_training() -> Iterator[tuple[Any, Any]]:
    """Backends in the state that training in bf16 leaves behind, on a GPU."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield backends
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def test_evaluations_compute_in_whole_fp32_whatever_trained_before(after_training: tuple[Any, Any]) -> None:
    with computing():
        assert not any(backend.allow_tf32 for backend in after_training)
        assert torch.get_float32_matmul_precision() == "highest"
    assert all(backend.allow_tf32 for backend in after_training)

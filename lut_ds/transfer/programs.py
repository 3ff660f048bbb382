"""The encoder as a program without this package: torch.export, ONNX or TorchScript; run again from the file before it counts."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lut_ds.errors import RunFault, UserError
from lut_ds.method.linear import Linear
from lut_ds.transfer.models import Pool, Pretrained

TOLERANCE = 1e-4  # of the largest value: other kernels round otherwise
_BATCHES = (1, 3)  # other than the one that is traced
_PROTOBUF = 1_500_000_000  # bytes; an ONNX file holds at most 2 GiB, the rest goes to a file beside it
_PACKAGES = {"onnx": ("onnx", "onnxscript")}


class EncoderProgram(nn.Module):
    """Normalised images float32 [B, 3, S, S] -> features [B, D] and tokens [B, N, D], cls first, after the final norm.

    Args:
        found: the encoder; its linear layers become torch's own.
        pool: how the features are made of the tokens.
    """

    def __init__(self, found: Pretrained, pool: Pool) -> None:
        super().__init__()
        self.model, self._pool = found.model, pool
        for layer in self.model.modules():
            if isinstance(layer, Linear):
                object.__setattr__(layer, "__class__", nn.Linear)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and tokens."""
        tokens = self.model.forward_features(images)
        prefix = self.model.num_prefix_tokens
        pooled = tokens[:, prefix:].mean(dim=1) if self._pool == "mean" else tokens[:, 0]
        return self.model.fc_norm(pooled), tokens


def check_packages(form: str) -> None:
    """UserError naming what has to be installed for a format."""
    absent = [name for name in _PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"--format {form}: expected the packages {' and '.join(_PACKAGES[form])}, found no {' and no '.join(absent)}; "
            f"pip install {' '.join(absent)}"
        )


def write_program(program: EncoderProgram, side: int, form: str, path: Path) -> float | None:
    """Write the program for any batch size and compare what the file computes with the encoder.

    Args:
        side: of the images.
        form: key of `export.PROGRAMS`.

    Returns:
        The largest difference in units of the largest value; None for ONNX where no onnxruntime is installed to run it.

    Raises:
        RunFault: the file computes something else.
    """
    program.eval()
    example = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own tracing and files: what they do is compared below
            run = _WRITERS[form](program, example, path)
        if run is None:
            return None
        worst = 0.0
        for batch in _BATCHES:
            images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))
            for expected, found in zip(program(images), run(images), strict=True):
                worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    if not worst <= TOLERANCE:  # NaN is none either
        raise RunFault(f"export: {path.name} computes other values than the encoder (by {worst:.1e}); nothing written")
    return worst


Run = Callable[[Tensor], Any]


def _torch_export(program: EncoderProgram, example: Tensor, path: Path) -> Run:
    exported = torch.export.export(program, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(exported, path)
    return torch.export.load(path).module()


def _torchscript(program: EncoderProgram, example: Tensor, path: Path) -> Run:
    torch.jit.save(torch.jit.trace(program, example), path)
    return torch.jit.load(path)


def _onnx(program: EncoderProgram, example: Tensor, path: Path) -> Run | None:
    torch.onnx.export(
        program,
        (example,),
        path,
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=["features", "tokens"],
        external_data=sum(p.nbytes for p in program.parameters()) > _PROTOBUF,
        verbose=False,
    )
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: map(torch.from_numpy, session.run(None, {"images": images.numpy()}))


_WRITERS: dict[str, Callable[[EncoderProgram, Tensor, Path], Run | None]] = {
    "torch-export": _torch_export,
    "onnx": _onnx,
    "torchscript": _torchscript,
}

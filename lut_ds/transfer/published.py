"""Checkpoints of the published LUT and MAE implementations: read without running what is in them, in our names and timm's."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from lut_ds.config import Model
from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.method.names import convert_published
from lut_ds.transfer.layouts import is_plain, load_safely

ENTRIES = {"student": "model", "ema": "model_ema"}
# Attention heads of the published encoders by width; weights do not tell them.
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}
EXPECTED = "expected a pre-training checkpoint of the published LUT or MAE code"


@dataclass(frozen=True)
class Published:
    """Weights of a published checkpoint.

    Attributes:
        path: the file.
        kind: whose weights: the student's, or the EMA teacher's.
        epoch: the one it was saved after (0-based), where the file says so.
        model: the encoder's sizes, read from the shapes; the decoder's are left at their defaults.
        weights: fp32, in our names: encoder.*, decoder.*, projector.*, predictor.*.
        others: what else is in the file, such as the optimizer.
    """

    path: Path
    kind: Literal["student", "ema"]
    epoch: int | None
    model: Model
    weights: Mapping[str, Tensor]
    others: tuple[str, ...]

    @property
    def left_out(self) -> dict[str, int]:
        """Tensors of each part that is not the encoder: what an export leaves behind."""
        return dict(Counter(part for name in self.weights if (part := name.partition(".")[0]) != "encoder"))

    def encoder(self) -> Encoder:
        """The encoder in eval mode, loaded strictly, with the position table of the file.

        Raises:
            UserError: the file has other entries than the encoder of its size.
        """
        m = self.model
        encoder = Encoder(m.image_size, m.patch_size, m.width, m.depth, m.heads, m.mlp_ratio)
        state = {k.removeprefix("encoder."): v for k, v in self.weights.items() if k.startswith("encoder.")}
        try:
            missing, unknown = encoder.load_state_dict(state, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint: {self.path}: {EXPECTED}, found other shapes: {reason}") from None
        if missing or unknown:
            problem = f"without {missing[0]}" if missing else f"with {unknown[0]}"
            raise UserError(f"checkpoint: {self.path}: {EXPECTED}, found one {problem}; was it fine-tuned?")
        return encoder.eval()


def read_published(path: str | Path, kind: Literal["student", "ema"], heads: int | None = None) -> Published:
    """Read a file that the published LUT or MAE code saved: tensors, numbers and text only, no pickled code.

    Args:
        path: a .pth file with `model` and, from LUT, `model_ema`; decoder and heads may be missing.
        kind: which of the two.
        heads: attention heads of the encoder; needed for sizes that are not published.

    Raises:
        UserError: no such file, no such weights in it, sizes that fit no encoder, or values that are not finite.
    """
    path = Path(path)
    content = load_safely(path, EXPECTED)
    entry = ENTRIES[kind]
    state = content.get(entry)
    if not isinstance(state, Mapping):
        advice = "; take the student's weights (--student)" if kind == "ema" and "model" in content else ""
        names = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(f"checkpoint: {path}: expected {entry!r} in it, found {names}{advice}")
    if bad := next((k for k, v in state.items() if not isinstance(k, str) or not is_plain(v)), None):
        raise UserError(f"checkpoint: {path}: expected plain tensors in {entry!r}, found something else at {bad}")
    weights = {k: v.float() if v.is_floating_point() else v for k, v in convert_published(state).items()}
    if not all(name in weights for name in _SIZES):
        missing = next(name for name in _SIZES if name not in weights)
        raise UserError(f"checkpoint: {path}: {EXPECTED}, found none of its {missing.removeprefix('encoder.')}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"checkpoint: {path}: expected finite weights, found NaN or infinity in {name}")
    if "projector.weight" in weights:  # published as head.weight
        raise UserError(f"checkpoint: {path}: {EXPECTED}, found one with a classifier; name the one it started from")
    epoch = content.get("epoch")
    others = tuple(str(key) for key in content if key != entry)
    return Published(
        path, kind, epoch if isinstance(epoch, int) else None, _sizes(weights, heads, path), weights, others
    )


_SIZES = (
    "encoder.cls_token",
    "encoder.pos_embed",
    "encoder.patch_embed.proj.weight",
    "encoder.blocks.0.mlp.fc1.weight",
)


def _sizes(weights: Mapping[str, Tensor], heads: int | None, path: Path) -> Model:
    """The sizes that the shapes say, and the heads that are published for them."""
    if (shapes := [weights[name].dim() for name in _SIZES]) != [3, 3, 4, 2]:
        raise UserError(f"checkpoint: {path}: {EXPECTED}, found {_SIZES} of {shapes} dimensions")
    positions, (width, _, patch, _) = weights[_SIZES[1]].shape[1], weights[_SIZES[2]].shape
    heads = heads or HEADS.get(width)
    if heads is None:
        raise UserError(f"checkpoint: {path}: width {width} is none of the published encoders'; add --heads N")
    sizes: dict[str, Any] = {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "width": width,
        "depth": len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}),
        "heads": heads,
        "mlp_ratio": weights[_SIZES[3]].shape[0] / width,
    }
    try:
        return Model(**sizes)
    except ValidationError as error:
        raise UserError(f"checkpoint: {path}: {EXPECTED}: {error.errors()[0]['msg']}") from None

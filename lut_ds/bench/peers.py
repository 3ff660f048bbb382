"""Times the published LUT and MAE from a checkout that the user names; nothing of theirs is in this package.

Their files stay as they are. What keeps them from starting with today's packages is supplied from outside: a module that
LUT imports and does not ship, names that torch and NumPy have dropped, an argument that timm's Block no longer takes, and,
without a GPU, the CUDA calls of their loops. Their own `train_one_epoch` runs, with its logging and its waits.
"""

import argparse
import contextlib
import importlib
import io
import math
import sys
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from lut_ds.bench.rounds import Figures
from lut_ds.config import Recipe
from lut_ds.errors import UserError

ENTRIES = {"lut": "engines/engine_lut.py", "mae": "engine_pretrain.py"}


def check_checkout(peer: str, folder: str) -> Path:
    """The folder of a published implementation; UserError when it does not hold one."""
    path = Path(folder).expanduser().resolve()
    if not (path / ENTRIES[peer]).is_file():
        raise UserError(
            f"--peer-{peer}: {folder}: expected a checkout of the published implementation, found no {ENTRIES[peer]} in it"
        )
    return path


def time_peer(
    peer: str, folder: Path, recipe: Recipe, batches: list[list[Tensor]], device: torch.device, warmup: int
) -> Figures:
    """Run their epoch over `batches` (normalised float views), the first `warmup` of them untimed.

    Returns:
        `seconds` for the others, and `loss`, the mean over the epoch.
    """
    sys.path.insert(0, str(folder))
    _supply_what_is_gone(device)
    torch.manual_seed(0)
    watch = Stopwatch([([*views], 0) if peer == "lut" else (views[0], 0) for views in batches], warmup, device)
    with contextlib.redirect_stdout(io.StringIO()):  # their progress
        stats = (_lut_epoch if peer == "lut" else _mae_epoch)(recipe, watch, device)
    return {"seconds": watch.seconds(), "loss": float(stats["loss"])}


class Stopwatch:
    """A data loader over ready batches that notes when the timed part begins and ends."""

    def __init__(self, batches: list[Any], warmup: int, device: torch.device) -> None:
        self._batches, self._warmup, self._device = batches, warmup, device
        self._times: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._batches):
            if index == self._warmup:
                self._note()
            yield batch
        self._note()

    def seconds(self) -> float:
        """Length of the timed part."""
        return self._times[1] - self._times[0]

    def _note(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times.append(time.perf_counter())


def _lut_epoch(recipe: Recipe, data: Stopwatch, device: torch.device) -> dict[str, float]:
    models: Any = importlib.import_module("models.models_lut")
    engine: Any = importlib.import_module("engines.engine_lut")
    ema: Any = importlib.import_module("util.model_ema_sched")
    m, method = recipe.model, recipe.method
    model = models.MaskedAutoencoderViT_LUT(
        **_shape(recipe),
        depth_head=method.projector_depth,
        depth_pred=method.predictor_depth,
        head_mlp_dim=method.head_hidden,
        head_norm_layer=nn.BatchNorm1d,
        head_act_layer=nn.ReLU,
    ).to(device)
    assert m.patches == model.patch_embed.num_patches
    teacher = ema.ModelEma_sched(model, decay=np.full(len(data), 0.996))
    options = _options(recipe, w_mae=method.w_mae, w_bc=method.w_bc)
    stats = engine.train_one_epoch(
        model, data, _optimizer(model, recipe), device, 0, _scaler(device), model_ema=teacher, args=options
    )
    return dict(stats)


def _mae_epoch(recipe: Recipe, data: Stopwatch, device: torch.device) -> dict[str, float]:
    models: Any = importlib.import_module("models_mae")
    engine: Any = importlib.import_module("engine_pretrain")
    model = models.MaskedAutoencoderViT(**_shape(recipe)).to(device)
    stats = engine.train_one_epoch(
        model, data, _optimizer(model, recipe), device, 0, _scaler(device), args=_options(recipe)
    )
    return dict(stats)


def _shape(recipe: Recipe) -> dict[str, Any]:
    m = recipe.model
    return {
        "img_size": m.image_size,
        "patch_size": m.patch_size,
        "embed_dim": m.width,
        "depth": m.depth,
        "num_heads": m.heads,
        "decoder_embed_dim": m.decoder_width,
        "decoder_depth": m.decoder_depth,
        "decoder_num_heads": m.decoder_heads,
        "mlp_ratio": m.mlp_ratio,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "norm_pix_loss": recipe.method.norm_pix,
    }


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """As their main programs make it: weight decay on all but vectors and biases."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": recipe.optim.weight_decay}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=recipe.optim.betas)


def _options(recipe: Recipe, **more: float) -> argparse.Namespace:
    return argparse.Namespace(
        accum_iter=1, mask_ratio=recipe.method.mask_ratio, lr=1e-4, min_lr=0.0, warmup_epochs=40, epochs=1600, **more
    )


def _scaler(device: torch.device) -> Any:
    """Their loss scaler; without a GPU it is disabled, and LUT's loop reads a state that a disabled one lacks."""
    misc: Any = importlib.import_module("util.misc")
    scaler = misc.NativeScalerWithGradNormCount()
    if device.type == "cpu":
        scaler.state_dict = lambda: {"scale": 1.0}
    return scaler


def _supply_what_is_gone(device: torch.device) -> None:
    six: Any = types.ModuleType("torch._six")
    six.inf = math.inf
    dino: Any = types.ModuleType("util.utils_dino")
    dino.trunc_normal_ = nn.init.trunc_normal_
    sys.modules.setdefault("torch._six", six)
    sys.modules.setdefault("util.utils_dino", dino)
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    block: Any = timm_vit.Block

    def old_block(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
        made: nn.Module = block(*args, **kwargs)
        return made

    timm_vit.Block = old_block
    if device.type == "cpu":
        torch.cuda.synchronize = lambda *_: None

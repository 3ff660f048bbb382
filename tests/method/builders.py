"""Models for tests: from a golden configuration, or small ones with random weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lut_ds.method.decoder import Decoder
from lut_ds.method.encoder import Encoder
from lut_ds.method.heads import make_head
from lut_ds.method.lut import LUT, MAE, Teacher
from lut_ds.method.names import convert_published

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0,
    "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.75, "norm_pix_loss": True,
    "depth_head": 2, "depth_pred": 2, "head_mlp_dim": 48, "head_norm_layer": "BN", "head_act_layer": "ReLU",
    "w_mae": 1.0, "w_bc": 0.25,
}  # fmt: skip


def encoder_from(config: dict[str, Any]) -> Encoder:
    """Encoder of a configuration in the references' words."""
    return Encoder(
        config["img_size"],
        config["patch_size"],
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["mlp_ratio"],
    )


def decoder_from(config: dict[str, Any]) -> Decoder:
    """Decoder of a configuration in the references' words."""
    return Decoder(
        config["embed_dim"],
        config["img_size"] // config["patch_size"],
        config["decoder_embed_dim"],
        config["decoder_depth"],
        config["decoder_num_heads"],
        config["patch_size"] ** 2 * 3,
        config["mlp_ratio"],
    )


def head_from(config: dict[str, Any], depth_key: str) -> nn.Sequential:
    """Projector (`depth_head`) or predictor (`depth_pred`) of a configuration."""
    norm, act = str(config["head_norm_layer"] or "none").lower(), config["head_act_layer"].lower()
    return make_head(config[depth_key], config["embed_dim"], config["head_mlp_dim"], norm, act)


def lut_from(config: dict[str, Any]) -> LUT:
    """A LUT student in training mode, random weights."""
    return LUT(
        encoder_from(config),
        decoder_from(config),
        head_from(config, "depth_head"),
        head_from(config, "depth_pred"),
        mask_ratio=config["mask_ratio"],
        norm_pix=config["norm_pix_loss"],
        w_mae=config["w_mae"],
        w_bc=config["w_bc"],
    )


def mae_from(config: dict[str, Any]) -> MAE:
    """An MAE, random weights."""
    return MAE(
        encoder_from(config),
        decoder_from(config),
        mask_ratio=config["mask_ratio"],
        norm_pix=config["norm_pix_loss"],
    )


def teacher_from(config: dict[str, Any]) -> Teacher:
    """A teacher, random weights."""
    return Teacher(encoder_from(config), head_from(config, "depth_head"))


def load_teacher(teacher: Teacher, published: dict[str, Tensor]) -> None:
    """Fill a teacher from a whole published state; the decoder's and predictor's copies have no use there."""
    state = convert_published(published)
    used = {name: value for name, value in state.items() if name.startswith(("encoder.", "projector."))}
    teacher.load_state_dict(used, strict=True)


def small(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The small configuration with changes; seeds torch so that the next model and inputs are the same each time."""
    torch.manual_seed(seed)
    return SMALL | changes


def randomise(module: nn.Module) -> None:
    """Make zero biases, unit norms and fresh buffers tell apart: add noise to every parameter and running statistic."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))


def bfloat16_weights(module: nn.Module) -> None:
    """Cast the parameters and leave the buffers in fp32, as the engine does."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()

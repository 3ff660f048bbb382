"""Any pre-trained ViT as timm's VisionTransformer: our runs and exports, timm's models, and published checkpoints."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.config import Model
from lut_ds.errors import UserError
from lut_ds.method.linear import use_fast_linear
from lut_ds.method.pixels import IMAGENET_MEAN, IMAGENET_STD
from lut_ds.transfer.huggingface import is_vit_folder, read_vit
from lut_ds.transfer.layouts import ENCODER_PARTS, StateDict, check_finite, read_config, read_state_dict
from lut_ds.transfer.load import Kind, find_checkpoint, load_encoder

Pool = Literal["mean", "cls"]
PREFIX = "timm:"
# Attention heads of the published encoders by width; weights do not tell them.
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}
_MOCO_HEADS = {384: 12}  # where MoCo v3's differ from the others'
_NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")


@dataclass(frozen=True)
class Pretrained:
    """A model to evaluate, in eval mode, fp32, on the CPU, without a classifier.

    Attributes:
        model: takes normalised float [B, 3, S, S].
        image_size: S, pixels.
        mean, std: of the pixels it expects, by channel, of values in [0, 1].
        record: where it comes from: `source`, `format`, `kind`, `step`, `epoch`, `sizes`, `image_size`, `resized_from` (None
            where positions are as trained), `random` (True: never trained), `left_out` (tensors by part), `weights` (SHA-256).
        head: the linear classifier of its file, `head.weight` [C, D] and `head.bias` [C]; empty without one.
        classes: what that classifier tells apart, where the file says so.
        crop: side of the centre crop over the shorter side of the resized image, of timm's own evaluation.
        timm: timm's name and the constructor arguments, of a model that timm made; None: see `plain_vit`.
    """

    model: VisionTransformer
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict[str, Any]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    crop: float = 0.875
    timm: tuple[str, Mapping[str, Any]] | None = None

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] as the model expects it."""
        # One channel after the other: a tensor of constants would have to be copied to the device while the host waits.
        unit = pixels.float() / 255
        scaled = [(unit[..., c] - mean) / std for c, (mean, std) in enumerate(zip(self.mean, self.std, strict=True))]
        return torch.stack(scaled, dim=3).permute(0, 3, 1, 2)

    def features(self, images: Tensor, pool: Pool) -> Tensor:
        """One vector an image, [B, 3, S, S] -> [B, D]: the mean of the patch tokens, or the cls token, as timm pools them."""
        tokens = self.model.forward_features(images)
        pooled = tokens[:, self.model.num_prefix_tokens :].mean(dim=1) if pool == "mean" else tokens[:, 0]
        return self.model.fc_norm(pooled)


def load_model(
    source: str | Path, kind: Kind | None = None, image_size: int | None = None, heads: int | None = None
) -> Pretrained:
    """A pre-trained ViT as timm's VisionTransformer.

    Args:
        source: run folder, checkpoint folder, export folder (model.safetensors and the config.json of timm, or of a ViT of
            transformers), a .safetensors or .pth file of timm, LUT, MAE, MoCo v3, DINO or iBOT; `timm:NAME` for that model with
            random weights, `timm:NAME.TAG` with those that timm publishes so, `timm:NAME:FILE` with the weights of a file.
        kind: `student` or `ema`; None takes the average of the student's weights where there is one.
        image_size: evaluate at this side: positions are resampled as timm does (bicubic). None: as trained.
        heads: attention heads, for a file that has neither a config.json nor a published width.

    Raises:
        UserError: nothing there, another architecture, weights that are missing or not finite, or a side that patches do not
            divide.
    """
    text = str(source)
    path = Path(text)
    if text.startswith(PREFIX):
        found = _from_timm(text, kind)
    elif path.is_file():
        config = path.with_name("config.json")
        exported = path.name == "model.safetensors" and config.is_file()
        found = _from_export(path, config) if exported else _from_file(path, kind, heads)
    elif (path / "model.safetensors").is_file():
        found = _from_export(path / "model.safetensors", path / "config.json")
    else:
        found = _from_run(path, kind)
    use_fast_linear(found.model)
    found.record["weights"] = _digest(found.model)
    return _resized(found, image_size)


def _pretrained(
    model: VisionTransformer, cfg: Mapping[str, Any], head: Mapping[str, Tensor] | None = None, **record: Any
) -> Pretrained:
    sizes = {
        "patch_size": model.patch_embed.img_size[0] // model.patch_embed.grid_size[0],  # a convolutional stem's, too
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": model.blocks[0].attn.num_heads,
    }
    side = model.patch_embed.img_size[0]
    defaults: dict[str, Any] = {
        "kind": None,
        "step": None,
        "epoch": None,
        "random": False,
        "left_out": {},
        "resized_from": None,
    }
    mean, std = (tuple(map(float, cfg.get(k, v))) for k, v in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    about = {**defaults, **record, "sizes": sizes, "image_size": side}
    classes, crop = tuple(cfg.get("label_names") or ()), float(cfg.get("crop_pct") or 0.875)
    return Pretrained(model.eval(), side, mean, std, about, head or {}, classes, crop)


def _from_run(path: Path, kind: Kind | None) -> Pretrained:
    if (path / "best" / "config.json").is_file():
        raise UserError(
            f"checkpoint: {path}: expected a pre-training run, found one of finetune or segment; name {path / 'best'}"
        )
    checkpoint = find_checkpoint(path)
    kind = kind or checkpoint.kinds[-1]
    encoder = load_encoder(checkpoint, kind)
    model = plain_vit(checkpoint.recipe.model)
    _load(model, dict(encoder.state_dict()), checkpoint.path)
    found = _pretrained(
        model, {}, source=str(path), format="run", kind=kind, step=checkpoint.step, epoch=checkpoint.epoch
    )
    found.record["positions"] = checkpoint.recipe.model.positions
    return found


def _from_export(weights: Path, config: Path) -> Pretrained:
    if is_vit_folder(config):
        return _from_transformers(weights.parent)
    cfg = read_config(config)
    about, arguments = cfg.get("lut_ds") or {}, cfg.get("model_args") or {}
    model = _create(cfg["architecture"], {**arguments, "num_classes": 0}, config)
    state = read_state_dict(weights, None)
    _load(model, _fitting(state.weights, model, weights), weights)
    record = {"kind": about.get("kind"), "step": about.get("step"), "left_out": state.left_out}
    found = _pretrained(
        model, cfg.get("pretrained_cfg", {}), state.head, source=str(weights.parent), format="export", **record
    )
    return replace(found, timm=(cfg["architecture"], arguments))


def _from_transformers(folder: Path) -> Pretrained:
    found = read_vit(folder)
    _load(found.model, found.weights, folder)
    about = found.config.get("lut_ds") or {}
    record = {"kind": about.get("kind"), "step": about.get("step"), "left_out": found.left_out}
    return _pretrained(found.model, found.pixels, found.head, source=str(folder), format="transformers", **record)


def _from_timm(text: str, kind: Kind | None) -> Pretrained:
    name, _, file = text.removeprefix(PREFIX).partition(":")
    model = _create(name, {"num_classes": 0}, text)
    head: Mapping[str, Tensor] = {}
    record: dict[str, Any] = {"random": True}
    if file:
        state = read_state_dict(Path(file), kind)
        _load(model, _fitting(state.weights, model, Path(file)), Path(file))
        head, record = state.head, {"kind": state.kind, "left_out": state.left_out}
    elif "." in name:
        head, record = _timms_own(model, name, text)
    found = _pretrained(model, model.pretrained_cfg, head, source=text, format="timm", **record)
    return replace(found, timm=(name.partition(".")[0], {}))


def _timms_own(model: VisionTransformer, name: str, text: str) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Load the weights that timm publishes under a tag, from its cache or the network; a linear head, and what was left out."""
    state = _create(name, {"pretrained": True}, text).state_dict()
    head = {key: value for key, value in state.items() if key.partition(".")[0] not in ENCODER_PARTS}
    _load(model, {key: value for key, value in state.items() if key not in head}, Path(name))
    parts = dict(Counter(key.partition(".")[0] for key in head))
    return head if set(head) == {"head.weight", "head.bias"} else {}, {"left_out": parts}


def _from_file(path: Path, kind: Kind | None, heads: int | None) -> Pretrained:
    state = read_state_dict(path, kind)
    model = plain_vit(_sizes(state, heads, path), fc_norm="fc_norm.weight" in state.weights)
    _load(model, state.weights, path)
    return _pretrained(
        model,
        {},
        state.head,
        source=str(path),
        format=state.layout,
        kind=state.kind,
        epoch=state.epoch,
        left_out=state.left_out,
    )


def plain_vit(sizes: Model, fc_norm: bool = False) -> VisionTransformer:
    """timm's VisionTransformer of the encoder's sizes, without a classifier, weights not yet set. LN eps 1e-6."""
    return VisionTransformer(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=sizes.mlp_ratio,
        num_classes=0,
        global_pool="avg",
        fc_norm=fc_norm,
        norm_layer=partial(LayerNorm, eps=1e-6),
        weight_init="skip",
    )


def _create(name: str, arguments: Mapping[str, Any], where: object) -> VisionTransformer:
    try:
        model = timm.create_model(name, **arguments)
    except OSError as error:  # of the network, and of a cache without the file
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"checkpoint: {where}: no weights in timm's cache, and none could be downloaded: {reason}; download them "
            f"elsewhere and name the file: timm:{name.partition('.')[0]}:FILE"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        near = ", ".join(timm.list_models(f"{name[:9]}*")[:3]) or "vit_small_patch16_224, vit_base_patch16_224"
        raise UserError(f"checkpoint: {where}: timm cannot make {name!r}: {reason}; it has {near}...") from error
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"checkpoint: {where}: expected a Vision Transformer, found timm's {type(model).__name__}; name a vit_* model"
        )
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in model.blocks):
        raise UserError(
            f"checkpoint: {where}: expected blocks of attention, then MLP, found timm's {type(model.blocks[0]).__name__}; "
            "name another vit_* model"
        )
    return model


def _fitting(weights: dict[str, Tensor], model: VisionTransformer, path: Path) -> dict[str, Tensor]:
    """Positions of another resolution resampled to the model's, as timm does when it loads."""
    table = weights.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return weights
    if table.dim() != 3 or table.shape[2] != model.embed_dim:
        return weights  # another architecture: loading says so
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    resampled = timm.layers.resample_abs_pos_embed(table, model.patch_embed.grid_size, num_prefix_tokens=prefix)
    return {**weights, "pos_embed": resampled}


def _load(model: VisionTransformer, weights: dict[str, Tensor], path: Path) -> None:
    """Load strictly, or say in one line in what the architectures differ."""
    own = model.state_dict()
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in weights
        if name in own and weights[name].shape != own[name].shape
    ]
    missing, unknown = [n for n in own if n not in weights], [n for n in weights if n not in own]
    problem = next(iter(shapes), None) or (missing and f"none of {missing[0]}") or (unknown and f"also {unknown[0]}")
    if problem:
        s = _describe(model)
        count = len(shapes) + len(missing) + len(unknown)
        raise UserError(
            f"checkpoint: {path}: expected the weights of {s}, found {problem} ({count} tensors differ); name the "
            "architecture: timm:NAME:FILE"
        )
    check_finite(weights, path)
    model.load_state_dict(weights, strict=True)


def _describe(model: VisionTransformer) -> str:
    return f"a ViT of width {model.embed_dim}, depth {len(model.blocks)}, patch {model.patch_embed.patch_size[0]}"


def _sizes(state: StateDict, heads: int | None, path: Path) -> Model:
    """The sizes that the shapes say, and the heads that are published for them."""
    weights = state.weights
    absent = next((name for name in _NEEDED if name not in weights), None)
    if absent or [weights[n].dim() for n in _NEEDED] != [3, 3, 4, 2]:
        raise UserError(
            f"checkpoint: {path}: expected a plain ViT, found {'no ' + absent if absent else 'other dimensions'}; "
            "name the architecture: timm:NAME:FILE"
        )
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    published = {**HEADS, **(_MOCO_HEADS if state.layout == "moco_v3" else {})}
    heads = heads or published.get(width)
    if heads is None:
        raise UserError(
            f"checkpoint: {path}: width {width} is none of the published encoders'; add --heads N (for segment "
            "model.source_heads=N, for finetune the recipe of its size)"
        )
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    try:
        return Model(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            heads=heads,
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        )
    except ValueError as error:  # pydantic's, whose text has several lines
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint: {path}: expected the sizes of a ViT: {reason}; correct --heads") from None


def _resized(found: Pretrained, side: int | None) -> Pretrained:
    if side is None or side == found.image_size:
        return found
    patch = found.record["sizes"]["patch_size"]
    if side % patch:
        raise UserError(f"--image-size: expected a multiple of the patch side {patch}, found {side}; choose another")
    if found.record.get("positions") == "sinusoid_1d":
        raise UserError(
            "--image-size: positions over the raster index (sinusoid_1d) mean nothing on another grid; leave it out"
        )
    found.model.set_input_size(img_size=(side, side))
    return replace(
        found, image_size=side, record={**found.record, "image_size": side, "resized_from": found.image_size}
    )


def _digest(model: VisionTransformer) -> str:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

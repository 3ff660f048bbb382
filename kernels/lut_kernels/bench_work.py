"""What `bench` runs: every operator at the shapes of ViT-S/B/L/H, with its library sides and its floor in bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lut_kernels.attention import attention, library_attention
from lut_kernels.dispatch import kernels_mode
from lut_kernels.embed import embed_tokens
from lut_kernels.gather import gather_patches
from lut_kernels.loss import reconstruction_loss
from lut_kernels.unshuffle import unshuffle_tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIBRARY_ATTENTION = ("sdpa", "cudnn", "flash", "efficient", "plain")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """One operator at one shape. `call` gets the inputs; the inputs in `leaves` want a gradient (none: forward only)."""

    op: str
    name: str
    make: Callable[[str, torch.dtype, int], Inputs]
    call: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...]
    bytes: int
    flops: int = 0
    images: int = 0
    tokens: int = 0
    head_dim: int = 0
    library: dict[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The sizes of an encoder; decoder 512 wide with 16 heads for all."""

    name: str
    width: int
    heads: int
    patch: int

    @property
    def patches(self) -> int:
        """Patches of a 224-pixel view."""
        return (224 // self.patch) ** 2

    @property
    def kept(self) -> int:
        """Visible patches: a quarter."""
        return self.patches // 4


MODELS = (Model("S", 384, 6, 16), Model("B", 768, 12, 16), Model("L", 1024, 16, 16), Model("H", 1280, 16, 14))
DECODER_WIDTH, DECODER_HEADS = 512, 16


def _random(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, device=device, generator=_random(device, seed), dtype=torch.float32).to(dtype)


def _pixels(batch: int, side: int, device: str, seed: int) -> Tensor:
    shape = (batch, side, side, 3)
    return torch.randint(0, 256, shape, device=device, generator=_random(device, seed), dtype=torch.uint8)


def _shuffle(batch: int, patches: int, device: str, seed: int) -> Tensor:
    return torch.rand((batch, patches), device=device, generator=_random(device, seed)).argsort(dim=1)


def _reference(call: Callable[[Inputs], Tensor]) -> dict[str, Callable[[Inputs], Tensor]]:
    def torch_side(inputs: Inputs) -> Tensor:
        with kernels_mode("torch"):
            return call(inputs)

    return {"torch": torch_side}


def gather_work(batch: int, patch: int, kept: int | None, side: int = 224, dtype_bytes: int = 2) -> Work:
    """Masked gather from uint8 pixels (all patches where `kept` is None)."""
    patches, row = (side // patch) ** 2, 3 * patch**2
    rows = kept or patches

    def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = {"pixels": _pixels(batch, side, device, seed), "like": torch.empty(0, dtype=dtype, device=device)}
        return inputs | ({} if kept is None else {"ids": _shuffle(batch, patches, device, seed)[:, :kept].contiguous()})

    def call(inputs: Inputs) -> Tensor:
        return gather_patches(inputs["pixels"], inputs.get("ids"), patch, MEAN, STD, inputs["like"].dtype)

    name = f"gather B={batch} P={patch} {'all' if kept is None else kept}"
    size = batch * rows * row * (1 + dtype_bytes)
    return Work("gather_patches", name, make, call, (), size, images=batch, library=_reference(call))


def embed_work(batch: int, width: int, patches: int, kept: int) -> Work:
    """Positions and cls, forward (its backward launches nothing of ours)."""

    def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        return {
            "x": _normal((batch, kept, width), device, dtype, seed),
            "cls": _normal((1, 1, width), device, torch.float32, seed + 1),
            "pos": _normal((1, 1 + patches, width), device, torch.float32, seed + 2),
            "ids": _shuffle(batch, patches, device, seed)[:, :kept].contiguous(),
        }

    def call(inputs: Inputs) -> Tensor:
        return embed_tokens(inputs["x"], inputs["cls"], inputs["pos"], inputs["ids"])

    size = batch * (2 * kept + 1) * width * 2
    return Work(
        "embed_tokens", f"embed B={batch} D={width}", make, call, (), size, images=batch, library=_reference(call)
    )


def unshuffle_work(batch: int, width: int, patches: int, kept: int, training: bool) -> Work:
    """Decoder unshuffle; with its backward where `training`."""

    def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        return {
            "x": _normal((batch, 1 + kept, width), device, dtype, seed),
            "mask": _normal((1, 1, width), device, torch.float32, seed + 1),
            "pos": _normal((1, 1 + patches, width), device, torch.float32, seed + 2),
            "restore": _shuffle(batch, patches, device, seed),
        }

    def call(inputs: Inputs) -> Tensor:
        return unshuffle_tokens(inputs["x"], inputs["mask"], inputs["pos"], inputs["restore"])

    size = batch * (2 + kept + patches) * width * 2 * (2 if training else 1)
    name = f"unshuffle B={batch} L={patches} {'train' if training else 'eval'}"
    leaves = ("x", "mask") if training else ()
    return Work("unshuffle_tokens", name, make, call, leaves, size, images=batch, library=_reference(call))


def loss_work(batch: int, patch: int, masked: int, side: int = 224, norm_pix: bool = True) -> Work:
    """Reconstruction loss and its gradient."""
    patches, row = (side // patch) ** 2, 3 * patch**2

    def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        return {
            "pred": _normal((batch, masked, row), device, dtype, seed),
            "pixels": _pixels(batch, side, device, seed),
            "ids": _shuffle(batch, patches, device, seed)[:, :masked].contiguous(),
        }

    def call(inputs: Inputs) -> Tensor:
        return reconstruction_loss(inputs["pred"], inputs["pixels"], inputs["ids"], patch, MEAN, STD, norm_pix)

    name, size = f"loss B={batch} P={patch}", batch * masked * row * 5
    return Work("reconstruction_loss", name, make, call, ("pred",), size, images=batch, library=_reference(call))


def attention_work(batch: int, tokens: int, heads: int, head_dim: int, training: bool) -> Work:
    """Self-attention; the library's backends are called by name, as the table may choose them."""

    def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
        return {"qkv": _normal((batch, tokens, 3 * heads * head_dim), device, dtype, seed)}

    def call(inputs: Inputs) -> Tensor:
        return attention(inputs["qkv"], heads)

    def side(use: str) -> Callable[[Inputs], Tensor]:
        return lambda inputs: library_attention(inputs["qkv"], heads, use)

    forward_bytes = batch * tokens * heads * head_dim * 4 * 2
    return Work(
        "attention",
        f"attention B={batch} N={tokens} H={heads} d={head_dim} {'train' if training else 'eval'}",
        make,
        call,
        ("qkv",) if training else (),
        forward_bytes * (3 if training else 1),
        4 * batch * heads * tokens**2 * head_dim * (7 if training else 2) // 2,
        images=batch,
        tokens=tokens,
        head_dim=head_dim,
        library={use: side(use) for use in LIBRARY_ATTENTION},
    )


def step_work(images: int, models: tuple[Model, ...] = MODELS) -> list[Work]:
    """The operators of one training step of each model with `images` images: both views, student, teacher, decoder."""
    found: dict[str, Work] = {}
    for model in models:
        patches, kept = model.patches, model.kept
        head_dim = model.width // model.heads
        decoder_dim = DECODER_WIDTH // DECODER_HEADS
        for work in (
            gather_work(2 * images, model.patch, kept),
            gather_work(2 * images, model.patch, None),
            embed_work(2 * images, model.width, patches, kept),
            unshuffle_work(images, DECODER_WIDTH, patches, kept, training=True),
            loss_work(images, model.patch, patches - kept),
            attention_work(2 * images, 1 + kept, model.heads, head_dim, training=True),
            attention_work(2 * images, 1 + patches, model.heads, head_dim, training=False),
            attention_work(images, 1 + patches, DECODER_HEADS, decoder_dim, training=True),
        ):
            found.setdefault(work.name, work)
    return list(found.values())


def transfer_work(images: int) -> list[Work]:
    """Attention of fine-tuning at 224, 384 and 448: whole views, forward and backward."""
    lengths = {64: (197, 577, 785), 80: (257, 577, 1025)}
    return [
        attention_work(images, tokens, 16, head_dim, training=True)
        for head_dim in lengths
        for tokens in lengths[head_dim]
    ]


def parity_work() -> list[Work]:
    """Small and odd shapes: every branch of every kernel."""
    found = [
        gather_work(3, patch, kept, side=side)
        for patch, kept, side in ((16, 49, 224), (16, None, 224), (14, 64, 224), (14, None, 224), (5, 3, 35), (1, 7, 6))
    ]
    found += [embed_work(3, width, 17, 5) for width in (7, 40, 384, 1024, 1280)]
    found += [
        unshuffle_work(3, width, patches, kept, True)
        for width, patches, kept in ((7, 5, 2), (512, 196, 49), (40, 33, 0))
    ]
    found += [loss_work(3, patch, masked, side) for patch, masked, side in ((16, 147, 224), (14, 192, 224), (5, 3, 35))]
    found += [loss_work(2, 16, 147, norm_pix=False)]
    found += [
        attention_work(2, tokens, heads, head_dim, True)
        for tokens in (1, 2, 17, 50, 64, 65, 128, 197, 257, 577, 1025)
        for heads, head_dim in ((3, 32), (2, 64), (2, 80), (1, 12), (1, 128))
    ]
    return found

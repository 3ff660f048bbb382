"""The shapes that matter and the tiles that may be tried on them: what `bench` times and `resources` compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from lut_kernels import attention_launch, embed, gather, loss, unshuffle

BF16 = torch.bfloat16
SHORT = {torch.float16: "fp16", torch.float32: "fp32"}
# Student and full length for patch 16, the same for patch 14, 384 and 448 pixels for transfer. The first two are tuned.
TOKENS = (50, 197, 65, 257, 577, 1025)
HEADS = {32: 16, 64: 16, 80: 16}  # heads by head dim: decoder, ViT-S/B/L, ViT-H
WIDE = {96: 8, 128: 8}  # head dims no ViT here has: compiled with the table's tiles, never tuned


def _attention_space() -> dict[str, list[dict[str, int]]]:
    forward = [
        {"rows": rows, "step": step, "heads": 1, "warps": warps, "stages": stages}
        for rows, step, warps, stages in product((32, 64, 128), (32, 64), (4, 8), (2, 3))
        if rows >= 8 * warps
    ]
    forward += [{"rows": 64, "step": 64, "heads": heads, "warps": 4, "stages": 2} for heads in (2, 4)]
    one_tile = [
        {"rows": rows, "heads": heads, "warps": warps, "stages": 1}
        for rows, heads, warps in ((64, 1, 4), (64, 2, 4), (64, 1, 8), (128, 1, 8))
    ]
    blocks = [
        {"rows": rows, "step": step, "warps": warps, "stages": stages}
        for rows, step, warps, stages in product((32, 64, 128), (32, 64), (4, 8), (1, 2))
        if rows >= 8 * warps
    ]
    return {
        "attention_forward": forward,
        "attention_backward_one_tile": one_tile,
        "attention_backward_kv": blocks,
        "attention_backward_q": blocks,
    }


SPACE: dict[str, list[dict[str, int]]] = {
    "gather_patches": [
        {"elements": size, "warps": warps} for size, warps in product((1024, 2048, 4096, 8192), (2, 4, 8))
    ],
    "embed_tokens": [{"elements": size, "warps": warps} for size, warps in product((1024, 2048, 4096, 8192), (4, 8))],
    "unshuffle_tokens": [
        {"elements": size, "warps": warps} for size, warps in product((1024, 2048, 4096, 8192), (4, 8))
    ],
    "unshuffle_tokens_backward": [
        {"rows": rows, "columns": columns, "warps": 4} for rows, columns in product((8, 16, 32), (64, 128, 256))
    ],
    "reconstruction_loss": [
        {"elements": size, "warps": warps} for size, warps in product((1024, 2048, 4096), (2, 4, 8))
    ],
    **_attention_space(),
}


@dataclass(frozen=True)
class Case:
    """One kernel at a shape that matters. `tile` names its tuning space; `run` takes the device of the tensors."""

    name: str
    kernel: str
    tile: str
    run: Callable[[str], object]


def _pixels(device: str, dtype: torch.dtype, batch: int = 8) -> torch.Tensor:
    shape = (batch, 224, 224, 3) if dtype == torch.uint8 else (batch, 3, 224, 224)
    return torch.empty(shape, dtype=dtype, device=device)


def _ids(device: str, kept: int, batch: int = 8) -> torch.Tensor:
    return torch.empty((batch, kept), dtype=torch.int64, device=device)


def _case(name: str, kernel: str, tile: str, run: Callable[[str], object], dtype: torch.dtype = BF16) -> Case:
    """The case of a dtype: only bf16 is tuned, and its name goes without saying."""
    return Case(name, kernel, tile, run) if dtype == BF16 else Case(f"{name} {SHORT[dtype]}", kernel, "", run)


def _gather(
    name: str, patch: int, kept: int | None, source: torch.dtype = torch.uint8, dtype: torch.dtype = BF16
) -> Case:
    def run(device: str) -> object:
        ids = None if kept is None else _ids(device, kept)
        return gather.launch_gather(_pixels(device, source), ids, patch, [1.0] * 3, [0.0] * 3, dtype)

    return _case(f"gather_patches {name}", "gather_kernel", "gather_patches", run, dtype)


def _embed(width: int, kept: int | None, dtype: torch.dtype = BF16) -> Case:
    def run(device: str) -> object:
        x = torch.empty((8, kept or 196, width), dtype=dtype, device=device)
        cls = torch.empty((1, 1, width), device=device)
        ids = None if kept is None else _ids(device, kept)
        return embed.launch_embed(x, cls, torch.empty((1, 197, width), device=device), ids)

    name = f"embed_tokens D={width} {'all' if kept is None else 'visible'}"
    return _case(name, "embed_kernel", "embed_tokens", run, dtype)


def _unshuffle(dtype: torch.dtype = BF16) -> list[Case]:
    def forward(device: str) -> object:
        x = torch.empty((8, 50, 512), dtype=dtype, device=device)
        mask, pos = torch.empty((1, 1, 512), device=device), torch.empty((1, 197, 512), device=device)
        return unshuffle.launch_unshuffle(x, mask, pos, _ids(device, 196))

    def backward(device: str) -> object:
        grad = torch.empty((8, 197, 512), dtype=dtype, device=device)
        return unshuffle.launch_unshuffle_backward(grad, _ids(device, 196), 50)

    name = "unshuffle_tokens"
    return [
        _case(f"{name} D=512", "unshuffle_kernel", name, forward, dtype),
        _case(f"{name}_backward D=512", "unshuffle_backward_kernel", f"{name}_backward", backward, dtype),
    ]


def _loss(patch: int, norm_pix: bool, with_grad: bool, dtype: torch.dtype = BF16) -> Case:
    masked = (224 // patch) ** 2 * 3 // 4

    def run(device: str) -> object:
        pred = torch.empty((8, masked, 3 * patch**2), dtype=dtype, device=device)
        pixels, ids = _pixels(device, torch.uint8), _ids(device, masked)
        return loss.launch_loss(pred, pixels, ids, patch, [1.0] * 3, [0.0] * 3, norm_pix, with_grad)

    name = f"reconstruction_loss P={patch} {'norm' if norm_pix else 'raw'} {'grad' if with_grad else 'value'}"
    return _case(name, "loss_kernel", "reconstruction_loss", run, dtype)


def _loss_scale(dtype: torch.dtype = BF16) -> Case:
    def run(device: str) -> object:
        grad = torch.empty((8, 147, 768), dtype=dtype, device=device)
        loss.launch_scale(grad, torch.empty((), device=device), 1.0)
        return grad

    return _case("reconstruction_loss_scale", "scale_kernel", "", run, dtype)


def _forward(tokens: int, head_dim: int, save: bool, dtype: torch.dtype = BF16) -> Case:
    heads = (HEADS | WIDE)[head_dim]

    def run(device: str) -> object:
        qkv = torch.empty((8, tokens, 3 * heads * head_dim), dtype=dtype, device=device)
        return attention_launch.launch_forward(qkv, heads, save)

    name = f"attention_forward d={head_dim} N={tokens} {'save' if save else 'eval'}"
    return _case(name, "forward_kernel", "attention_forward" if head_dim in HEADS else "", run, dtype)


def _backward(tokens: int, head_dim: int, dtype: torch.dtype = BF16) -> list[Case]:
    heads = (HEADS | WIDE)[head_dim]

    def run(device: str) -> object:
        qkv = torch.empty((8, tokens, 3 * heads * head_dim), dtype=dtype, device=device)
        out = torch.empty((8, tokens, heads * head_dim), dtype=dtype, device=device)
        lse = torch.empty((8, heads, tokens), device=device)
        return attention_launch.launch_backward(out, qkv, out, lse, heads)

    found = []
    for part in ("delta", "one_tile", "kv", "q"):
        name = f"attention_backward_{part}"
        tile = "" if part == "delta" or head_dim in WIDE else name
        kernel = "delta_kernel" if part == "delta" else f"backward_{part}_kernel"
        found.append(_case(f"{name} d={head_dim} N={tokens}", kernel, tile, run, dtype))
    return found


def _pixels_and_tokens(dtype: torch.dtype) -> list[Case]:
    """The memory-bound kernels of one step of ViT-L."""
    return [
        _gather("u8 P=16 visible", 16, 49, dtype=dtype),
        _embed(1024, 49, dtype),
        *_unshuffle(dtype),
        _loss(16, True, True, dtype),
        _loss_scale(dtype),
    ]


def attention_cases(tokens: int, head_dim: int, dtype: torch.dtype = BF16) -> list[Case]:
    """Forward with and without saving, and whichever backward the table gives this length."""
    return [*(_forward(tokens, head_dim, save, dtype) for save in (True, False)), *_backward(tokens, head_dim, dtype)]


def cases() -> list[Case]:
    """Every kernel at every shape in bf16, and in fp16 and fp32 (attention: tiles of its own, exact products) at some.

    Which of the backward's kernels a length takes is the table's business; `resources` compiles each binary once.
    """
    found = [
        *_pixels_and_tokens(BF16),
        _gather("u8 P=16 all", 16, None),
        _gather("u8 P=14 visible", 14, 64),
        _gather("fp32 P=16 visible", 16, 49, torch.float32),
        *(_embed(width, 49) for width in (384, 768, 1280)),
        _embed(1024, None),
        _loss(16, True, False),
        _loss(16, False, True),
        _loss(14, True, True),
        *_pixels_and_tokens(torch.float16),
        *_pixels_and_tokens(torch.float32),
    ]
    for tokens, head_dim in product(TOKENS, HEADS):
        found += attention_cases(tokens, head_dim)
    for head_dim in WIDE:
        found += [*attention_cases(50, head_dim), *attention_cases(197, head_dim)]
    for head_dim in HEADS | WIDE:
        found += [*attention_cases(12, head_dim, torch.float32), *attention_cases(197, head_dim, torch.float32)]
    for head_dim in HEADS:
        found += [*attention_cases(50, head_dim, torch.float16), *attention_cases(197, head_dim, torch.float16)]
    return found

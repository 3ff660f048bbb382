"""The shapes that matter and the tiles that may be tried on them: what `bench` times and `resources` compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from lut_kernels import attention_launch, embed, gather, loss, unshuffle

# Student and full length for patch 16, the same for patch 14, 384 and 448 pixels for transfer. The first two are tuned.
TOKENS = (50, 197, 65, 257, 577, 1025)
HEADS = {32: 16, 64: 16, 80: 16}  # heads by head dim: decoder, ViT-S/B/L, ViT-H


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


def _gather(name: str, patch: int, kept: int | None, source: torch.dtype = torch.uint8) -> Case:
    def run(device: str) -> object:
        ids = None if kept is None else _ids(device, kept)
        return gather.launch_gather(_pixels(device, source), ids, patch, [1.0] * 3, [0.0] * 3, torch.bfloat16)

    return Case(f"gather_patches {name}", "gather_kernel", "gather_patches", run)


def _embed(width: int, kept: int | None) -> Case:
    def run(device: str) -> object:
        x = torch.empty((8, kept or 196, width), dtype=torch.bfloat16, device=device)
        cls = torch.empty((1, 1, width), device=device)
        ids = None if kept is None else _ids(device, kept)
        return embed.launch_embed(x, cls, torch.empty((1, 197, width), device=device), ids)

    return Case(f"embed_tokens D={width} {'all' if kept is None else 'visible'}", "embed_kernel", "embed_tokens", run)


def _unshuffle(device: str) -> object:
    x = torch.empty((8, 50, 512), dtype=torch.bfloat16, device=device)
    mask, pos = torch.empty((1, 1, 512), device=device), torch.empty((1, 197, 512), device=device)
    return unshuffle.launch_unshuffle(x, mask, pos, _ids(device, 196))


def _unshuffle_backward(device: str) -> object:
    grad = torch.empty((8, 197, 512), dtype=torch.bfloat16, device=device)
    return unshuffle.launch_unshuffle_backward(grad, _ids(device, 196), 50)


def _loss(patch: int, norm_pix: bool, with_grad: bool) -> Case:
    masked = (224 // patch) ** 2 * 3 // 4

    def run(device: str) -> object:
        pred = torch.empty((8, masked, 3 * patch**2), dtype=torch.bfloat16, device=device)
        pixels, ids = _pixels(device, torch.uint8), _ids(device, masked)
        return loss.launch_loss(pred, pixels, ids, patch, [1.0] * 3, [0.0] * 3, norm_pix, with_grad)

    name = f"reconstruction_loss P={patch} {'norm' if norm_pix else 'raw'} {'grad' if with_grad else 'value'}"
    return Case(name, "loss_kernel", "reconstruction_loss", run)


def _loss_scale(device: str) -> object:
    grad = torch.empty((8, 147, 768), dtype=torch.bfloat16, device=device)
    loss.launch_scale(grad, torch.empty((), device=device), 1.0)
    return grad


def _forward(tokens: int, head_dim: int, save: bool, dtype: torch.dtype = torch.bfloat16) -> Case:
    def run(device: str) -> object:
        qkv = torch.empty((8, tokens, 3 * HEADS[head_dim] * head_dim), dtype=dtype, device=device)
        return attention_launch.launch_forward(qkv, HEADS[head_dim], save)

    name = f"attention_forward d={head_dim} N={tokens} {'save' if save else 'eval'}"
    if dtype == torch.float32:
        return Case(f"{name} fp32", "forward_kernel", "", run)
    return Case(name, "forward_kernel", "attention_forward", run)


def _backward(tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    def run(device: str) -> object:
        heads = HEADS[head_dim]
        qkv = torch.empty((8, tokens, 3 * heads * head_dim), dtype=dtype, device=device)
        out = torch.empty((8, tokens, heads * head_dim), dtype=dtype, device=device)
        lse = torch.empty((8, heads, tokens), device=device)
        return attention_launch.launch_backward(out, qkv, out, lse, heads)

    found = []
    for part in ("delta", "one_tile", "kv", "q"):
        name, where = f"attention_backward_{part}", f"d={head_dim} N={tokens}"
        kernel = "delta_kernel" if part == "delta" else f"backward_{part}_kernel"
        if dtype == torch.float32:
            found.append(Case(f"{name} {where} fp32", kernel, "", run))
        else:
            found.append(Case(f"{name} {where}", kernel, "" if part == "delta" else name, run))
    return found


def cases() -> list[Case]:
    """Every kernel at every shape: bf16, and attention in fp32 too, whose tiles are its own (exact, and never tuned).

    Which of the backward's kernels a length takes is the table's business.
    """
    found = [
        _gather("u8 P=16 visible", 16, 49),
        _gather("u8 P=16 all", 16, None),
        _gather("u8 P=14 visible", 14, 64),
        _gather("fp32 P=16 visible", 16, 49, torch.float32),
        *(_embed(width, 49) for width in (384, 768, 1024, 1280)),
        _embed(1024, None),
        Case("unshuffle_tokens D=512", "unshuffle_kernel", "unshuffle_tokens", _unshuffle),
        Case(
            "unshuffle_tokens_backward D=512",
            "unshuffle_backward_kernel",
            "unshuffle_tokens_backward",
            _unshuffle_backward,
        ),
        _loss(16, True, True),
        _loss(16, True, False),
        _loss(16, False, True),
        _loss(14, True, True),
        Case("reconstruction_loss_scale", "scale_kernel", "", _loss_scale),
    ]
    for tokens, head_dim in product(TOKENS, HEADS):
        found += [_forward(tokens, head_dim, save) for save in (True, False)]
        found += _backward(tokens, head_dim)
    for head_dim in HEADS:
        found.append(_forward(197, head_dim, True, torch.float32))
        found += [*_backward(12, head_dim, torch.float32), *_backward(197, head_dim, torch.float32)]
    return found

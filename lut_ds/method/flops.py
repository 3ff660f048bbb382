"""FLOPs of the published method, for MFU: the same count whatever an implementation happens to execute.

A multiply-add counts 2; a backward pass counts twice its forward; attention counts its two matrix products; as published,
every patch is embedded and predicted, although this implementation does so only for those needed. Element-wise work is
not counted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the FLOPs of a LUT or MAE step."""

    patches: int
    kept: int
    patch_dim: int
    width: int
    depth: int
    mlp_ratio: float
    decoder_width: int
    decoder_depth: int
    views: int
    head_hidden: int
    projector_depth: int
    predictor_depth: int


def blocks_flops(tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    """Forward FLOPs of transformer blocks on one sequence of `tokens`."""
    linear = 2 * tokens * width * width * (4 + 2 * mlp_ratio)
    attention = 2 * 2 * tokens * tokens * width
    return depth * (linear + attention)


def head_flops(width: int, hidden: int, depth: int) -> float:
    """Forward FLOPs of one MLP head on one feature."""
    if depth == 0:
        return 0.0
    if depth == 1:
        return 2.0 * width * width
    return 2.0 * (2 * width * hidden + (depth - 2) * hidden * hidden)


def forward_flops(shape: Shape) -> dict[str, float]:
    """Forward FLOPs an image of each part: student encoder, decoder, heads, and the teacher (encoder and projector)."""
    s = shape

    def encoder(seen: int) -> float:
        return 2 * s.patches * s.patch_dim * s.width + blocks_flops(1 + seen, s.width, s.depth, s.mlp_ratio)

    decoder = 2.0 * (1 + s.kept) * s.width * s.decoder_width + 2 * (1 + s.patches) * s.decoder_width * s.patch_dim
    decoder += blocks_flops(1 + s.patches, s.decoder_width, s.decoder_depth, s.mlp_ratio)
    projector = head_flops(s.width, s.head_hidden, s.projector_depth)
    two_views = s.views == 2
    return {
        "student": s.views * encoder(s.kept),
        "decoder": decoder,
        "heads": s.views * (projector + head_flops(s.width, s.head_hidden, s.predictor_depth)) if two_views else 0.0,
        "teacher": s.views * (encoder(s.patches) + projector) if two_views else 0.0,
    }


def step_flops(shape: Shape) -> dict[str, float]:
    """FLOPs an image of a training step by part, and `total`: student, decoder and heads three times, the teacher once."""
    parts = {name: flops * (1 if name == "teacher" else 3) for name, flops in forward_flops(shape).items()}
    return {**parts, "total": sum(parts.values())}

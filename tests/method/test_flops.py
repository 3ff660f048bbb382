"""FLOPs against torch's own count of what runs, and against the published totals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lut_ds.method.flops import Shape, blocks_flops, forward_flops, step_flops
from lut_ds.method.lut import encode_views
from tests.method.builders import lut_from, small, teacher_from


def shape_of(config: dict[str, Any], views: int = 2) -> Shape:
    """Sizes of a configuration in the references' words."""
    patches = (config["img_size"] // config["patch_size"]) ** 2
    return Shape(
        patches=patches,
        kept=patches // 4,
        patch_dim=config["patch_size"] ** 2 * 3,
        width=config["embed_dim"],
        depth=config["depth"],
        mlp_ratio=config["mlp_ratio"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        views=views,
        head_hidden=config["head_mlp_dim"],
        projector_depth=config["depth_head"],
        predictor_depth=config["depth_pred"],
    )


def attention_flops(tokens: int, width: int, depth: int) -> int:
    """The two matrix products of attention, which torch's counter does not see inside a custom operator."""
    return depth * 4 * tokens * tokens * width


def counted(function: Callable[[], object]) -> int:
    """FLOPs of matrix products outside attention, as torch counts them; forward only."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    names = ("mm", "addmm", "convolution")
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in names)


@pytest.mark.parametrize("depth_head,depth_pred", [(2, 2), (0, 1), (3, 0)])
def test_parts_equal_what_torch_counts(depth_head: int, depth_pred: int) -> None:
    config = small(depth_head=depth_head, depth_pred=depth_pred)
    student, teacher = lut_from(config), teacher_from(config)
    views, batch = [torch.randn(3, 3, 32, 32) for _ in range(2)], 3
    found = forward_flops(shape_of(config))
    attention = 2 * attention_flops(17, 32, config["depth"])
    assert counted(lambda: teacher(views)) + batch * attention == batch * found["teacher"]
    masking = student.mask(torch.rand(batch, 16))
    latent = encode_views(student.encoder, views, masking.ids_keep).detach()
    assert counted(lambda: student.predict(latent)) == batch * found["heads"]
    decoder = counted(lambda: student.decoder(latent[:batch], masking.ids_restore))
    attention = attention_flops(17, 24, config["decoder_depth"])
    skipped_cls_row = 2 * 24 * 192  # published decoders predict for the cls token too
    assert decoder + batch * (attention + skipped_cls_row) == batch * found["decoder"]
    encoder = counted(lambda: encode_views(student.encoder, views, masking.ids_keep))
    attention = 2 * attention_flops(5, 32, config["depth"])
    skipped_embedding = 2 * 2 * 12 * 192 * 32  # published encoders embed hidden patches too
    assert encoder + batch * (attention + skipped_embedding) == batch * found["student"]


PUBLISHED = [
    # width, depth, patch, grid, GFLOP an image of MAE and of LUT, the teacher's share of LUT's
    (768, 12, 16, 14, 59, 156, 0.45),
    (1024, 24, 16, 14, 125, 463, 0.53),
    (1280, 32, 14, 16, 291, 1209, 0.55),
]


@pytest.mark.parametrize("width,depth,patch,grid,mae,lut,share", PUBLISHED, ids=["vit_b", "vit_l", "vit_h"])
def test_totals_are_the_published_ones(
    width: int, depth: int, patch: int, grid: int, mae: float, lut: float, share: float
) -> None:
    patches = grid * grid
    for views, expected in ((1, mae), (2, lut)):
        flops = step_flops(Shape(patches, patches // 4, patch**2 * 3, width, depth, 4.0, 512, 8, views, 4096, 2, 2))
        assert flops["total"] / 1e9 == pytest.approx(expected, abs=0.5)
        assert flops["total"] == sum(value for name, value in flops.items() if name != "total")
        assert flops["teacher"] / flops["total"] == pytest.approx(share if views == 2 else 0.0, abs=0.005)


def test_blocks_without_attention_are_twelve_squares_of_the_width() -> None:
    assert blocks_flops(1, 8, 1, 4.0) == 2 * 12 * 8 * 8 + 4 * 8

"""The activations that a plan counts are those that autograd keeps, on a CPU."""

from typing import Any

import pytest

from lut_ds.config import Recipe, load_recipe, parse_recipe
from lut_ds.engine.activations import activations, with_checkpointing
from tests.engine.kept import kept_an_image
from tests.engine.tiny import tiny_tree

VARIANTS: dict[str, dict[str, Any]] = {
    "lut": {},
    "mae": {"name": "mae"},
    "degraded": {"name": "mae", "degradation": "distorted", "mask_ratio": 0.0},
    "deeper heads": {"head_hidden": 24, "head_act": "relu", "projector_depth": 3, "predictor_depth": 1},
    "layer norm": {"head_hidden": 24, "head_norm": "ln"},
    "no norm": {"head_hidden": 24, "head_norm": "none"},
}


def tiny(variant: str, compute: str) -> Recipe:
    """A tiny recipe with that method."""
    tree = tiny_tree()
    tree["method"] = VARIANTS[variant] or tree["method"]
    tree["precision"]["compute"] = compute
    return parse_recipe(tree, variant)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny(variant: str, compute: str, checkpointing: bool) -> None:
    recipe = with_checkpointing(tiny(variant, compute), checkpointing)
    planned = activations(recipe, 1, 1, "cpu").kept
    assert planned == pytest.approx(kept_an_image(recipe, 4), rel=0.1 if variant == "degraded" else 0.02)


SMALL = [(name, compute, again) for name in ("lut", "mae") for compute in ("fp32", "bf16") for again in (False, True)]


@pytest.mark.parametrize(
    "name, compute, checkpointing",
    [pytest.param(*case, marks=[] if case == ("lut", "bf16", False) else pytest.mark.slow) for case in SMALL],
)
def test_vit_small(name: str, compute: str, checkpointing: bool) -> None:
    recipe = load_recipe("lut_vits16", [f"method.name={name}", f"precision.compute={compute}"])
    recipe = with_checkpointing(recipe, checkpointing)
    assert activations(recipe, 1, 1, "cpu").kept == pytest.approx(kept_an_image(recipe), rel=0.02)


def test_a_gpu_keeps_no_softmax_and_one_copy_of_the_prediction() -> None:
    recipe = load_recipe("lut_vitl16")
    on_gpu, on_cpu = (activations(recipe, 8, 8, device) for device in ("cuda", "cpu"))
    m = recipe.model
    softmax = m.depth * m.heads * 2 * 50**2 * 2 + m.decoder_depth * m.decoder_heads * 197**2 * 2
    assert on_cpu.kept - on_gpu.kept == pytest.approx(8 * softmax, rel=0.1)
    halved = activations(recipe, 4, 8)
    assert on_gpu.peak == pytest.approx(2 * halved.peak)
    # 34 bytes of a bf16 token and width in a block without dropout's masks (Korthikanti et al., 2022): 32.
    blocks = 32 * (100 * m.width * m.depth + 197 * m.decoder_width * m.decoder_depth)
    assert on_gpu.kept / 8 == pytest.approx(blocks, rel=0.05)

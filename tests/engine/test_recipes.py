"""Every shipped recipe, trained for two steps by the real command with nothing changed but its size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lut_ds.config import Recipe, load_recipe, recipe_folder, shipped_recipes
from lut_ds.engine.build import flops_shape
from lut_ds.engine.plan import describe_plan, plan
from lut_ds.method.flops import Shape, step_flops
from tests.engine.launching import PATIENCE

SMALL = (
    "model.image_size=28",
    "model.patch_size=7",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "method.head_hidden=32",
    "optim.warmup_epochs=1",
    "train.epochs=4",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.compile=false",
    "train.max_steps=2",
    "precision.compute=fp32",
    "precision.teacher=fp32",
    "data.threads=1",
    "run.log_every=1",
)


def test_every_recipe_trains_two_steps(digits: Path, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("recipes_worker.py")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "SLURM_", "MASTER_"))}
    done = subprocess.run(
        [sys.executable, worker, digits, tmp_path, *SMALL],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((tmp_path / "codes.json").read_text())
    failed = {name: (tmp_path / f"{name}.err").read_text()[-1500:] for name, code in codes.items() if code}
    assert not failed
    assert sorted(codes) == shipped_recipes()
    for name in codes:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        first, second = (json.loads(line) for line in lines)
        assert (first["applied"], second["applied"]) == (1, 1), name
        assert 0 < second["grad_norm"] < 100, name
        assert 0.1 < second["mae"] < 10, name
        assert ("ema_decay" in second) == (load_recipe(name).method.name == "lut"), name
        assert json.loads((tmp_path / f"{name}.out").read_text())["step"] == 2, name


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_head_of_a_recipe_says_command_and_what_to_expect(name: str) -> None:
    head = [line for line in (recipe_folder() / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert "Command:" in text
    assert "Expect" in text
    assert name in text


def test_mae_recipes_are_the_published_ones() -> None:
    shapes = {"mae_vitb16": (16, 768, 12, 12), "mae_vitl16": (16, 1024, 24, 16), "mae_vith14": (14, 1280, 32, 16)}
    for name, shape in shapes.items():
        r = load_recipe(name)
        assert (r.model.patch_size, r.model.width, r.model.depth, r.model.heads) == shape
        assert (r.model.decoder_width, r.model.decoder_depth, r.model.decoder_heads) == (512, 8, 16)
        assert (r.method.name, r.method.mask_ratio, r.method.norm_pix, r.data.crop_scale) == (
            "mae",
            0.75,
            True,
            (0.2, 1),
        )
        assert (r.optim.blr, r.optim.lr_rule, r.optim.warmup_epochs, r.optim.min_lr) == (1.5e-4, "linear", 40, 0)
        assert (r.train.epochs, r.train.global_batch, r.optim.weight_decay) == (1600, 4096, 0.05)


def shape_of(recipe: Recipe, kept: int, views: int) -> Shape:
    """The same sizes by hand."""
    m, method = recipe.model, recipe.method
    return Shape(
        196, kept, 768, 768, 12, 4.0, m.decoder_width, m.decoder_depth, views, method.head_hidden, 2, 2
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, overrides, kept, views",
    [
        ("beyond_zoomed_in", [], 196, 1),
        ("beyond_zoomed_in_mask", [], 49, 1),
        ("beyond_zoomed_in_lut", [], 49, 2),
        ("beyond_distorted", ["method.name=lut"], 196, 2),
    ],
)
def test_the_plan_counts_what_a_degradation_leaves_visible(
    name: str, overrides: list[str], kept: int, views: int, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = load_recipe(name, [f"data.path={digits}", *overrides])
    assert flops_shape(recipe) == shape_of(recipe, kept, views)
    planned = plan(recipe, 8)
    assert planned["tokens"]["student_per_view"] == 1 + kept
    total = step_flops(shape_of(recipe, kept, views))["total"]
    assert planned["gflop_per_image"]["total"] == pytest.approx(total / 1e9)
    assert f"student {views} x {1 + kept}" in describe_plan(name, planned)

"""The contact sheet shows the views and masks of training, not something like them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lut_ds.analysis.contact_sheet import describe_view, prediction_target, show_views, visible_patches
from lut_ds.config import Recipe, load_recipe
from lut_ds.data.loader import PretrainLoader
from lut_ds.data.sources import open_source
from lut_ds.data.views import LUT_VIEW2, view_params
from lut_ds.engine.reading import view_specs
from lut_ds.method.masking import disjoint_masks

SIZE, SIDE = 32, 8


@pytest.fixture
def recipe(digits: Path) -> Recipe:
    return load_recipe("demo", [f"data.path={digits}", f"model.image_size={SIZE}", f"model.patch_size={SIDE}"])


def test_the_pictures_are_those_of_a_training_step(recipe: Recipe, tmp_path: Path) -> None:
    result = show_views(recipe, 3, tmp_path / "sheet.png")
    source = open_source(str(recipe.data.path))
    options = {"micro_batch": 8, "rank": 0, "world_size": 1, "device": torch.device("cpu"), "threads": 1}
    with PretrainLoader(
        source, view_specs(recipe), image_size=SIZE, num_patches=16, seed=recipe.run.seed, global_batch=16, **options
    ) as loader:
        batch = next(loader.batches(0, 1))
    assert result["samples"] == [source.name(sample) for sample in batch.samples[:3].tolist()]
    masking = disjoint_masks(batch.noise[:3], recipe.method.mask_ratio, 2)
    views = [view[:3] for view in batch.views]
    expected = [
        views[0],
        visible_patches(views[0], masking, 0, SIDE),
        views[1],
        visible_patches(views[1], masking, 1, SIDE),
    ]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tile, row, column = 192, 192 + 3 * 18 + 8, 192 + 8  # the smallest multiple of 32 that is large enough to look at
    top, left = 20 + (2 + 2) * 18 + 18 + 4, 20
    for k in range(3):
        for c, pictures in enumerate(expected, 1):
            y, x = top + k * row, left + c * column
            shown = sheet[y : y + tile, x : x + tile][:: tile // SIZE, :: tile // SIZE]
            assert np.array_equal(shown, pictures[k].numpy())


def test_visible_and_predicted_patches(recipe: Recipe) -> None:
    pixels = torch.randint(0, 120, (2, SIZE, SIZE, 3), dtype=torch.uint8)  # neither gray nor blank
    masking = disjoint_masks(torch.rand(2, 16), 0.75, 2)
    seen = [visible_patches(pixels, masking, view, SIDE) == pixels for view in (0, 1)]
    counts = [int(mask.all(dim=3).sum()) for mask in seen]
    assert counts == [2 * 4 * SIDE * SIDE] * 2  # 4 of 16 patches of each
    assert not (seen[0] & seen[1]).any()
    raw = prediction_target(pixels, masking, SIDE, normalised=False)
    assert torch.equal((raw == pixels).all(dim=3), ~seen[0].all(dim=3))  # all that view 1's encoder does not see
    normalised = prediction_target(pixels, masking, SIDE, normalised=True)
    patch = normalised[~seen[0].all(dim=3)].float()
    assert abs(float(patch.mean()) - 127.5) < 2
    assert abs(float(patch.std()) - 63.75) < 3


def test_views_are_described(recipe: Recipe) -> None:
    samples = np.arange(200)
    params = view_params(LUT_VIEW2, SIZE, 0, 0, samples, 1, np.full((200, 2), 40, np.int32))
    words = [describe_view(params.row(i), SIZE) for i in range(200)]
    assert sum("flipped" in text.split(", ") for text in words) == params.flip.sum()
    assert sum(text.startswith("jitter") for text in words) == params.jitter.sum()
    for k, word in enumerate(("gray", "solarized", "blur")):
        assert sum(word in text for text in words) == (params.choice == k).sum()

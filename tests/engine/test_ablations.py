"""Recipe keys that exist for comparisons: what the engine makes of them."""

from typing import Any

import pytest

from lut_ds.config import Recipe, parse_recipe
from lut_ds.engine.reading import view_specs
from lut_ds.engine.train import Schedule
from lut_ds.errors import UserError
from tests.engine.tiny import tiny_tree


def recipe(**changes: dict[str, Any]) -> Recipe:
    tree = tiny_tree()
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_recipe(tree, "test")


@pytest.mark.parametrize("start, end", [(0.0, 0.0), (0.9, 1.0), (0.5, 0.8)])
def test_the_average_ends_where_the_recipe_says(start: float, end: float) -> None:
    schedule = Schedule(recipe(method={"ema_decay": start, "ema_decay_end": end}), steps_per_epoch=5)
    decays = [schedule.ema_decay(step) for step in range(21)]
    assert decays[0] == pytest.approx(start)
    assert decays[20] == pytest.approx(end)
    assert decays == sorted(decays)
    assert Schedule(recipe(method={"ema_decay": 0.9}), 5).ema_decay(20) == pytest.approx(1.0)


@pytest.mark.parametrize("where, changed", [(True, [False, True]), (False, [False, False]), ("both", [True, True])])
def test_which_views_change_colour(where: bool | str, changed: list[bool]) -> None:
    assert [spec.photometric is not None for spec in view_specs(recipe(data={"photometric": where}))] == changed
    assert [spec.kind for spec in view_specs(recipe(data={"photometric": where}))] == ["resize_crop"] * 2


@pytest.mark.parametrize("name, own", [("mae", "random_resized_crop"), ("lut", "resize_crop")])
def test_views_are_cut_as_the_method_does_or_as_the_recipe_says(name: str, own: str) -> None:
    for crop in ("method", "resize_crop", "random_resized_crop"):
        specs = view_specs(recipe(method={"name": name}, data={"crop": crop, "crop_scale": [0.5, 0.75], "crop_pad": 2}))
        assert {spec.kind for spec in specs} == {own if crop == "method" else crop}
        assert {(spec.scale, spec.pad) for spec in specs} == {((0.5, 0.75), 2)}
        assert len(specs) == (2 if name == "lut" else 1)
    with pytest.raises(UserError, match=r"data.crop_pad 16 is not below model.image_size 16"):
        recipe(method={"name": name}, data={"crop": "resize_crop", "crop_pad": 16})
    recipe(method={"name": name}, data={"crop": "random_resized_crop", "crop_pad": 16})

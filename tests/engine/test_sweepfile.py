"""Sweep files: which runs they name, and the one line that says what is wrong with one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.config import load_recipe
from lut_ds.engine.build import flops_shape
from lut_ds.engine.sweepfile import read_sweep
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops
from tests.engine.launching import ROOT
from tests.engine.tiny import tiny_tree


def write(folder: Path, **tree: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny_tree()))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "base.yaml", **tree}, sort_keys=False))
    return path


def test_runs_seeds_and_overrides(tmp_path: Path) -> None:
    runs = {"mae": {"method.name": "mae", "seeds": [7]}, "lut": None}
    path = write(tmp_path, overrides={"train.epochs": 9, "optim.blr": 0.5}, seeds=[0, 1], runs=runs)
    found = read_sweep(path, tmp_path / "out", ["optim.blr=1e-3"])
    assert [(e.name, e.seed) for e in found.entries] == [("mae", 7), ("lut", 0), ("lut", 1)]
    assert [e.recipe.method.name for e in found.entries] == ["mae", "lut", "lut"]
    assert {(e.recipe.train.epochs, e.recipe.optim.blr) for e in found.entries} == {(9, 1e-3)}
    assert found.entries[2].folder == tmp_path / "out" / "runs" / "lut" / "seed_1"
    assert (found.evaluate, found.pixels, found.names) == (("knn", "probe"), False, ["mae", "lut"])


def test_a_grid_is_every_combination_of_every_run(tmp_path: Path) -> None:
    grid = {"method.w_bc": [0, 0.1], "model.mlp_ratio": [2.0], "data.crop_scale": [[0.2, 1.0]]}
    found = read_sweep(write(tmp_path, grid=grid), tmp_path)
    names = ["w_bc=0_mlp_ratio=2.0_crop_scale=0.2-1.0", "w_bc=0.1_mlp_ratio=2.0_crop_scale=0.2-1.0"]
    assert [e.name for e in found.entries] == names
    assert [e.recipe.method.w_bc for e in found.entries] == [0, 0.1]
    both = read_sweep(write(tmp_path, runs={"a": {}, "b": {"train.epochs": 8}}, grid={"method.w_bc": [0, 1]}), tmp_path)
    assert [e.name for e in both.entries] == ["a_w_bc=0", "a_w_bc=1", "b_w_bc=0", "b_w_bc=1"]
    assert [e.recipe.train.epochs for e in both.entries] == [4, 4, 8, 8]


def test_the_words_start_the_same_run_alone(tmp_path: Path) -> None:
    runs = {"a": {"run.time_limit": "01:00:00", "data.path": "2024 #1", "method.degradation_params": {}}, "b": {}}
    for entry in read_sweep(write(tmp_path, runs=runs), tmp_path / "with blank").entries:
        assert load_recipe(entry.words[0], entry.words[1:]) == entry.recipe
        assert Path(entry.words[0]).is_absolute()


@pytest.mark.parametrize(
    "tree, why",
    [
        ({"runs": {"a": {}}, "run": {}}, "run: expected one of recipe, overrides"),
        ({}, "runs: expected runs by name, or a grid, found neither"),
        ({"recipe": 3, "runs": {"a": {}}}, "recipe: expected a recipe's name or file, found 3"),
        ({"recipe": "lut_vits61", "runs": {"a": {}}}, "did you mean lut_vits16"),
        (
            {"runs": {"a": {"optim.blrr": 1}}},
            "runs.a: recipe base.yaml: unknown key optim.blrr; did you mean optim.blr",
        ),
        ({"runs": {"a": {"blr": 1}}}, "runs.a: expected section.key, such as optim.blr, found 'blr'"),
        ({"runs": {"a": {"run.seed": 1}}}, "runs.a: run.seed: a sweep sets it"),
        ({"overrides": {"run.dir": "x"}, "runs": {"a": {}}}, "overrides: run.dir: a sweep sets it"),
        ({"runs": {"a/b": {}}}, "runs.a/b: expected a name of letters"),
        ({"runs": ["a"]}, "runs: expected a mapping of names, found \\['a'\\]"),
        ({"runs": {1: {}}}, "runs: expected names that are text, found 1; put it in quotes"),
        (
            {"grid": {f"optim.k{i}": [*range(10)] for i in range(9)}},
            "grid: expected at most 10000 runs, found 1000000000",
        ),
        ({"runs": {"a": 3}}, "runs.a: expected a mapping of names, found 3"),
        ({"runs": {"a": {}}, "seeds": 3}, "seeds: expected a list, found 3"),
        ({"runs": {"a": {"seeds": [1, 1]}}}, "runs.a.seeds: expected each seed once"),
        ({"runs": {"a": {}}, "seeds": [-1]}, "seeds: expected whole numbers from 0"),
        ({"grid": {"optim.blr": 0.1}}, "grid.optim.blr: expected a list, found 0.1"),
        ({"grid": {"optim.blr": [0.1, 0.1]}}, "'blr=0.1' names two runs"),
        ({"grid": {"optim.blr": [1]}, "runs": {"a": {"optim.blr": 2}}}, "runs.a: optim.blr is in the grid too"),
        ({"grid": {"data.path": ["x" * 300]}}, "a name of at most 200 letters, found 305: path=xxx"),
        ({"runs": {"a": {}}, "evaluate": ["kmn"]}, "evaluate: expected some of knn, .* found 'kmn'"),
        ({"runs": {"a": {}}, "pixels": 1}, "pixels: expected true or false, found 1"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(tmp_path: Path, tree: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        read_sweep(write(tmp_path, **tree), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "sweep" in str(caught.value)


def test_no_yaml_and_words_that_a_sweep_sets(tmp_path: Path) -> None:
    path = write(tmp_path, runs={"a": {}})
    with pytest.raises(UserError, match=r"run.dir: .* --out"):
        read_sweep(path, tmp_path, ["run.dir=x"])
    path.write_text("runs: {a: {}, a: {}}")
    with pytest.raises(UserError, match="key a is given twice"):
        read_sweep(path, tmp_path)
    with pytest.raises(UserError, match="not readable"):
        read_sweep(tmp_path / "none.yaml", tmp_path)


@pytest.mark.parametrize("name", ["evidence", "gpu"])
def test_the_sweeps_of_the_benchmarks(name: str, tmp_path: Path) -> None:
    found = read_sweep(ROOT / "benchmarks" / "evidence" / f"{name}.yaml", tmp_path, ["data.path=shapes"])
    assert {"random", "mae", "mae_equal_compute", "lut_w0", "lut_w0.25", "lut_no_ema"} <= set(found.names)
    by_name = {entry.name: entry.recipe for entry in found.entries}
    lut, mae, longer = (by_name[n] for n in ("lut_w0.25", "mae", "mae_equal_compute"))
    flops = [step_flops(flops_shape(r))["total"] * r.train.epochs for r in (lut, mae, longer)]
    assert flops[2] == pytest.approx(flops[0], rel=0.03)  # equal compute
    assert flops[0] > 2.5 * flops[1]
    assert lut.optim == mae.optim


def test_the_second_look_at_the_target(tmp_path: Path) -> None:
    found = read_sweep(ROOT / "benchmarks" / "evidence" / "target.yaml", tmp_path)
    assert len(found.entries) == 3 * len(found.names)

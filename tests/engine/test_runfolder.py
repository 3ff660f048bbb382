"""A run folder belongs to one recipe, and to one process at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lut_ds.config import Recipe, parse_recipe
from lut_ds.engine.runfolder import open_run_folder
from lut_ds.errors import UserError
from tests.engine.tiny import tiny_tree


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(tiny_tree(), "tiny")


def test_one_process_at_a_time(tmp_path: Path, recipe: Recipe) -> None:
    with open_run_folder(tmp_path / "run", recipe), pytest.raises(UserError, match="in use by process"):
        open_run_folder(tmp_path / "run", recipe)
    open_run_folder(tmp_path / "run", recipe).close()


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path, recipe: Recipe) -> None:
    code = (
        "import sys, pathlib; from lut_ds.config import parse_recipe; from lut_ds.engine.runfolder import open_run_folder\n"
        "from tests.engine.tiny import tiny_tree\n"
        "lock = open_run_folder(pathlib.Path(sys.argv[1]), parse_recipe(tiny_tree(), 'tiny')); print('open', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
        open_run_folder(tmp_path / "run", recipe)
    process.kill()
    process.communicate()
    open_run_folder(tmp_path / "run", recipe).close()


def test_the_folder_holds_the_recipe_and_every_start(tmp_path: Path, recipe: Recipe) -> None:
    for _ in range(2):
        open_run_folder(tmp_path / "run", recipe).close()
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert parse_recipe(stored, "stored") == recipe
    starts = [json.loads(line) for line in (tmp_path / "run" / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert all(start["versions"]["deepspeed"] for start in starts)


def test_what_is_learned_cannot_change_and_the_rest_can(tmp_path: Path, recipe: Recipe) -> None:
    open_run_folder(tmp_path / "run", recipe).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    tree = tiny_tree(micro_batch=4, max_steps=3)
    tree["run"] = {"log_every": 3}
    open_run_folder(tmp_path / "run", parse_recipe(tree, "other")).close()
    tree["optim"]["weight_decay"] = 0.1
    with pytest.raises(UserError, match=r"optim.weight_decay is 0.05 there and 0.1 here"):
        open_run_folder(tmp_path / "run", parse_recipe(tree, "other"))


def test_a_key_that_is_younger_than_the_run_had_its_default(tmp_path: Path, recipe: Recipe) -> None:
    open_run_folder(tmp_path / "run", recipe).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    stored = tmp_path / "run" / "recipe.yaml"
    tree = yaml.safe_load(stored.read_text())
    del tree["data"]["shuffle"]
    stored.write_text(yaml.safe_dump(tree))
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"shuffle": "blocks"})})
    with pytest.raises(UserError, match=r"data.shuffle is 'global' there and 'blocks' here"):
        open_run_folder(tmp_path / "run", other)
    open_run_folder(tmp_path / "run", recipe).close()


def test_a_degradation_of_ones_own_may_have_moved(tmp_path: Path) -> None:
    """A run that began beside the file goes on from another folder; another class of it is another recipe."""

    def degraded_by(name: str) -> Recipe:
        return parse_recipe({**tiny_tree(), "method": {"degradation": name}}, "tiny")

    open_run_folder(tmp_path / "run", degraded_by("own.py:Own")).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    open_run_folder(tmp_path / "run", degraded_by("/elsewhere/own.py:Own")).close()
    open_run_folder(tmp_path / "run", degraded_by("own.py:Own")).close()
    for other in ("/elsewhere/own.py:Other", "other.py:Own", "distorted"):
        with pytest.raises(UserError, match=r"method.degradation is 'own.py:Own' there"):
            open_run_folder(tmp_path / "run", degraded_by(other))

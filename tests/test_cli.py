"""The command as a user meets it: exit codes, one line on standard error, one JSON object on standard output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lut_ds.config import shipped_recipes
from lut_ds.engine.manifest import verify
from tests.engine.launching import PATIENCE
from tests.engine.tiny import tiny_tree

DONE, FAULT, BAD_INPUT = 0, 1, 2


def lut_ds(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command outside the checkout, without a launcher's variables."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "SLURM_", "MASTER_"))}
    return subprocess.run(
        [sys.executable, "-m", "lut_ds", *map(str, arguments)],
        cwd="/",
        env={**ours, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def refused(*arguments: object, code: int = BAD_INPUT, **env: str) -> str:
    """The one line of an error; fails unless that is all there is."""
    done = lut_ds(*arguments, **env)
    assert done.returncode == code, done.stderr[-3000:]
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("lut-ds: ")
    return line


def result(*arguments: object, **env: str) -> dict[str, Any]:
    """What `--json` printed; fails unless that is exactly one object."""
    done = lut_ds(*arguments, "--json", **env)
    assert done.returncode == DONE, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    """A recipe of two steps on the digits, into tmp_path/run."""
    tree = tiny_tree(global_batch=16, max_steps=2, deepspeed="cpu")
    tree["data"] = {"path": str(digits), "threads": 1}
    tree["run"] = {"dir": str(tmp_path / "run"), "log_every": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "COMMAND"),
        (["pretrian"], "'pretrian'"),
        (["pretrain"], "required: recipe;"),
        (["pretrain", "demo", "--jsn"], "--jsn"),
        (["pretrain", "demo", "optim.blr=1", "--jsn", "optim.eps=1"], "--jsn"),
        (["pretrain", "demo", "--dry-run", "--world-size", "0"], "--world-size"),
        (["pretrain", "demo", "--dry-run", "--world-size", "-1"], "--world-size"),
        (["doctor", "now"], "now"),
        (["data", "scenes", "out", "--seed", "-3"], "--seed"),
        (["export", "run"], "-o/--output"),
        (["export", "run", "-o", "x", "--ema", "--student"], "not allowed with"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], named: str) -> None:
    line = refused(*arguments)
    assert named in line
    assert line.endswith("--help")
    assert line.count("lut-ds: ") == 1


def test_a_mistyped_key_names_the_right_one() -> None:
    expected = "lut-ds: recipe demo.yaml: unknown key optim.blrr; did you mean optim.blr?"
    assert refused("pretrain", "demo", "data.path=/nowhere", "--json", "optim.blrr=1") == expected


def test_only_rank_0_speaks_for_all() -> None:
    done = lut_ds("pretrain", "demo", "optim.blrr=1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (BAD_INPUT, "", "")


def test_help_is_on_standard_output() -> None:
    done = lut_ds("pretrain", "--help")
    assert done.returncode == DONE
    assert done.stderr == ""
    assert "section.key=value" in done.stdout


def test_recipes_are_listed_with_their_heads() -> None:
    listed = result("recipes")
    assert sorted(name for name in listed if not name.startswith(("finetune_", "segment_"))) == shipped_recipes()
    assert "finetune_vitb16" in listed
    assert all(len(head) > 10 for head in listed.values())


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lut_ds", "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (DONE, "")


def test_the_plan_of_vit_l_touches_nothing(digits: Path, tmp_path: Path) -> None:
    # Values may also follow an option; an accelerator that is not here does not matter to a plan.
    plan = result(
        "pretrain", "lut_vitl16", f"data.path={digits}", f"run.dir={tmp_path}/run", "--dry-run", "--world-size", 8,
        "train.global_batch=1024", DS_ACCELERATOR="cuda",
    )  # fmt: skip
    assert 300e6 < plan["parameters"]["encoder"] < 310e6
    assert (plan["world_size"], plan["global_batch"], plan["steps_per_epoch"]) == (8, 1024, 1)
    assert plan["micro_batch"] * plan["accumulation"] * 8 == 1024
    assert plan["tokens"]["student_per_view"] == 50
    assert plan["gflop_per_image"]["total"] == pytest.approx(463, rel=0.02)
    assert plan["memory_gib_per_rank"]["total"] > 1
    assert not (tmp_path / "run").exists()


def test_a_plan_without_data() -> None:
    assert "/nowhere/at/all" in refused("pretrain", "demo", "--dry-run", "data.path=/nowhere/at/all")


@pytest.mark.slow
def test_a_run_is_continued_by_its_own_recipe_only(recipe: Path, tmp_path: Path) -> None:
    first = result("pretrain", recipe)
    assert (first["step"], first["steps"], first["resumed_from"], first["stopped_by"]) == (2, 2, None, None)
    assert first["folder"] == str(tmp_path / "run")
    line = refused("pretrain", recipe, "method.mask_ratio=0.5")
    assert "holds a run of another recipe: method.mask_ratio is 0.75 there and 0.5 here" in line
    again = result("pretrain", recipe, "train.max_steps=3")
    assert (again["step"], again["resumed_from"]) == (3, 2)
    expect_no_export_of_damage(tmp_path)


def expect_no_export_of_damage(folder: Path) -> None:
    """The damaged checkpoint is refused by its name, and passed over for an older one by the run's."""
    older, newest = sorted((folder / "run" / "checkpoints").glob("step_*"))
    file = newest / "shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged: shared.safetensors" in refused("export", newest, "-o", folder / "timm")
    assert not (folder / "timm").exists()
    assert result("export", folder / "run", "-o", folder / "timm")["step"] == int(older.name.removeprefix("step_"))


@pytest.mark.slow
def test_mae_is_continued_and_exported_too(recipe: Path, tmp_path: Path) -> None:
    """It has no buffers and no teacher: files without a tensor must be readable."""
    assert result("pretrain", recipe, "method.name=mae")["resumed_from"] is None
    assert result("pretrain", recipe, "method.name=mae", "train.max_steps=3")["resumed_from"] == 2
    exported = result("export", tmp_path / "run", "--student", "-o", tmp_path / "timm")
    assert Path(exported["weights"]).is_file()


@pytest.mark.slow
def test_a_folder_without_images(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "class").mkdir(parents=True)
    (tmp_path / "images" / "class" / "a.txt").touch()
    assert "expected images" in refused("pretrain", recipe, f"data.path={tmp_path}/images")


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_replaced_and_named_unless_there_are_too_many(
    recipe: Path, tmp_path: Path, digits: Path
) -> None:
    shutil.copytree(digits / "train" / "0", tmp_path / "images" / "0")
    bad = sorted((tmp_path / "images" / "0").iterdir())[7]
    bad.write_bytes(b"junk")
    # More steps than an epoch: the image comes up for certain.
    arguments = ["pretrain", recipe, f"data.path={tmp_path}/images", "train.max_steps=20"]
    done = lut_ds(*arguments, "--json")
    assert done.returncode == DONE, done.stderr[-3000:]
    assert json.loads(done.stdout)["step"] == 20
    (listed,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert Path(listed["name"]).name == bad.name
    assert done.stderr.count(f"data: {bad}: ") == 1
    for file in bad.parent.iterdir():
        file.write_bytes(b"junk")
    done = lut_ds(*arguments, f"run.dir={tmp_path}/other")
    assert done.returncode == FAULT
    assert done.stdout == ""
    images = len(list(bad.parent.iterdir()))
    assert done.stderr.splitlines()[-1].startswith(
        f"lut-ds: data: none of the {images} images of data.path can be used"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["run", "run/checkpoints"])
def test_a_run_folder_that_may_not_be_written(recipe: Path, tmp_path: Path, where: str) -> None:
    """A read-only mount, which stops root too."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    mounts = ["mount --bind $0 $0", "mount -o remount,bind,ro $0"]
    if subprocess.run(["unshare", "-rm", "sh", "-ec", "; ".join(mounts), tmp_path / where], check=False).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    script = "; ".join([*mounts, 'exec "$@"'])
    command = [
        "unshare",
        "-rm",
        "sh",
        "-ec",
        script,
        tmp_path / where,
        sys.executable,
        "-m",
        "lut_ds",
        "pretrain",
        recipe,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd="/")
    assert done.returncode == BAD_INPUT, done.stderr[-3000:]
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"lut-ds: run.dir: {tmp_path / where}")
    assert "Read-only file system" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, named",
    [("images", "exists and is no run folder"), ("file/run", "cannot be written")],
)
def test_a_run_folder_that_cannot_be(recipe: Path, tmp_path: Path, folder: str, named: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "file").touch()
    line = refused("pretrain", recipe, f"run.dir={tmp_path / folder}")
    assert named in line
    assert str(tmp_path / folder) in line


@pytest.mark.slow
def test_no_space_left_keeps_the_last_good_checkpoint(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        done = lut_ds(
            "pretrain", recipe, f"run.dir={disk}/run", "train.max_steps=40", "run.save_every=1", "run.keep_last=9"
        )
        assert done.returncode == FAULT
        assert "disk full" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        left = sorted((disk / "run" / "checkpoints").iterdir())
        assert [path.name for path in left] == ["latest", *(f"step_{step:08d}" for step in range(1, len(left)))]
        assert len(left) > 1
        assert [verify(path) for path in left[1:]] == [None] * (len(left) - 1)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_libraries_that_print_do_not_disturb_the_result(recipe: Path, tmp_path: Path) -> None:
    """A module that writes to standard output while the run starts, in Python and below it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "class Noise:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'deepspeed':\n"
        "            print('noise'); os.write(1, b'noise')\n"
        "sys.meta_path.insert(0, Noise())\n"
    )
    done = lut_ds("pretrain", recipe, "--json", PYTHONPATH=str(tmp_path))
    assert json.loads(done.stdout)["step"] == 2
    assert done.stderr.count("noise") == 2

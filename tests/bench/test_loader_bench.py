"""The loader's benchmark: really runs, side by side; the tuner keeps the cheapest of the fastest, and runs follow it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lut_ds.bench.loader import Options, bench_loader, who_decodes
from lut_ds.bench.loader_run import Task
from lut_ds.bench.loader_tune import tune_loader
from lut_ds.bench.rounds import compare, summarise
from lut_ds.config import Recipe, load_recipe
from lut_ds.data.sources import ImageFolder
from lut_ds.data.tuning import Loading, choose_loading, load_tuning, machine_key, save_tuning, tuning_file
from lut_ds.engine.reading import loading
from lut_ds.errors import UserError
from tests.test_cli import result


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def small(digits: Path) -> Recipe:
    """The demo recipe on the digits."""
    return load_recipe("demo", [f"data.path={digits}"])


@pytest.mark.slow
def test_measures_both_loaders_on_the_same_files(digits: Path) -> None:
    words = ["--batch", 16, "--batches", 2, "--rounds", 1, "--workers", 1, "--only", "ours,torchvision,webdataset"]
    found = result("bench", "loader", "demo", f"data.path={digits}", *words)
    assert {"ours", "torchvision"} <= set(found["loaders"])
    assert set(found["loaders"]) | set(found["left_out"]) == {"ours", "torchvision", "webdataset"}
    for figures in found["loaders"].values():
        assert all(figures[key]["median"] > 0 for key in ("images_per_s", "cpu_ms", "p50_ms", "p99_ms", "rss_mib"))
        assert figures["p99_ms"]["median"] >= figures["p50_ms"]["median"]
    ours, theirs = (found["loaders"][name]["cpu_ms"]["median"] for name in ("ours", "torchvision"))
    assert found["ratios"]["torchvision"]["cpu_ms"]["median"] == pytest.approx(ours / theirs)
    assert found["machine"]["versions"]["numpy"] == np.__version__
    assert sum(found["who_decodes"].values()) >= 500


def test_refuses_what_does_not_exist(small: Recipe) -> None:
    with pytest.raises(UserError, match="--only: expected some of ours, torchvision, webdataset, found 'fastest'"):
        bench_loader(small, Options(only=("ours", "fastest")))
    with pytest.raises(UserError, match="--device: expected auto, cpu or cuda"):
        bench_loader(small, Options(device="tpu"))
    with pytest.raises(UserError, match=r"--batch: expected at most the \d+ images of .*, found 1000000"):
        bench_loader(small, Options(batch_size=10**6, device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            bench_loader(small, Options(device="cuda"))


@pytest.mark.slow
def test_tuning_is_kept_and_followed(cache: Path, small: Recipe) -> None:
    words = [f"data.path={small.data.path}", "data.threads=null", "--batch", 16, "--batches", 1, "--device", "cpu"]
    found = result("bench", "loader", "demo", *words, "--tune", XDG_CACHE_HOME=str(cache))
    assert found["file"] == str(cache / "lut_ds" / "loader.json")
    followed = loading(
        small.model_copy(update={"data": small.data.model_copy(update={"threads": None})}), torch.device("cpu")
    )
    assert found["chosen"] == {
        "threads": followed.threads,
        "prefetch": followed.prefetch,
        **vars(followed.gpu_decoder),
    }


def by_settings(speed: dict[tuple[int, int], float]) -> Any:
    """Figures of a machine whose speed is known for each (threads, prefetch)."""

    def run(task: Task) -> dict[str, float]:
        images = speed[task.workers, task.prefetch or 0]
        return {"images_per_s": images, "cpu_ms": 1.0, "p99_ms": 1.0, "rss_mib": 1.0}

    return run


def test_the_cheapest_setting_within_three_per_cent_wins(
    cache: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lut_ds.bench.loader_tune.rank_cores", lambda: 4)
    speed = {(n, 2): s for n, s in ((1, 100.0), (2, 198.0), (3, 200.0), (4, 201.0))}
    speed |= {(2, 1): 150.0, (2, 3): 230.0, (2, 4): 231.0}
    chosen = tune_loader(small, Options(device="cpu"), by_settings(speed))["chosen"]
    assert (chosen["threads"], chosen["prefetch"]) == (2, 3)


def test_what_the_recipe_gives_comes_before_the_tuning(cache: Path) -> None:
    key = machine_key(4, None, 32)
    tuned = Loading(3, 5, replace(Loading(1).gpu_decoder, hw_decoder_load=0.3, preallocate_side=512))
    assert choose_loading(None, None, None, 4, None, 32) == Loading(4, 2)
    assert choose_loading(None, None, None, 64, None, 32).threads == 8
    assert save_tuning(key, tuned) == tuning_file()
    assert choose_loading(None, None, None, 4, None, 32) == tuned
    given = choose_loading(1, None, 0.9, 4, None, 32)
    assert (given.threads, given.prefetch, given.gpu_decoder.hw_decoder_load) == (1, 5, 0.9)
    assert load_tuning(machine_key(4, "H100", 32)) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"4 cores, no GPU, 32 px": {"threads": "x"}}'])
def test_a_damaged_tuning_is_no_tuning(cache: Path, content: str) -> None:
    tuning_file().parent.mkdir(parents=True)
    tuning_file().write_text(content)
    assert choose_loading(None, None, None, 4, None, 32) == Loading(4, 2)
    save_tuning(machine_key(4, None, 32), Loading(2, 1))
    assert json.loads(tuning_file().read_text())["4 cores, no GPU, 32 px"]["threads"] == 2


def test_ratios_are_taken_within_rounds() -> None:
    rounds = [
        {name: {"cpu_ms": cpu, "images_per_s": 1 / cpu} for name, cpu in (("ours", a), ("torchvision", b))}
        for a, b in ((1.0, 2.0), (4.0, 8.0), (3.0, 4.0))
    ]
    ratio = compare(rounds, "ours", ["cpu_ms"])["torchvision"]["cpu_ms"]
    assert (ratio["median"], ratio["min"], ratio["max"]) == (0.5, 0.5, 0.75)
    assert summarise([found["ours"] for found in rounds])["cpu_ms"]["median"] == 3.0


def test_who_decodes_goes_by_the_header(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), (200, 30, 60))
    for name, options in (("a.jpg", {}), ("b.jpg", {"progressive": True}), ("c.png", {})):
        data = io.BytesIO()
        picture.save(data, "PNG" if name.endswith("png") else "JPEG", **options)
        (tmp_path / name).write_bytes(data.getvalue())
    (tmp_path / "d.jpg").write_bytes(b"no image")
    picture.convert("CMYK").save(tmp_path / "e.jpg")
    assert who_decodes(ImageFolder(tmp_path, None)) == {"hardware": 1, "cuda": 2, "cpu": 1, "unreadable": 1}

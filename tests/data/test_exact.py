"""The same 1,000 positions give the same bytes, whoever reads them, from what, and with which files bad."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lut_ds.data.loader import PretrainLoader
from lut_ds.data.order import SampleOrder
from lut_ds.data.shard_index import write_index
from lut_ds.data.sources import ImageFolder, Source, TarShards
from lut_ds.data.views import LUT_VIEW1, LUT_VIEW2
from tests.data.images import encode, photo

IMAGES, GLOBAL, STEPS, SEED = 230, 100, 10, 7  # two steps an epoch: five epochs, 1,000 positions
BAD = {3: "truncated", 4: "empty", 5: "page", 77: "missing", 150: "truncated", 229: "truncated"}
Digest = list[bytes]


def content(i: int, bad: bool) -> bytes:
    data = encode(photo(24 + i % 5, 26 + i % 7, seed=i), quality=90)
    damage = BAD.get(i) if bad else None
    return {None: data, "truncated": data[: len(data) // 2], "page": b"<html></html>"}.get(damage, b"")


def write_folder(root: Path, bad: bool) -> Source:
    for i in range(IMAGES):
        (root / f"class{i * 2 // IMAGES}").mkdir(parents=True, exist_ok=True)
        (root / f"class{i * 2 // IMAGES}" / f"{i:03d}.jpg").write_bytes(content(i, bad))
    source = ImageFolder(root)
    if bad:
        Path(source.name(77)).unlink()
    return source


def write_shards(root: Path, bad: bool) -> Source:
    root.mkdir()
    for shard in range(3):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard * IMAGES // 3, (shard + 1) * IMAGES // 3):
                data = content(i, bad)
                member = tarfile.TarInfo(f"{i:03d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_index(root)
    return TarShards.open(root)


@pytest.fixture(scope="module", params=["all good", "some bad"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source, Digest]:
    """The images as a folder and as shards, and what one rank with one thread makes of them."""
    root, bad = tmp_path_factory.mktemp("exact"), request.param == "some bad"
    folder, shards = write_folder(root / "folder", bad), write_shards(root / "shards", bad)
    return folder, shards, positions(folder)


def positions(source: Source, world: int = 1, start: int = 0, **options: Any) -> Digest:
    """A digest of (views, noise) for each position of steps [start, STEPS), in order, over all ranks."""
    settings: dict[str, Any] = {"micro_batch": 25, "threads": 1} | options
    per_rank = []
    for rank in range(world):
        loader = PretrainLoader(
            source, [LUT_VIEW1, LUT_VIEW2], image_size=16, num_patches=4, seed=SEED, global_batch=GLOBAL, rank=rank,
            world_size=world, device=torch.device("cpu"), **settings,
        )  # fmt: skip
        with loader:
            per_rank.append([digest(batch.views, batch.noise) for batch in loader.batches(start, STEPS)])
    return [one for together in zip(*per_rank, strict=True) for batch in together for one in batch]


def digest(views: list[torch.Tensor], noise: torch.Tensor) -> Digest:
    parts = zip(*(view.numpy() for view in views), noise.numpy(), strict=True)
    return [hashlib.sha256(b"".join(part.tobytes() for part in parts_of_one)).digest() for parts_of_one in parts]


def test_a_thousand_positions_all_different(data: tuple[Source, Source, Digest]) -> None:
    assert len(data[2]) == 1000
    assert len(set(data[2])) == 1000


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(data: tuple[Source, Source, Digest], world: int) -> None:
    assert positions(data[0], world) == data[2]


@pytest.mark.parametrize(
    "options", [{"threads": 4}, {"micro_batch": 50, "prefetch": 3}, {"micro_batch": 10, "prefetch": 1}]
)
def test_threads_and_micro_batches(data: tuple[Source, Source, Digest], options: dict[str, int]) -> None:
    assert positions(data[0], **options) == data[2]


def test_shards(data: tuple[Source, Source, Digest]) -> None:
    assert positions(data[1], threads=4) == data[2]


def test_shards_after_a_resume_on_other_ranks(data: tuple[Source, Source, Digest]) -> None:
    assert positions(data[1], 2, start=5, micro_batch=50) == data[2][500:]


def test_each_sample_once_an_epoch_and_epochs_differ(data: tuple[Source, Source, Digest]) -> None:
    order = SampleOrder(IMAGES, SEED)
    epochs = [order.samples(epoch, np.arange(IMAGES)) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(IMAGES)) for epoch in epochs)
    assert not any(np.array_equal(a, b) for a, b in [(epochs[0], epochs[1]), (epochs[1], epochs[2])])

"""A bad sample is replaced by the next valid one in the order, in its own views, and nothing else changes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lut_ds.data import slots
from lut_ds.data.loader import Batch, EvalLoader, PretrainLoader
from lut_ds.data.order import SampleOrder
from lut_ds.data.sources import ImageFolder
from lut_ds.data.views import LUT_VIEW1, LUT_VIEW2
from lut_ds.errors import RunFault

IMAGES, GLOBAL, SEED = 42, 16, 11
ORDER = SampleOrder(IMAGES, SEED)


def loader(source: ImageFolder, **options: Any) -> PretrainLoader:
    settings: dict[str, Any] = {"micro_batch": 4, "threads": 2, "prefetch": 2} | options
    return PretrainLoader(
        source, [LUT_VIEW1, LUT_VIEW2], image_size=24, num_patches=9, seed=SEED, global_batch=GLOBAL, rank=0, world_size=1,
        device=torch.device("cpu"), **settings,
    )  # fmt: skip


def run(source: ImageFolder, start: int, stop: int, **options: Any) -> list[Batch]:
    with loader(source, **options) as one:
        return list(one.batches(start, stop))


def samples(batches: list[Batch]) -> list[int]:
    return np.concatenate([batch.samples for batch in batches]).tolist()


def pixels(batches: list[Batch]) -> list[bytes]:
    return [v.numpy().tobytes() + n.numpy().tobytes() for b in batches for *vs, n in zip(*b.views, b.noise) for v in vs]


def expected(epoch: int, positions: range, bad: set[int]) -> list[int]:
    """By hand: the first good sample at p, p + 1, ... around the epoch."""
    order = ORDER.samples(epoch, np.arange(IMAGES)).tolist()
    return [next(s for s in (order[(p + j) % IMAGES] for j in range(IMAGES)) if s not in bad) for p in positions]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> ImageFolder:
    shutil.copytree(photos, tmp_path / "photos")
    return ImageFolder(tmp_path / "photos")


def damage(source: ImageFolder, sample: int, how: str = "cut") -> None:
    path = Path(source.name(sample))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else path.stat().st_size // 2])


WHERE: dict[str, Callable[[list[int]], list[int]]] = {
    "one": lambda order: [order[5]],
    "several in a batch": lambda order: order[4:8],
    "a chain over batches": lambda order: order[6:15],
    "the last of the plan": lambda order: order[28:32],
    "around the end": lambda order: order[30:42] + order[:2],
    "scattered": lambda order: order[::3],
}


@pytest.mark.parametrize(
    "where, how",
    [
        *((where, "cut") for where in WHERE),  # found last, by the pipeline: what undoes most
        *((where, "mixed") for where in ("a chain over batches", "around the end", "scattered")),
        ("a chain over batches", "gone"),
    ],
)
def test_the_next_valid_one_in_the_order(folder: ImageFolder, where: str, how: str) -> None:
    clean = run(folder, 0, 2)
    bad = WHERE[where](ORDER.samples(0, np.arange(IMAGES)).tolist())
    replaced = expected(0, range(32), set(bad))
    for i, sample in enumerate(bad):
        damage(folder, sample, ("cut", "gone", "empty")[i % 3] if how == "mixed" else how)
    with loader(folder) as one:
        found = list(one.batches(0, 2))
        met = {entry.sample: entry for entry in one.take_bad()}
        assert one.take_bad() == []
        assert (one.seen, one.bad) == (32, sum(s in bad for s in samples(clean)))
    assert samples(found) == replaced
    assert [len(batch.samples) for batch in found] == [4] * 8
    for p, (before, after) in enumerate(zip(samples(clean), samples(found))):
        if before == after:
            assert pixels(found)[2 * p : 2 * p + 2] == pixels(clean)[2 * p : 2 * p + 2]
    assert set(met) <= set(bad)
    assert {s for s in samples(clean) if s in bad} <= set(met)
    for sample, entry in met.items():
        assert (entry.name, entry.epoch) == (folder.name(sample), 0)
        assert ORDER.samples(0, np.array([entry.position]))[0] == sample
        assert not entry.reason.startswith("data:")


def test_the_replacement_has_the_views_of_the_place_it_fills(folder: ImageFolder) -> None:
    """The same bytes as if the bad file held the image that replaces it."""
    order = ORDER.samples(0, np.arange(IMAGES)).tolist()
    bad = [order[2], order[9], order[10]]
    replacement = dict(zip(bad, [order[3], order[11], order[11]]))
    contents = {sample: Path(folder.name(other)).read_bytes() for sample, other in replacement.items()}
    for sample in bad:
        damage(folder, sample)
    found = run(folder, 0, 2)
    for sample, data in contents.items():
        Path(folder.name(sample)).write_bytes(data)
    filled = run(folder, 0, 2)
    assert pixels(found) == pixels(filled)
    assert samples(found) != samples(filled)


@pytest.mark.parametrize("options", [{"threads": 1, "prefetch": 1}, {"threads": 4, "prefetch": 4}, {"micro_batch": 16}])
def test_history_does_not_matter(folder: ImageFolder, options: dict[str, int]) -> None:
    for sample in ORDER.samples(1, np.arange(0, IMAGES, 5)).tolist():
        damage(folder, sample)
    whole = run(folder, 0, 6)
    for start in (1, 3, 5):
        assert pixels(run(folder, start, 6, **options)) == pixels(whole)[start * GLOBAL * 2 :]


def test_a_bad_file_is_decoded_once_a_process(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(folder, int(ORDER.samples(0, np.array([3]))[0]))
    decoded, real = [], slots.undecodable
    monkeypatch.setattr(slots, "undecodable", lambda data, *rest: decoded.append(len(data)) or real(data, *rest))
    run(folder, 0, 6)
    assert decoded == [4, 1]  # its batch, and the replacement


def test_a_repaired_file_is_used_again(folder: ImageFolder) -> None:
    sample = int(ORDER.samples(0, np.array([3]))[0])
    good = Path(folder.name(sample)).read_bytes()
    damage(folder, sample)
    with loader(folder, prefetch=1) as one:
        batches = one.batches(0, 6)
        assert sample not in samples([next(batches) for _ in range(8)])
        Path(folder.name(sample)).write_bytes(good)
        assert sample in samples(list(batches))


def test_nothing_valid_is_a_fault(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for sample in range(IMAGES):
        damage(folder, sample)
    with pytest.raises(RunFault, match="none of the 42 images"):
        run(folder, 0, 1)
    monkeypatch.setattr(slots, "MOST_IN_A_ROW", 20)
    with pytest.raises(RunFault, match="so were the 19 samples before it"):
        run(folder, 0, 1)


def test_evaluation_leaves_out_only_when_told(folder: ImageFolder) -> None:
    whole = torch.cat([view for view, _ in EvalLoader(folder, 24, 4, 2)])
    bad = [0, 8, 9, 10, 11, 41]  # 8 to 11 are a batch
    for sample in bad:
        damage(folder, sample)
    with pytest.raises(RunFault, match="cannot be decoded"):
        list(EvalLoader(folder, 24, 4, 2))
    evaluation = EvalLoader(folder, 24, 4, 2, skip_bad=True)
    batches = list(evaluation)
    kept = [i for i in range(IMAGES) if i not in bad]
    assert torch.equal(torch.cat([view for view, _ in batches]), whole[kept])
    assert torch.cat([labels for _, labels in batches]).tolist() == [folder.label(i) for i in kept]
    assert [entry.sample for entry in evaluation.bad] == bad

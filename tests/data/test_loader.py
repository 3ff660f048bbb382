"""The loaders: the same samples and pixels whatever the ranks, threads and interruptions, and nothing left behind."""

import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from lut_ds.data.lent import OwnCopies
from lut_ds.data.loader import Batch, EvalLoader, PretrainLoader
from lut_ds.data.order import BlockOrder
from lut_ds.data.sources import ImageFolder
from lut_ds.data.views import EVAL_VIEW, LUT_VIEW1, LUT_VIEW2, MAE_VIEW, apply_reference, eval_params
from lut_ds.errors import UserError
from tests.data.images import difference
from tests.engine.launching import PATIENCE
from tests.golden_data import GOLDEN_DIR, golden_json

CPU = torch.device("cpu")
SIZE, PATCHES, DRAWS, GLOBAL = 24, 9, 3, 16


def loader(root: Path, **options: Any) -> PretrainLoader:
    settings: dict[str, Any] = {
        "image_size": SIZE,
        "num_patches": PATCHES,
        "num_draws": DRAWS,
        "seed": 11,
        "global_batch": GLOBAL,
        "micro_batch": 4,
        "rank": 0,
        "world_size": 1,
        "device": CPU,
        "threads": 1,
    }
    return PretrainLoader(ImageFolder(root), [LUT_VIEW1, LUT_VIEW2], **(settings | options))


def run(root: Path, start: int, stop: int, **options: Any) -> list[Batch]:
    with loader(root, **options) as batches:
        return list(batches.batches(start, stop))


def run_all_ranks(root: Path, start: int, stop: int, world_size: int, **options: Any) -> list[Batch]:
    """The micro-batches of every rank, in the order of their positions."""
    ranks = [run(root, start, stop, world_size=world_size, rank=rank, **options) for rank in range(world_size)]
    return [batch for together in zip(*ranks) for batch in together]


def stacked(batches: list[Batch]) -> list[np.ndarray]:
    """samples, noise, draws, view 1, view 2 of all batches, end to end."""
    parts = ((b.samples, b.noise.numpy(), b.draws.numpy(), *(view.numpy() for view in b.views)) for b in batches)
    return [np.concatenate(part) for part in zip(*parts)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(stacked(found), stacked(expected)):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(photos: Path) -> list[Batch]:
    """Five steps: two epochs and a half of 42 images in batches of 16, micro-batches of 4."""
    return run(photos, 0, 5)


def test_shapes_and_types(photos: Path, uninterrupted: list[Batch]) -> None:
    assert loader(photos).steps_per_epoch == 2
    assert len(uninterrupted) == 5 * 4
    batch = uninterrupted[0]
    assert [(view.shape, view.dtype) for view in batch.views] == [((4, SIZE, SIZE, 3), torch.uint8)] * 2
    assert (batch.noise.shape, batch.noise.dtype) == ((4, PATCHES), torch.float32)
    assert (batch.draws.shape, batch.draws.dtype) == ((4, DRAWS), torch.float32)
    assert run(photos, 0, 1, num_draws=0)[0].draws is None
    assert (batch.samples.shape, batch.samples.dtype) == ((4,), np.int64)


def test_every_sample_at_most_once_an_epoch(uninterrupted: list[Batch]) -> None:
    samples, noise, draws, *_ = stacked(uninterrupted)
    first, second = samples[:32], samples[32:64]
    assert len(set(first)) == len(set(second)) == 32
    assert not np.array_equal(first, second)
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert len(np.unique([noise[:, :DRAWS], draws])) > 0.99 * 2 * draws.size


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (2, 4), (2, 8), (4, 4), (4, 2), (1, 1)])
def test_ranks_and_accumulation_change_nothing(
    photos: Path, uninterrupted: list[Batch], world_size: int, micro_batch: int
) -> None:
    """Position order over (micro-batch, rank) is the same sequence of samples, noise and pixels."""
    assert_same(run_all_ranks(photos, 0, 3, world_size, micro_batch=micro_batch), uninterrupted[:12])


def test_an_order_by_blocks_is_as_exact(photos: Path) -> None:
    """Ranks, accumulation and resuming change nothing, and the samples are another sequence than the global shuffle's."""
    order = BlockOrder(42, 11, 4, 3)
    expected = run(photos, 0, 3, order=order)
    assert_same(run_all_ranks(photos, 0, 3, 2, micro_batch=2, order=order), expected)
    assert_same(run(photos, 2, 3, order=order), expected[8:])
    assert not np.array_equal(stacked(expected)[0], stacked(run(photos, 0, 3))[0])


@pytest.mark.parametrize(("threads", "prefetch"), [(4, 1), (4, 3), (1, 1)])
def test_threads_and_prefetch_change_nothing(
    photos: Path, uninterrupted: list[Batch], threads: int, prefetch: int
) -> None:
    assert_same(run(photos, 0, 5, threads=threads, prefetch=prefetch), uninterrupted)


@pytest.mark.parametrize("start", range(1, 5))
def test_resume_at_any_step(photos: Path, uninterrupted: list[Batch], start: int) -> None:
    assert_same(run(photos, start, 5), uninterrupted[4 * start :])


def test_one_loader_serves_many_ranges(photos: Path, uninterrupted: list[Batch]) -> None:
    with loader(photos) as one:
        assert_same(list(one.batches(3, 4)), uninterrupted[12:16])
        half = one.batches(0, 5)
        next(half)
        half.close()
        assert list(one.batches(2, 2)) == []
        assert_same(list(one.batches(0, 1)), uninterrupted[:4])


def test_views_are_the_references(photos: Path, uninterrupted: list[Batch]) -> None:
    """End to end, from the file: a sample's first view is what Pillow renders from its parameters."""
    from lut_ds.data.views import view_params

    source = ImageFolder(photos)
    for batch in uninterrupted[:2]:
        for i, sample in enumerate(batch.samples.tolist()):
            image = Image.open(source.name(sample))
            size = np.array([[image.height, image.width]], np.int32)
            for v, (spec, tolerance) in enumerate([(LUT_VIEW1, 0.3), (LUT_VIEW2, 1.5)]):
                row = view_params(spec, SIZE, 11, 0, np.array([sample]), v, size).row(0)
                expected = apply_reference(row, spec, image)
                assert difference(batch.views[v][i].numpy(), expected)[0] <= tolerance


def test_batch_sizes_that_do_not_work(photos: Path) -> None:
    with pytest.raises(UserError, match=r"train.global_batch: expected a multiple"):
        loader(photos, micro_batch=5)
    with pytest.raises(UserError, match=r"train.global_batch: expected a multiple"):
        loader(photos, micro_batch=8, world_size=4)
    with pytest.raises(UserError, match=r"at most the 42 images"):
        loader(photos, global_batch=64)


def test_mae_view(photos: Path) -> None:
    options: dict[str, Any] = {"seed": 1, "global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
    with PretrainLoader(
        ImageFolder(photos), [MAE_VIEW], image_size=16, num_patches=4, device=CPU, threads=1, **options
    ) as one:
        (batch,) = one.batches(0, 1)
    assert [view.shape for view in batch.views] == [(8, 16, 16, 3)]


class Event:
    """Stands for a CUDA event: happens when a test says so, or when it is waited for."""

    made: ClassVar[list["Event"]] = []

    def __init__(self) -> None:
        self.happened = False
        self.made.append(self)

    def record(self, stream: None) -> None:
        assert not self.happened

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


def test_lent_memory_is_kept_until_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    copies, kept = OwnCopies(), []
    for number in range(4):
        lent = [torch.full((2,), number), torch.full((3,), -number)]
        kept.append(weakref.ref(lent[0]))
        own = copies.take(lent)
        assert all(torch.equal(a, b) for a, b in zip(own, lent))
        assert {t.data_ptr() for t in own}.isdisjoint(t.data_ptr() for t in lent)
        del lent
        if number == 1:
            assert all(reference() is not None for reference in kept)
            Event.made[0].happened = True
    assert [reference() is None for reference in kept] == [True, False, False, False]
    copies.close()
    assert all(event.happened for event in Event.made)
    assert all(reference() is None for reference in kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_host_that_runs_ahead_of_the_gpu_changes_no_pixel(photos: Path) -> None:
    sums = {}
    for ahead in (False, True):
        found = []
        with loader(photos, device=torch.device("cuda", 0)) as opened:
            for batch in opened.batches(0, 3):
                if ahead:
                    torch.cuda._sleep(200_000_000)  # about 0.1 s, before the device reads the batch
                found.append(torch.stack([view.long().sum() for view in batch.views]))
                if not ahead:
                    torch.cuda.synchronize()
                del batch
        sums[ahead] = torch.stack(found).cpu()
    assert torch.equal(sums[False], sums[True])


def native_threads() -> Counter[str]:
    """How many threads of each name the process has, those of DALI among them."""
    found: Counter[str] = Counter()
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[path.read_text()] += 1
    return found


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lut-ds")]


@pytest.mark.parametrize("ending", ["end", "close", "drop", "error", "loader"])
def test_no_thread_is_left(photos: Path, ending: str) -> None:
    run(photos, 0, 1, threads=3)  # what is started once for the process is there
    gc.collect()
    before = native_threads()
    one = loader(photos, threads=3)
    iterator: Iterator[Batch] = one.batches(0, 4)
    next(iterator)
    assert reader_threads()
    if ending == "end":
        list(iterator)
    elif ending == "close":
        iterator.close()  # type: ignore[attr-defined]
    elif ending == "error":
        with pytest.raises(KeyError):
            iterator.throw(KeyError("from the loop"))  # type: ignore[attr-defined]
    elif ending == "loader":
        one.close()
        assert next(iterator, None) is None
    del iterator
    gc.collect()
    # A thread that was joined is gone for Python, and a moment later for the system.
    deadline = time.monotonic() + PATIENCE
    while (reader_threads() or native_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader_threads() == []
    assert native_threads() - before == Counter()


def test_interpreter_exits_with_a_loader_open(photos: Path) -> None:
    program = f"""
    import torch
    from lut_ds.data.loader import PretrainLoader
    from lut_ds.data.sources import ImageFolder
    from lut_ds.data.views import LUT_VIEW1, LUT_VIEW2
    one = PretrainLoader(ImageFolder({str(photos)!r}), [LUT_VIEW1, LUT_VIEW2], image_size=24, num_patches=9, seed=0,
                         global_batch=16, micro_batch=4, rank=0, world_size=1, device=torch.device("cpu"), threads=2)
    iterator = one.batches(0, 10**9)
    print(next(iterator).views[0].shape[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
    assert "Traceback" not in done.stderr


def test_eval_order_labels_and_last_batch(photos: Path) -> None:
    source = ImageFolder(photos)
    evaluation = EvalLoader(source, SIZE, 16, 2)
    assert len(evaluation) == 3
    batches = list(evaluation)
    assert [len(labels) for _, labels in batches] == [16, 16, 10]
    assert torch.cat([labels for _, labels in batches]).tolist() == [source.label(i) for i in range(42)]
    images = torch.cat([view for view, _ in batches]).numpy()
    for i in range(42):
        image = Image.open(source.name(i))
        row = eval_params(SIZE, np.array([[image.height, image.width]], np.int32)).row(0)
        assert difference(images[i], apply_reference(row, EVAL_VIEW, image))[1] <= 1
    again = torch.cat([view for view, _ in evaluation]).numpy()
    assert np.array_equal(again, images)
    chosen = [40, 3, 3, 17]
    ((view, labels),) = EvalLoader(source, SIZE, 16, 1, indices=chosen)
    assert np.array_equal(view.numpy(), images[chosen])
    assert labels.tolist() == [source.label(i) for i in chosen]


def test_golden_eval_loader(tmp_path: Path) -> None:
    (tmp_path / "source.png").write_bytes((GOLDEN_DIR / "aug/source.png").read_bytes())
    files = {entry["file"]: entry for entry in golden_json("aug/manifest.json")["files"]}
    size = files["eval_resize_centercrop.png"]["params"]["size"]
    ((view, labels),) = EvalLoader(ImageFolder(tmp_path), size, 1, 1)
    expected = np.asarray(Image.open(GOLDEN_DIR / "aug/eval_resize_centercrop.png").convert("RGB"))
    assert difference(view[0].numpy(), expected)[1] <= 1
    assert labels.tolist() == [-1]

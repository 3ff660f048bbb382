"""Storage that goes away and comes back marks nothing bad; what is bad by itself does not wait for it."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from lut_ds.data import patience
from lut_ds.data.loader import EvalLoader
from lut_ds.data.patience import PatientReader
from lut_ds.data.sources import ImageFolder
from lut_ds.errors import RunFault


class Shaky(ImageFolder):
    """A folder that answers with an error number, for some samples, some times."""

    def __init__(self, root: Path, number: int, samples: set[int], times: int) -> None:
        super().__init__(root)
        self.number, self.samples, self.left = number, samples, times

    def read(self, i: int) -> bytes:
        if i in self.samples and self.left > 0:
            self.left -= 1
            error = OSError(self.number, os.strerror(self.number))
            raise RunFault(f"data: {self.name(i)}: cannot be read: {error.strerror}") from error
        return super().read(i)


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_passing_error_is_tried_again(folder: Path, number: int) -> None:
    source = Shaky(folder, number, {7}, times=2)
    assert PatientReader(source, 60).read(7) == ImageFolder(folder).read(7)
    assert source.left == 0


def test_an_error_of_one_file_that_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FILE_SECONDS", 0.3)
    found = PatientReader(Shaky(folder, errno.EIO, {7}, times=10**6), 60).read(7)
    assert isinstance(found, RunFault)
    assert "Input/output error" in str(found)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_an_error_about_the_file_is_not_tried_again(folder: Path, number: int) -> None:
    source = Shaky(folder, number, {7}, times=10**6)
    started = time.monotonic()
    assert isinstance(PatientReader(source, 3600).read(7), RunFault)
    assert source.left == 10**6 - 2  # once more, as the storage may have come back after the first time
    assert time.monotonic() - started < 600


@pytest.mark.parametrize("mount_point_stays", [False, True])
def test_an_unmounted_folder_is_waited_for(
    folder: Path, mount_point_stays: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """All batches arrive as if nothing had been, and the wait is said once."""
    source = ImageFolder(folder)
    whole = torch.cat([view for view, _ in EvalLoader(source, 24, 4, 2)])
    iterator = iter(EvalLoader(source, 24, 4, 2, skip_bad=True, retry_seconds=3600))
    views = [next(iterator)[0]]
    away = folder.rename(folder.with_name("away"))
    if mount_point_stays:
        folder.mkdir()

    def mount() -> None:
        if mount_point_stays:
            folder.rmdir()
        away.rename(folder)

    timer = threading.Timer(1.0, mount)
    timer.start()
    views += [view for view, _ in iterator]
    timer.join()
    assert torch.equal(torch.cat(views), whole)
    said = capfd.readouterr().err
    # Once; twice where a thread of the reader comes to say it when another one has just read again.
    times = said.count("waiting up to 3600 s for the storage to come back")
    assert times in (1, 2)
    assert said.count("data: can be read again, after") == times


def test_storage_that_stays_away_is_a_fault_not_bad_samples(folder: Path) -> None:
    source = ImageFolder(folder)
    evaluation = EvalLoader(source, 24, 4, 2, skip_bad=True, retry_seconds=0.5)
    iterator = iter(evaluation)
    next(iterator)
    shutil.rmtree(folder)
    with pytest.raises(RunFault, match=r"nor could any other file.*see that the data is mounted"):
        list(iterator)
    assert evaluation.bad == []


def test_waiting_ends_with_the_loader(folder: Path) -> None:
    source = ImageFolder(folder)
    iterator = iter(EvalLoader(source, 24, 4, 1, retry_seconds=3600))
    next(iterator)
    shutil.rmtree(folder)
    time.sleep(0.5)  # the readers find nothing, and wait
    started = time.monotonic()
    iterator.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 600


def test_a_folder_of_one_image_speaks_for_itself(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(next(photos.glob("*/*.jpg")).read_bytes())
    source = ImageFolder(tmp_path)
    (tmp_path / "one.jpg").unlink()
    assert isinstance(PatientReader(source, 60).read(0), RunFault)

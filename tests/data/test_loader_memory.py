"""A loader's memory does not grow with the batches it delivers, bad files among them."""

from pathlib import Path

import pytest

from tests.data.images import write_folder
from tests.data.loader_memory import measure

BYTES_A_BATCH = 2000  # a quarter of what one batch of four images, their views and their noise would take


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    write_folder(tmp_path, 60, height=20, width=24)
    for path in sorted(tmp_path.glob("*/*.jpg"))[::20]:
        path.write_bytes(path.read_bytes()[:300])
    found = measure(str(tmp_path), 1500)
    assert found["replaced"] > 200
    assert found["steady_bytes_per_batch"] < BYTES_A_BATCH, found

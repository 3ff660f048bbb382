"""Folders of images for the tests of this room."""

from pathlib import Path

import pytest

from tests.data.images import write_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 JPEGs in two classes, their sizes varying."""
    return write_folder(tmp_path_factory.mktemp("photos"), 42)

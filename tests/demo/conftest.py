from pathlib import Path

import pytest

from tests.transfer.runs import demo_folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(tmp_path_factory)

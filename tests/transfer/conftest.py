from pathlib import Path

import pytest

from tests.transfer.runs import demo_folder, mae_folder


@pytest.fixture(scope="session")
def lut_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(tmp_path_factory) / "runs" / "demo"


@pytest.fixture(scope="session")
def mae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mae_folder(tmp_path_factory) / "run"

"""ObjectNet (Barbu et al., NeurIPS 2019): the folders that are ImageNet classes, and images without their red border.

Nothing of it is shipped here: the mappings are read from the download, OBJECTNET/mappings.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lut_ds.data.sources import Source
from lut_ds.errors import RunFault, UserError

BORDER = 2  # pixels of red around every image
_FILES = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)


def folder_classes(root: Path) -> dict[str, list[int]]:
    """Folder of an ObjectNet class -> ImageNet classes (in the published order) that it is; folders without any are left out.

    Raises:
        UserError: no mappings, or mappings that do not fit together.
    """
    place = root / "mappings"
    try:
        folders, overlap, ids = (json.loads((place / name).read_text()) for name in _FILES[:3])
        described = (place / _FILES[3]).read_text().splitlines()
        published = {int(there): int(here) for here, there in ids.items()}
        of_label = {text.strip(): published[row] for row, text in enumerate(described) if text.strip()}
        folder_of = {label: folder for folder, label in folders.items()}
        return {folder_of[label]: _columns(names, of_label) for label, names in overlap.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--sets: objectnet: {place}: expected {', '.join(_FILES)} as downloaded, found {reason}; "
            "unpack ObjectNet's archive whole"
        ) from error


def _columns(names: str, of_label: Mapping[str, int]) -> list[int]:
    return [of_label[name.strip()] for name in names.split(";")]


class WithoutBorder:
    """A source whose images have lost `BORDER` pixels on each side."""

    def __init__(self, source: Source) -> None:
        self._source, self.classes = source, source.classes

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        """Image `i` without its border, as PNG."""
        file = io.BytesIO()
        try:
            image: Any = Image.open(io.BytesIO(self._source.read(i))).convert("RGB")
        except OSError as error:
            raise RunFault(f"objectnet: {self.name(i)}: not an image: {error}") from error
        width, height = image.size
        image.crop((BORDER, BORDER, width - BORDER, height - BORDER)).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def label(self, i: int) -> int:
        """As the source's."""
        return self._source.label(i)

    def name(self, i: int) -> str:
        """As the source's."""
        return self._source.name(i)

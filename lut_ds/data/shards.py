"""WebDataset-style tar shards as a source: every image is one positional read from a descriptor that stays open."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lut_ds.data.descriptors import Descriptors
from lut_ds.data.index import INDEX_NAME, SampleIndex, Shard
from lut_ds.data.shard_index import build, list_shards
from lut_ds.data.tar import BLOCK, header_size, read_at
from lut_ds.data.wds2idx import idx_path, idx_paths, scan_idx
from lut_ds.errors import RunFault, UserError

_REGULAR = b"\x0007"  # type flags of members that hold a file


class TarShards:
    """The images of tar shards, through an index; `read` may be called from any number of threads.

    A read fetches the image and the tar header before it, and compares: a shard that was changed after it was indexed is a
    RunFault naming it, not another image. Shards of another length than the index has are refused when first opened.

    Attributes:
        classes: names of the labels.
        index: places, sizes, labels and names.
    """

    def __init__(self, index: SampleIndex, *, open_shards: int | None = None) -> None:
        if index.kind != "tar":
            raise UserError(
                f"index {index.path}: expected an index of tar shards, found one of files; open it as a folder"
            )
        self.index, self.classes = index, index.classes
        self._descriptors = Descriptors(self._open, open_shards)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TarShards":
        """Shards in a folder, one shard, or a pattern such as `DIR/train-*.tar`.

        The index is `index.lut` in the folder; for a pattern or a single shard, and where there is none, the .idx files of
        `wds2idx` beside the shards. UserError, with the command that writes an index, when there is neither.
        """
        path = Path(path)
        if path.is_dir() and (path / INDEX_NAME).exists():
            return cls(SampleIndex.open(path))
        shards = list_shards(path)
        missing = [shard for shard in shards if not idx_path(shard).is_file()]
        if missing:
            raise UserError(
                f"data.path: {path}: expected an index of the {len(shards)} shards, found none (neither {INDEX_NAME} nor "
                f"{idx_path(missing[0]).name}); write it with `lut-ds data index {path}`"
            )
        return cls(_from_idx(shards))

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> bytes:
        """The bytes of image `i`; RunFault naming shard and offset when they cannot be read or are not what was indexed."""
        offset, size, _, shard = self.index.place(i)
        try:
            with self._descriptors.use(shard) as fd:
                data = read_at(fd, size + BLOCK, offset - BLOCK)
        except OSError as error:
            self._descriptors.forget(shard)  # a network file system may have come back under another handle
            raise RunFault(f"data: {self.name(i)}: byte {offset}: cannot be read: {error.strerror or error}") from error
        if len(data) != size + BLOCK or data[156] not in _REGULAR or header_size(data) != size:
            raise RunFault(
                f"data: {self.name(i)}: byte {offset}: expected a member of {size} bytes as {self.index.path} has it, found "
                "something else: the shard was changed or cut short; write the index again with `lut-ds data index`"
            )
        return data[BLOCK:]

    def label(self, i: int) -> int:
        """The class index of image `i`, -1 without one."""
        return self.index.place(i)[2]

    def name(self, i: int) -> str:
        """Shard and member of image `i`: DIR/000.tar:key.jpg."""
        shard = self.index.place(i)[3]
        return f"{self._path(self.index.shard(shard))}:{os.fsdecode(self.index.name(i))}"

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._descriptors.close()

    def _path(self, shard: Shard) -> Path:
        return self.index.root / shard.name

    def _open(self, k: int) -> int:
        shard = self.index.shard(k)
        path = self._path(shard)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        if size != shard.size:
            os.close(fd)
            raise RunFault(
                f"data: {path}: expected {shard.size} bytes as {self.index.path} has it, found {size}: the shard was changed "
                "or cut short; copy it again, or write the index again with `lut-ds data index`"
            )
        return fd


def _from_idx(shards: Sequence[Path]) -> SampleIndex:
    """An index made of .idx files, in a temporary file that lives as long as it is open."""
    idx_paths(shards)  # none is that of another shard
    with tempfile.TemporaryDirectory(prefix="lut-ds-") as folder:
        path = Path(folder) / INDEX_NAME
        build(shards, path, lambda shard: scan_idx(shard, idx_path(shard)))
        return SampleIndex(path)

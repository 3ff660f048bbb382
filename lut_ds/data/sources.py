"""What a source of encoded images is, and which one a `data.path` means."""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from lut_ds.data.filelist import SUFFIXES, FileList, write_list_index
from lut_ds.data.files import IndexedFiles
from lut_ds.data.folder import ImageFolder, split_root
from lut_ds.data.folder_index import check_fresh, write_folder_index
from lut_ds.data.index import INDEX_NAME, SampleIndex
from lut_ds.data.shard_index import Progress, is_shard, write_index
from lut_ds.data.shards import TarShards
from lut_ds.errors import UserError

Split = Literal["train", "val"] | None
_PLUGIN = re.compile(
    r"(?P<module>[^:?]+\.py|[A-Za-z_][\w.]*):(?P<factory>[A-Za-z_]\w*)(?:\?(?P<argument>.*))?", re.DOTALL
)
_MEMBERS = ("__len__", "read", "label", "name", "classes")

__all__ = ["ImageFolder", "Source", "Split", "TarShards", "index_source", "open_source", "own_file"]


class Source(Protocol):
    """An indexed set of encoded images. `read` is called from many threads at once."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image `i`; RunFault naming it when it cannot be read."""
        ...

    def label(self, i: int) -> int:
        """The index into `classes` of image `i`, -1 without one."""
        ...

    def name(self, i: int) -> str:
        """What to call image `i` in a message: for files, the path."""
        ...


def open_source(path: str | os.PathLike[str], split: Split = "train") -> Source:
    """The source that `data.path` means, by what is there.

    - a folder (its sub-folder `train` or `val` as `split` says, see ImageFolder): its `index.lut` where it has one, else tar
      shards with `wds2idx` files, else images;
    - a file *.lut: an index; *.txt or *.lst: a list of files; *.tar, or a pattern of such: shards;
    - `package.module:factory?argument` or `file.py:factory?argument`: what `factory(argument, split)` returns.

    All but a folder have one set of images, which is the training set: for `split` "val" they are refused, except the last.

    Raises:
        UserError: nothing there, or it does not work as what it looks like.
    """
    text = os.fspath(path)
    plugin = _PLUGIN.fullmatch(text)
    if plugin is not None and not os.path.lexists(text):
        return _checked(_factory(plugin, text)(plugin["argument"] or "", split), text)
    if os.path.isdir(text) or not (_suffix(text) or os.path.isfile(text)):
        return _open_folder(Path(text), split)
    if split == "val":
        raise UserError(
            f"data.path: {text}: expected a folder with train and val, found one set of images; give such a folder"
        )
    if _suffix(text) == ".tar":
        return TarShards.open(text)
    if _suffix(text) == ".lut":
        return _open_index(Path(text))
    if _suffix(text) in SUFFIXES:
        return FileList(text)
    raise UserError(
        f"data.path: {text}: expected a folder of images, .tar shards, an index (.lut) or a list ({', '.join(SUFFIXES)}), "
        "found another file; give the folder that holds it"
    )


def index_source(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    split: Split = "train",
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the index of a folder of images, of tar shards or of a list, so that `open_source` finds or takes it.

    See `write_folder_index`, `write_index` and `write_list_index` for the values returned, to which `kind` is added.
    """
    text = os.fspath(path)
    if _suffix(text) in SUFFIXES:
        return {"kind": "list", **write_list_index(text, out)}
    if _suffix(text) == ".tar":
        return {"kind": "shards", **write_index(text, out, workers=workers, progress=progress)}
    root = split_root(Path(text), split)
    if _holds_shards(root):
        return {"kind": "shards", **write_index(root, out, workers=workers, progress=progress)}
    return {"kind": "folder", **write_folder_index(root, out, None, progress=progress)}


def _open_folder(path: Path, split: Split) -> Source:
    root = split_root(path, split)
    if (root / INDEX_NAME).is_file():
        return _open_index(root / INDEX_NAME)
    return TarShards.open(root) if _holds_shards(root) else ImageFolder(root, None)


def _open_index(path: Path) -> Source:
    index = SampleIndex.open(path)
    if not len(index):
        raise UserError(f"index {path}: expected samples, found none; write it again with `lut-ds data index`")
    if index.kind == "tar":
        return TarShards(index)
    source = IndexedFiles(index)
    check_fresh(source)
    return source


def _holds_shards(root: Path) -> bool:
    with os.scandir(root) as entries:
        return any(is_shard(entry.name) for entry in entries)


def _suffix(text: str) -> str:
    """The suffix that decides, of a file or a pattern; empty for anything else."""
    suffix = os.path.splitext(text)[1]
    return suffix if suffix in (".tar", ".lut", *SUFFIXES) else ""


def own_file(path: str) -> str | None:
    """The file in a `data.path` that is `file.py:factory`, which `open_source` runs; None for another one."""
    plugin = _PLUGIN.fullmatch(path)
    return plugin["module"] if plugin is not None and plugin["module"].endswith(".py") else None


def _factory(plugin: re.Match[str], text: str) -> Callable[[str, Split], Any]:
    try:
        module = (
            _load_file(plugin["module"])
            if plugin["module"].endswith(".py")
            else importlib.import_module(plugin["module"])
        )
        factory: Callable[[str, Split], Any] = getattr(module, plugin["factory"])
    except (ImportError, SyntaxError, AttributeError, OSError) as error:
        raise UserError(
            f"data.path: {text}: expected a module and a function in it, found: {type(error).__name__}: {error}; correct "
            "data.path, or put the module where Python finds it"
        ) from error
    return factory


def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(source: Any, text: str) -> Source:
    missing = [member for member in _MEMBERS if not hasattr(source, member)]
    if missing:
        raise UserError(
            f"data.path: {text}: expected a source with {', '.join(_MEMBERS)}, found none of {', '.join(missing)}; add it"
        )
    if not len(source):
        raise UserError(f"data.path: {text}: expected images, found none; check what its argument names")
    return source

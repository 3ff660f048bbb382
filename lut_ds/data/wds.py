"""WebDataset's conventions: which members of a tar shard are one sample, which one is its image, and what its label is."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lut_ds.data.classes import parse_label
from lut_ds.data.tar import Member, TarWalk
from lut_ds.errors import UserError

IMAGES = (b"jpg", b"jpeg", b"png", b"webp", b"bmp", b"tif", b"tiff")
LABELS = (b"cls", b"json")
_KEY = re.compile(rb"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(rb"__[^/]*__(?:$|/)")
_LABEL_KEYS = ("label", "cls", "class")
_LONGEST_LABEL = 1 << 20

Sample = list[tuple[bytes, Member]]  # extension, lower case, and member


@dataclass
class ShardScan:
    """The samples of one shard, as columns, and what was left out."""

    size: int
    mtime_ns: int
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    without_image: int = 0

    def lengths(self) -> NDArray[np.int64]:
        """Bytes of the names, int64 [m]."""
        return np.fromiter(map(len, self.names), np.int64, len(self.names))


def split_key(name: bytes) -> tuple[bytes, bytes] | None:
    """Key and extension: `dir/key.seg.png` is (dir/key, seg.png), cut at the first dot of the base name.

    None for what WebDataset passes over: names without an extension, hidden files and `__meta__` members.
    """
    match = _KEY.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def group(members: Iterable[Member], path: Path) -> Iterator[Sample]:
    """Samples: members that follow each other with the same key; UserError when an extension comes twice in one."""
    sample: Sample = []
    current = None
    for member in members:
        parts = split_key(member.name)
        if parts is None:
            continue
        key, extension = parts
        if key != current:
            if sample:
                yield sample
            sample, current = [], key
        if any(extension == other for other, _ in sample):
            raise UserError(
                f"shard {path}: byte {member.offset}: expected one member of each extension in a sample, found a second "
                f"{member.name!r}; pack it again with other keys"
            )
        sample.append((extension, member))
    if sample:
        yield sample


def scan_shard(path: Path) -> ShardScan:
    """Walk a shard's headers and read its labels; UserError naming shard and offset where it is damaged."""
    with TarWalk(path) as tar:
        return scan_samples(group(tar, path), tar)


def scan_samples(samples: Iterable[Sample], tar: TarWalk) -> ShardScan:
    """The columns of samples whose places are known."""
    scan = ShardScan(tar.size, tar.mtime_ns)
    for sample in samples:
        image = image_of(sample)
        if image is None:
            scan.without_image += 1
            continue
        scan.names.append(image.name)
        scan.offsets.append(image.offset)
        scan.sizes.append(image.size)
        scan.labels.append(_label(sample, tar))
    return scan


def image_of(sample: Sample) -> Member | None:
    """The member that is the image: the first `key.jpg` (or other format), else the only `key.something.jpg`."""
    plain = [member for extension, member in sample if extension in IMAGES]
    if plain:
        return plain[0]
    others = [member for extension, member in sample if extension.rpartition(b".")[2] in IMAGES]
    return others[0] if len(others) == 1 else None


def _label(sample: Sample, tar: TarWalk) -> int | str | None:
    """The label in `key.cls` (a number or a class name) or in `key.json` (its `label`, `cls` or `class`)."""
    for extension, member in sorted((part for part in sample if part[0] in LABELS), key=lambda part: part[0]):
        if member.size > _LONGEST_LABEL:
            raise _bad_label(member, tar.path, f"{member.size} bytes")
        data = tar.read(member.offset, member.size)
        label = (
            _parse_json(data, member, tar.path) if extension == b"json" else parse_label(data.decode(errors="replace"))
        )
        if label is not None:
            if isinstance(label, int) and not -1 <= label < 1 << 31:
                raise _bad_label(member, tar.path, str(label))
            return None if label == -1 else label
    return None


def _parse_json(data: bytes, member: Member, path: Path) -> int | str | None:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _bad_label(member, path, f"text that is not JSON: {error}") from error
    values = [tree[key] for key in _LABEL_KEYS if key in tree] if isinstance(tree, dict) else [tree]
    if not values or values[0] is None:
        return None
    if isinstance(values[0], str | int) and not isinstance(values[0], bool):
        return values[0]
    raise _bad_label(member, path, repr(values[0])[:80])


def _bad_label(member: Member, path: Path, found: str) -> UserError:
    return UserError(
        f"shard {path}: byte {member.offset}: expected a class number or name in {member.name!r}, found {found}; correct it"
    )

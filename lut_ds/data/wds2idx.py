"""The text index that DALI's `wds2idx` writes beside a shard: `v1.2 SAMPLES`, then `extension offset size name` of each member."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lut_ds.data.tar import Member, TarWalk
from lut_ds.data.wds import Sample, ShardScan, group, scan_samples
from lut_ds.errors import UserError

_HEAD = re.compile(rb"(v1\.[12]) (\d+)")
_PART = re.compile(rb"(\S+) (\d+) (\d+) (.*?)(?= \S+ \d+ \d+ |$)")  # a name may hold spaces
_NAMELESS = re.compile(rb"(\S+) (\d+) (\d+)")  # v1.1


def idx_path(shard: Path) -> Path:
    """Where `wds2idx` puts the index of a shard: its name up to the first dot, and .idx."""
    return shard.with_name(shard.name.split(".", 1)[0] + ".idx")


def idx_paths(shards: Sequence[Path]) -> list[Path]:
    """`idx_path` of each shard; UserError when two shards would share one."""
    owners: dict[Path, Path] = {}
    for shard in shards:
        other = owners.setdefault(idx_path(shard), shard)
        if other != shard:
            raise UserError(
                f"shards {other} and {shard}: expected names that differ before their first dot, as wds2idx has them, found "
                f"one index {idx_path(shard).name} for both; rename them, or use `lut-ds data index` without .idx files"
            )
    return list(owners)


def read_idx(path: Path) -> list[Sample]:
    """The samples of an .idx file, without looking at the shard; UserError naming the line that does not fit."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"index {path}: cannot be read: {error.strerror or error}") from error
    head = _HEAD.fullmatch(lines[0].strip())
    if head is None:
        raise _fault(path, 1, "`v1.2 SAMPLES`", repr(lines[0][:40]))
    rows = lines[1 : 1 + int(head[2])]
    if len(rows) < int(head[2]) or (rows and not rows[-1]) or any(lines[1 + len(rows) :]):
        raise _fault(path, len(lines), f"{int(head[2])} samples", f"{len([row for row in lines[1:] if row])}")
    return [_sample(path, number, row, head[1] == b"v1.2") for number, row in enumerate(rows, 2)]


def _sample(path: Path, number: int, row: bytes, named: bool) -> Sample:
    pattern = _PART if named else _NAMELESS
    parts = list(pattern.finditer(row))
    if not parts or " ".join(m[0].decode("latin-1") for m in parts) != row.decode("latin-1"):
        raise _fault(path, number, "extension, offset, size (and name) of each member", repr(row[:60]))
    sample: Sample = []
    for part in parts:
        name = part[4] if named else b"sample %d.%s" % (number - 2, part[1])
        sample.append((part[1].lower(), Member(name, int(part[2]), int(part[3]))))
    return sample


def scan_idx(shard: Path, path: Path) -> ShardScan:
    """The samples of a shard as its .idx file has them; only labels are read from the shard.

    UserError when the .idx file points beyond the shard, or at a label that is no member of that size (`wds2idx` itself
    gives wrong places to members with GNU long names).
    """
    samples = read_idx(path)
    with TarWalk(shard) as tar:
        for number, sample in enumerate(samples, 2):
            for _, member in sample:
                if member.offset + member.size > tar.size:
                    raise _fault(path, number, f"places inside {shard.name} ({tar.size} bytes)", str(member.offset))
        return scan_samples(samples, tar)


def write_idx(shard: Path, path: Path) -> int:
    """Write the .idx file of a shard as `wds2idx` does, for DALI's webdataset reader; returns the number of samples.

    Unlike `wds2idx`, members with GNU long names get their true places. The file is written aside and renamed.
    """
    with TarWalk(shard) as tar:
        samples = list(group(tar, shard))
    if not samples:
        raise UserError(f"shard {shard}: expected samples, found none; an .idx file cannot be empty")
    lines = [f"v1.2 {len(samples)}".encode()]
    lines += [b" ".join(_part(extension, member) for extension, member in sample) for sample in samples]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(b"\n".join(lines) + b"\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(samples)


def _part(extension: bytes, member: Member) -> bytes:
    """One member; characters that would break the line are escaped as GNU tar lists them."""
    written = member.name[len(member.name) - len(extension) :]  # the case it has in the shard
    name = member.name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    return b"%s %d %d %s" % (written, member.offset, member.size, name)


def _fault(path: Path, line: int, expected: str, found: str) -> UserError:
    return UserError(f"index {path}: line {line}: expected {expected}, found {found}; write it again with `wds2idx`")

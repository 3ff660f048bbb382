"""Features of frozen models: computed once, by all ranks together, kept on disk in chunks, taken up again after a stop."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lut_ds.data.loader import EvalLoader
from lut_ds.data.progress import progress_bar
from lut_ds.data.sources import Source
from lut_ds.engine.launch import Ranks, discover_ranks, process_group, rank_cores
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer.labelled import labels_of
from lut_ds.transfer.models import Pool, Pretrained

CHUNK = 2048  # images of a file: at most so many are computed again after a stop
_LOOKED_AT = 256  # files whose size and time of change are part of a data set's identity
_VERSION = 1  # of what is computed; one more when features change


@dataclass(frozen=True)
class Compute:
    """Where and how features are computed.

    Attributes:
        ranks: this process among those that work together.
        batch_size: images a forward pass.
        threads: decoding threads.
        precision: of the forward pass: fp32, or bf16 autocast.
    """

    ranks: Ranks
    batch_size: int = 128
    threads: int = 4
    precision: str = "fp32"

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)


@contextmanager
def computing(batch_size: int = 128, threads: int | None = None, precision: str = "fp32") -> Iterator[Compute]:
    """A lone process, or the ranks that torchrun, srun or deepspeed started, joined while inside."""
    ranks = discover_ranks()
    with process_group(ranks) if ranks.world_size > 1 else nullcontext(), _whole_fp32():
        yield Compute(ranks, batch_size, threads or min(8, rank_cores()), precision)


@contextmanager
def _whole_fp32() -> Iterator[None]:
    """Inside, fp32 is fp32: not TF32, which torch takes for convolutions, and a training before in this process for products."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@dataclass(frozen=True)
class Features:
    """Features fp32 [N, D] and int64 labels [N] on the CPU, in the source's order; `computed`: images not from the cache."""

    values: Tensor
    labels: Tensor
    computed: int


def extract(found: Pretrained, pool: Pool, source: Source, split: str, cache: Path, compute: Compute) -> Features:
    """Features of every image of a source, each exactly once whatever the number of ranks.

    They are kept in `cache` under a hash of weights, data and transform: what is there is read, what is missing computed.

    Args:
        split: what to call the images in the progress line.
        cache: folder; with several ranks one that all of them see.

    Returns:
        The same on every rank.

    Raises:
        UserError: a model whose features are not finite, or that has no cls token where it is asked for.
        RunFault: an image that cannot be decoded, or a chunk that another rank did not write.
    """
    if pool == "cls" and found.model.cls_token is None:
        raise UserError("--pool: expected a model with a cls token, found one without; take --pool mean")
    labels = torch.from_numpy(labels_of(source))
    folder = cache / _key(found, pool, source, compute.precision)
    folder.mkdir(parents=True, exist_ok=True)
    counts = [min(CHUNK, len(source) - first) for first in range(0, len(source), CHUNK)]
    shape = found.model.num_features
    mine = range(compute.ranks.rank, len(counts), compute.ranks.world_size)
    missing = [i for i in mine if _read(folder, i, counts[i], shape) is None]
    _compute(found, pool, source, split, folder, missing, counts, compute)
    done = torch.tensor([sum(counts[i] for i in missing)], device=compute.ranks.device)
    if compute.ranks.world_size > 1:
        dist.all_reduce(done)  # also the barrier after which every chunk is there
    parts = [_read(folder, i, count, shape) for i, count in enumerate(counts)]
    lost = next((i for i, part in enumerate(parts) if part is None), None)
    if lost is not None:
        raise RunFault(
            f"features: {_file(folder, lost)}: not there, or damaged; --cache must be one folder for all nodes"
        )
    return Features(torch.cat([part for part in parts if part is not None]), labels, int(done))


def _compute(
    found: Pretrained,
    pool: Pool,
    source: Source,
    split: str,
    folder: Path,
    missing: list[int],
    counts: list[int],
    compute: Compute,
) -> None:
    """Write this rank's chunks that are not there yet."""
    if not missing:
        return
    samples = [i for chunk in missing for i in range(chunk * CHUNK, chunk * CHUNK + counts[chunk])]
    device = compute.ranks.device
    model = found.model.to(device)
    loader = EvalLoader(source, found.image_size, compute.batch_size, compute.threads, samples, device=device)
    held: list[Tensor] = []
    with progress_bar(f"features of {split}", len(samples)) as bar, torch.inference_mode():
        for pixels, _ in loader:
            with compute.autocast():
                values = found.features(found.normalised(pixels), pool)
            held.append(values.float().cpu())
            bar.update(len(pixels))
            while missing and sum(map(len, held)) >= counts[missing[0]]:
                chunk, rest = torch.cat(held).split_with_sizes(
                    [counts[missing[0]], sum(map(len, held)) - counts[missing[0]]]
                )
                _write(folder, missing[0], chunk)
                missing, held = missing[1:], [rest]
    model.cpu()


def _write(folder: Path, index: int, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise RunFault("features: NaN or infinity from finite weights; compute in fp32, or take another checkpoint")
    path = _file(folder, index)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({"features": values.contiguous()}, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(folder: Path, index: int, count: int, width: int) -> Tensor | None:
    """A chunk, None where it is not there whole."""
    try:
        values = load_file(_file(folder, index))["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return values if values.shape == (count, width) else None


def _file(folder: Path, index: int) -> Path:
    return folder / f"chunk_{index:06d}.safetensors"


def _key(found: Pretrained, pool: Pool, source: Source, precision: str) -> str:
    """Hash of all that the values depend on: weights, which images, and what is done with them."""
    transform = [_VERSION, found.image_size, found.mean, found.std, pool, precision, CHUNK]
    sizes = [found.record["weights"], found.record["sizes"], found.record["format"]]
    text = json.dumps([transform, sizes, data_identity(source)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def data_identity(source: Source) -> str:
    """SHA-256 of the names and labels of all images, and of size and time of change of 256 files spread over them."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    n = len(source)
    for i in range(n):
        digest.update(f"{source.label(i)} {source.name(i)}\n".encode(errors="surrogateescape"))
    for i in sorted({round(k * (n - 1) / (_LOOKED_AT - 1)) for k in range(_LOOKED_AT)}):
        try:
            info = os.stat(source.name(i))
        except OSError:  # a member of a shard, whose name is no path of its own
            continue
        digest.update(f"{info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()

"""Loaders that are measured side by side: each makes an endless iterator over batches of the same views of the same files."""

import importlib.util
import itertools
import math
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder as TorchvisionFolder

from lut_ds.config import Recipe
from lut_ds.data.tuning import Loading
from lut_ds.data.views import ViewSpec
from lut_ds.engine.reading import make_loader, open_source, view_specs

Batches = Iterator[list[Tensor]]


def ours(recipe: Recipe, batch_size: int, how: Loading, device: torch.device, work: Path) -> Batches:
    """`PretrainLoader` in this process, with `how.threads` threads; views uint8 [b, S, S, 3] on `device`."""
    assert recipe.data.path is not None
    source = open_source(recipe)
    loader = make_loader(recipe, source, global_batch=batch_size, micro_batch=batch_size, device=device, how=how)
    with loader:
        for batch in loader.batches(0, 1 << 40):
            yield batch.views


def torchvision(recipe: Recipe, batch_size: int, how: Loading, device: torch.device, work: Path) -> Batches:
    """The published way: ImageFolder, PIL transforms, DataLoader with `how.threads` processes; views uint8 [b, 3, S, S]."""
    assert recipe.data.path is not None
    root = Path(recipe.data.path)
    views = Views(recipe)
    data = TorchvisionFolder(str(root / "train" if (root / "train").is_dir() else root), views)
    return _epochs(data, batch_size, how.threads, device, shuffle=True)


def webdataset(recipe: Recipe, batch_size: int, how: Loading, device: torch.device, work: Path) -> Batches:
    """webdataset's reader over tar shards of the same files, with the same transforms in `how.threads` processes."""
    import webdataset as wds

    shards = _write_shards(recipe, work / "webdataset", how.threads)
    data = wds.WebDataset(shards, shardshuffle=len(shards), resampled=True).shuffle(64).decode("pil")
    data = data.to_tuple("jpg").map(lambda sample: (Views(recipe)(sample[0]), 0))
    return _epochs(data, batch_size, how.threads, device, shuffle=False)


Contender = Callable[[Recipe, int, Loading, torch.device, Path], Batches]
CONTENDERS: dict[str, Contender] = {"ours": ours, "torchvision": torchvision, "webdataset": webdataset}


def missing(name: str, recipe: Recipe) -> str | None:
    """Why a contender cannot run on these data here, or None."""
    root = Path(str(recipe.data.path))
    if name == "webdataset" and importlib.util.find_spec("webdataset") is None:
        return "webdataset is not installed"
    folder = root / "train" if (root / "train").is_dir() else root
    if name != "ours" and not (folder.is_dir() and any(p.is_dir() for p in folder.iterdir())):
        return f"needs class folders, {root} has none"
    return None


class Views:
    """The recipe's views of a PIL image as torchvision draws them: a list of uint8 [3, S, S]."""

    def __init__(self, recipe: Recipe) -> None:
        self._transforms = [published_transform(spec, recipe.model.image_size) for spec in view_specs(recipe)]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [transform(image.convert("RGB")) for transform in self._transforms]


def published_transform(spec: ViewSpec, size: int) -> Callable[[Image.Image], Tensor]:
    """The torchvision transforms of a view, without normalisation: ours leaves it to the kernels that read the pixels."""
    bicubic = T.InterpolationMode.BICUBIC
    if spec.kind == "resize_crop":
        steps: list[Any] = [T.Resize(size, bicubic), T.RandomCrop(size, padding=spec.pad, padding_mode="reflect")]
    else:
        steps = [T.RandomResizedCrop(size, spec.scale, spec.ratio, bicubic)]
    steps.append(T.RandomHorizontalFlip(spec.hflip))
    if (p := spec.photometric) is not None:
        jitter = T.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)
        solarize = T.RandomSolarize(p.solarize_threshold, p=1.0)
        steps.append(T.RandomApply([jitter], p.p))
        steps.append(T.RandomChoice([T.Grayscale(3), solarize, Blur(*p.blur_sigma)]))
    transform: Callable[[Image.Image], Tensor] = T.Compose([*steps, T.PILToTensor()])
    return transform


class Blur:
    """PIL's Gaussian blur with a radius drawn from U(low, high), as the published augmentation does."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def _epochs(data: Dataset[Any], batch_size: int, workers: int, device: torch.device, shuffle: bool) -> Batches:
    loader = DataLoader(
        data,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        drop_last=True,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    for _ in itertools.count():
        for views, _ in loader:
            yield [view.to(device, non_blocking=True) for view in views]


def _write_shards(recipe: Recipe, folder: Path, shards: int) -> list[str]:
    """Tar shards of a data set's files; left alone where they are already there."""
    assert recipe.data.path is not None
    source = open_source(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.tar" for i in range(shards)]
    each = math.ceil(len(source) / shards)
    for number, path in enumerate(paths):
        if path.is_file():
            continue
        aside = path.with_suffix(f".{os.getpid()}")
        with tarfile.open(aside, "w") as tar:
            for i in range(number * each, min((number + 1) * each, len(source))):
                tar.add(source.name(i), f"{i:08d}.jpg")
        os.replace(aside, path)
    return [str(path) for path in paths]

"""From a checkpoint to logits: by the classifier that it has, or by a linear probe fitted to its frozen features."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lut_ds.data.sources import Source
from lut_ds.errors import UserError
from lut_ds.transfer.features import Compute, data_identity, extract
from lut_ds.transfer.load import Kind
from lut_ds.transfer.models import PREFIX, Pool, Pretrained, load_model
from lut_ds.transfer.probe import Sweep, probe_features
from lut_ds.transfer.probe_accuracy import write_head, write_results

_OWN_POOLING = ("export", "timm")  # formats that say how tokens are pooled


@dataclass(frozen=True)
class Classifier:
    """Something that tells classes apart.

    Attributes:
        found: the encoder, on the device.
        logits: normalised images float [b, 3, S, S] -> float32 [b, C].
        classes: names by column; empty where the checkpoint does not say.
        count: C.
        crop: as `EvalLoader`'s.
        about: for results: `head` (its own, or a probe) and what belongs to it.
        fingerprint: SHA-256 of all weights and of what is done to pixels before them.
    """

    found: Pretrained
    logits: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    count: int
    crop: float
    about: dict[str, Any]
    fingerprint: str


def load_subject(source: str, kind: Kind | None, image_size: int | None, heads: int | None) -> Pretrained:
    """As `load_model`; of a folder that `lut-ds finetune` wrote, its best classifier."""
    best = Path(source) / "best"
    fine_tuned = not source.startswith(PREFIX) and (best / "config.json").is_file()
    return load_model(str(best) if fine_tuned else source, kind, image_size, heads)


def own_classifier(found: Pretrained, compute: Compute) -> Classifier:
    """The classifier that was in the checkpoint's file (`found.head` must not be empty).

    A file that does not say how tokens are pooled has their mean where it has an `fc_norm`, and else the cls token.

    Raises:
        UserError: a head of another width, or two heads (distilled models).
    """
    model, weight, bias = found.model, found.head["head.weight"], found.head["head.bias"]
    if hasattr(model, "head_dist") or weight.shape[1] != model.num_features or len(bias) != len(weight):
        raise UserError(
            f"checkpoint: {found.record['source']}: expected one linear head of width {model.num_features}, found "
            f"{list(weight.shape)}, or two heads; fine-tune the encoder, or remove the head"
        )
    if found.record["format"] not in _OWN_POOLING:
        model.global_pool = "avg" if "fc_norm.weight" in model.state_dict() else "token"
    model.head = nn.Linear(weight.shape[1], len(weight))
    model.head.load_state_dict({"weight": weight, "bias": bias})
    model.eval().to(compute.ranks.device)

    def logits(images: Tensor) -> Tensor:
        with compute.autocast():
            return model(images).float()

    classes = found.classes if len(found.classes) == len(weight) else ()
    about = {"head": "own", "classes": len(weight), "pool": model.global_pool}
    print_ = _fingerprint(found, found.head, model.global_pool, found.crop, compute.precision)
    return Classifier(found, logits, classes, len(weight), found.crop, about, print_)


def probed_classifier(
    found: Pretrained, pool: Pool, data: tuple[Source, Source], cache: Path, output: Path, compute: Compute
) -> Classifier:
    """A linear probe (`lut-ds probe`'s quick one) fitted to clean training images; a collective.

    It is kept in `output` and taken from there when weights and data are the same.

    Args:
        data: training and validation images with the same classes.
        cache: of features.
    """
    train, val = data
    sweep = Sweep()
    parts = [found.record["weights"], found.image_size, found.mean, found.std, pool, compute.precision]
    key = _hash([*parts, asdict(sweep), data_identity(train), data_identity(val)])
    shared = [_kept(output, key) if compute.ranks.main else None]
    if compute.ranks.world_size > 1:
        dist.broadcast_object_list(shared, src=0)  # rank 0's disk decides
    about, head = shared[0] or _fit(found, pool, data, sweep, cache, compute)
    if shared[0] is None and compute.ranks.main:
        write_head(output / "head.safetensors", head, train.classes)
        write_results(output / "head.json", {"key": key, **about})
    weight, bias = (head[name].to(compute.ranks.device) for name in ("head.weight", "head.bias"))
    found.model.to(compute.ranks.device)

    def logits(images: Tensor) -> Tensor:
        with compute.autocast():
            features = found.features(images, pool)
        return F.linear(features.float(), weight, bias)

    about = {"head": "linear probe on frozen features", "classes": len(train.classes), "pool": pool, **about}
    print_ = _fingerprint(found, head, pool, 0.875, compute.precision)
    return Classifier(found, logits, tuple(train.classes), len(train.classes), 0.875, about, print_)


def _fit(
    found: Pretrained, pool: Pool, data: tuple[Source, Source], sweep: Sweep, cache: Path, compute: Compute
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    train, val = (extract(found, pool, s, split, cache, compute) for s, split in zip(data, ("train", "val")))
    pairs = ((train.values, train.labels), (val.values, val.labels))
    results, head = probe_features(*pairs, data[0].classes, sweep, compute.ranks)
    return {"top1": results["top1"], "chosen": results["chosen"]}, head


def _kept(output: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What was written for `key` before, or None."""
    try:
        about = json.loads((output / "head.json").read_text())
        if about.pop("key") != key:
            return None
        return about, load_file(output / "head.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _fingerprint(found: Pretrained, head: Mapping[str, Tensor], pool: str, crop: float, precision: str) -> str:
    digest = hashlib.sha256()
    for name in ("head.weight", "head.bias"):
        digest.update(head[name].contiguous().cpu().numpy().tobytes())
    sizes = [found.record["weights"], found.record["sizes"], found.image_size, found.mean, found.std]
    return _hash([*sizes, digest.hexdigest(), pool, crop, precision])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

"""Cosine k-nearest neighbours on frozen features: the quickest look at what an encoder has learned.

Protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018: each of the k
most similar bank features votes for its class with weight exp(similarity / temperature).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source
from lut_ds.errors import UserError
from lut_ds.method.encoder import Encoder
from lut_ds.method.lut import encode_views, pool

Features = Callable[[Tensor], Tensor]
"""uint8 [b, S, S, 3] -> float [b, D]."""


def encoder_features(encoder: Encoder) -> Features:
    """The mean of the normed patch tokens of whole images."""

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        return pool(encode_views(encoder, [pixels.to(encoder.cls_token.device)], None))

    return features


def pixel_features(pixels: Tensor) -> Tensor:
    """The pixels themselves, in [0, 1]: uint8 [b, S, S, 3] -> float32 [b, S*S*3]."""
    return pixels.flatten(1).float() / 255


def extract_features(
    features: Features, source: Source, image_size: int, batch_size: int = 128, threads: int = 4
) -> tuple[Tensor, Tensor]:
    """Features of every image of a source, resized and centre-cropped to `image_size`.

    Returns:
        fp32 [N, D] and int64 labels [N], on the CPU, in the source's order.
    """
    found = [(features(pixels), labels) for pixels, labels in EvalLoader(source, image_size, batch_size, threads)]
    return torch.cat([f.float().cpu() for f, _ in found]), torch.cat([labels.cpu() for _, labels in found])


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Classes of `queries` for each k.

    Args:
        bank: float [N, D], with int64 `bank_labels` [N] in 0..C-1.
        queries: float [Q, D].
        ks: neighbours that vote; each in 1..N, and taken once.
        temperature: of the softmax over the neighbours' cosine similarities that weights the votes.
        chunk: queries compared at a time.

    Returns:
        int64 [Q] for each k; a tie goes to the lower class.
    """
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(f"ks: expected neighbours in 1..{len(bank)} (the size of the bank), found {list(ks)}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, found {temperature}")
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=1)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(chunk):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ bank.T).topk(max(ks), dim=1)
        voters = bank_labels[nearest]
        for k in predicted:
            # A softmax over the k neighbours: the class scores' order is that of sums of exp(similarity / temperature).
            weights = (similarity[:, :k] / temperature).softmax(dim=1)
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, voters[:, :k], weights)
            predicted[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def knn_top1(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], ks: Sequence[int] = (10, 20), temperature: float = 0.07
) -> dict[int, float]:
    """Per cent of `queries` (features [Q, D], labels [Q]) whose class the `bank` (features [N, D], labels [N]) tells, by k."""
    predicted = knn_predict(*bank, queries[0], ks, temperature)
    return {k: 100.0 * (classes == queries[1]).float().mean().item() for k, classes in predicted.items()}


def evaluate_knn(
    features: Features,
    train: Source,
    val: Source,
    image_size: int,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    batch_size: int = 128,
    threads: int = 4,
) -> dict[str, Any]:
    """k-NN accuracy on `val` with `train` as the bank.

    Returns:
        `top1` (per cent, by k as text), `temperature`, `bank` and `queries` (image counts).

    Raises:
        UserError: a source without classes, different classes in the two, or a k above the size of the bank.
    """
    if not train.classes or train.classes != val.classes:
        raise UserError(
            f"data.path: k-NN needs the same class folders in train and val, found {train.classes[:3]}... and "
            f"{val.classes[:3]}...; check both folders"
        )
    if max(ks) > len(train):
        raise UserError(f"k-NN: k {max(ks)} is above the {len(train)} training images; give a smaller k")
    bank = extract_features(features, train, image_size, batch_size, threads)
    queries = extract_features(features, val, image_size, batch_size, threads)
    top1 = {str(k): value for k, value in knn_top1(bank, queries, ks, temperature).items()}
    return {"top1": top1, "temperature": temperature, "bank": len(train), "queries": len(val)}

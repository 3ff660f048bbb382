"""What a fine-tuning starts from: labelled images of the same classes in train and val, and a pre-trained encoder that fits."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.config import Model
from lut_ds.data.sources import Source, open_source
from lut_ds.errors import UserError
from lut_ds.transfer.classifier import Loaded, load_encoder_weights, make_classifier
from lut_ds.transfer.config import FinetuneModel, FinetuneRecipe
from lut_ds.transfer.models import load_model
from lut_ds.transfer.published import HEADS


def open_labelled(recipe: FinetuneRecipe) -> tuple[Source, Source]:
    """Training and validation images of `data.path`: of the same classes, each with images in both.

    Raises:
        UserError: no such data, classes that differ, an empty class, or a label that is none of them.
    """
    path = recipe.data.path
    if path is None:
        raise UserError(
            "data.path: no images given; add data.path=DIR, where DIR holds train/<class>/*.jpg and val/<class>/*.jpg"
        )
    train_images, val = open_source(path, "train"), open_source(path, "val")
    if not train_images.classes:
        raise UserError(f"data.path: {path}: expected images in class folders, found images without classes; sort them")
    if odd := sorted(set(train_images.classes) ^ set(val.classes)) or [
        a for a, b in zip(train_images.classes, val.classes) if a != b
    ]:
        where = "train" if odd[0] in train_images.classes else "val"
        raise UserError(
            f"data.path: {path}: expected the same classes in train and val, found {len(train_images.classes)} and "
            f"{len(val.classes)}: {odd[0]!r} is in {where} only or elsewhere in the order; correct the folders"
        )
    for name, source in (("train", train_images), ("val", val)):
        try:
            counts = class_counts(source)
        except ValueError as error:
            raise UserError(f"data.path: {path}: {name}: {error}; correct the labels") from None
        if not counts.all():
            empty = source.classes[int(counts.argmin())]
            raise UserError(
                f"data.path: {path}: {name}: class {empty!r} has no images; add some, or remove it from both"
            )
    return train_images, val


def start_model(recipe: FinetuneRecipe, classes: list[str]) -> tuple[VisionTransformer, Loaded]:
    """The classifier with the weights of `model.source`, its head drawn from `run.seed`: the same on every rank.

    Raises:
        UserError: no such source, or one of another architecture.
    """
    m = recipe.model
    if m.source is None:
        raise UserError("model.source: no checkpoint given; name the run, checkpoint or .pth file to start from")
    found, state = encoder_state(m.source, m.weights, m)
    for key in ("patch_size", "width", "depth", "heads", "mlp_ratio"):
        if getattr(found, key) != getattr(m, key):
            raise UserError(
                f"checkpoint: {m.source}: expected model.{key} {getattr(m, key)} as in the recipe, found {getattr(found, key)}; "
                f"use the recipe of its size, or set model.{key}={getattr(found, key)}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = make_classifier(
            image_size=m.image_size,
            patch_size=m.patch_size,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            mlp_ratio=m.mlp_ratio,
            classes=len(classes),
            pool=m.pool,
            drop_path=m.drop_path,
            head_std=m.head_std,
        )
    return model, load_encoder_weights(model, state, m.source)


def encoder_state(
    source: str, kind: Literal["ema", "student"], recipe: FinetuneModel
) -> tuple[Model, dict[str, Tensor]]:
    """Sizes and state (timm's names) of any pre-trained ViT that `load_model` knows.

    The recipe's heads are those of a file whose width is not published, as its weights do not tell them.
    """
    found = load_model(source, kind, heads=None if recipe.width in HEADS else recipe.heads)
    if found.record.get("positions") == "sinusoid_1d" and found.image_size != recipe.image_size:
        raise UserError(
            f"checkpoint: {source}: its positions over the raster index (sinusoid_1d) mean nothing on another grid; set "
            f"model.image_size={found.image_size}"
        )
    hidden = found.model.blocks[0].mlp.fc1.out_features
    sizes = Model(
        **found.record["sizes"], image_size=found.image_size, mlp_ratio=hidden / found.record["sizes"]["width"]
    )
    return sizes, found.model.state_dict()


def sizes(recipe: FinetuneRecipe) -> Model:
    """The encoder's."""
    m = recipe.model
    return Model(
        image_size=m.image_size,
        patch_size=m.patch_size,
        width=m.width,
        depth=m.depth,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
    )


def class_counts(source: Source) -> NDArray[np.int64]:
    """Images of each class, int64 [classes]; ValueError naming the first image whose label is none of them."""
    labels = np.fromiter((source.label(i) for i in range(len(source))), np.int64, len(source))
    outside = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{source.name(first)}: expected a label from 0 to {len(source.classes) - 1}, found {labels[first]}"
        )
    return np.bincount(labels, minlength=len(source.classes))

"""What a fine-tuning starts from: labelled images of the same classes in train and val, and a pre-trained encoder that fits."""

from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer

from lut_ds.config import Model
from lut_ds.data.sources import Source
from lut_ds.errors import UserError
from lut_ds.transfer.classifier import Loaded, load_encoder_weights, make_classifier
from lut_ds.transfer.config import FinetuneModel, FinetuneRecipe
from lut_ds.transfer.labelled import open_labelled
from lut_ds.transfer.models import HEADS, Pretrained, load_model


def open_images(recipe: FinetuneRecipe) -> tuple[Source, Source]:
    """Training and validation images of `data.path`: of the same classes, each with images in both.

    Raises:
        UserError: no such data, classes that differ, an empty class, a label that is none of them, or fewer images than a batch.
    """
    if recipe.data.path is None:
        raise UserError(
            "data.path: no images given; add data.path=DIR, where DIR holds train/<class>/*.jpg and val/<class>/*.jpg"
        )
    train, val = open_labelled(recipe.data.path)
    if len(train) < recipe.train.global_batch:
        raise UserError(
            f"train.global_batch: expected at most the {len(train)} training images of data.path, found "
            f"{recipe.train.global_batch}; lower train.global_batch or add images"
        )
    return train, val


def start_model(recipe: FinetuneRecipe, classes: list[str]) -> tuple[VisionTransformer, Loaded]:
    """The classifier with the weights of `model.source`, its head drawn from `run.seed`: the same on every rank.

    Raises:
        UserError: no such source, or one of another architecture.
    """
    m = recipe.model
    if m.source is None:
        raise UserError("model.source: no checkpoint given; name the run, checkpoint or .pth file to start from")
    found, source = _pretrained(m)
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
    loaded = load_encoder_weights(model, source.model.state_dict(), m.source)
    return model, replace(loaded, not_read=source.record["left_out"])


def _pretrained(recipe: FinetuneModel) -> tuple[Model, Pretrained]:
    """The source, any pre-trained ViT that `load_model` knows, and its sizes.

    The recipe's heads are those of a file whose width is not published, as its weights do not tell them.
    """
    source = str(recipe.source)
    found = load_model(source, recipe.weights, heads=None if recipe.width in HEADS else recipe.heads)
    if found.record.get("positions") == "sinusoid_1d" and found.image_size != recipe.image_size:
        raise UserError(
            f"checkpoint: {source}: its positions over the raster index (sinusoid_1d) mean nothing on another grid; set "
            f"model.image_size={found.image_size}"
        )
    hidden = found.model.blocks[0].mlp.fc1.out_features
    sizes = Model(
        **found.record["sizes"], image_size=found.image_size, mlp_ratio=hidden / found.record["sizes"]["width"]
    )
    return sizes, found


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

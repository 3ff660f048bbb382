"""State-dict names: ours, and those of the published LUT and MAE implementations (which share timm's for the encoder)."""

from collections.abc import Mapping

from torch import Tensor

# Published prefix -> ours. The longest match wins; everything unlisted belongs to the encoder.
_PUBLISHED = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "head.": "projector.",
    "predictor.": "predictor.",
}


def from_published(name: str) -> str:
    """Our name of an entry of a published LUT or MAE pre-training state dict."""
    for published, ours in _PUBLISHED.items():
        if name.startswith(published):
            return ours + name[len(published) :]
    return "encoder." + name


def to_published(name: str) -> str:
    """The published name of one of our entries."""
    for published, ours in _PUBLISHED.items():
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name.removeprefix("encoder.")


def convert_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole published state dict in our names; the `ema.` prefix of LUT's saved teacher is removed."""
    return {from_published(name.removeprefix("ema.")): value for name, value in state.items()}

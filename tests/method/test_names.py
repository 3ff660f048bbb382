"""State-dict names, both ways, for every entry."""

from pathlib import Path

import pytest
import torch

from lut_ds.method.names import convert_published, from_published, to_published
from tests.golden_data import golden_files, load_golden
from tests.method.builders import lut_from, mae_from, small


@pytest.mark.parametrize("path", golden_files("*_[a-d].safetensors"), ids=lambda path: path.stem)
def test_golden_names_map_both_ways(path: Path) -> None:
    golden = load_golden(path)
    published = golden.group("student") or golden.group("model")
    model = (lut_from if "student.cls_token" in golden.tensors else mae_from)(golden.config)
    ours = {from_published(name) for name in published}
    assert ours == model.state_dict().keys()
    assert {to_published(name) for name in ours} == published.keys()


def test_names_are_one_to_one() -> None:
    state = lut_from(small(depth_head=3, depth_pred=3)).state_dict()
    published = [to_published(name) for name in state]
    assert len(set(published)) == len(published)
    assert [from_published(name) for name in published] == list(state)


def test_a_saved_teacher_loses_its_prefix() -> None:
    state = lut_from(small()).state_dict()
    saved = {"ema." + to_published(name): value for name, value in state.items()}
    converted = convert_published(saved)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "published,ours",
    [
        ("cls_token", "encoder.cls_token"),
        ("pos_embed", "encoder.pos_embed"),
        ("norm.weight", "encoder.norm.weight"),
        ("patch_embed.proj.weight", "encoder.patch_embed.proj.weight"),
        ("blocks.3.attn.qkv.bias", "encoder.blocks.3.attn.qkv.bias"),
        ("mask_token", "decoder.mask_token"),
        ("decoder_pos_embed", "decoder.pos_embed"),
        ("decoder_embed.weight", "decoder.embed.weight"),
        ("decoder_blocks.1.mlp.fc1.bias", "decoder.blocks.1.mlp.fc1.bias"),
        ("decoder_norm.bias", "decoder.norm.bias"),
        ("decoder_pred.weight", "decoder.pred.weight"),
        ("head.1.running_mean", "projector.1.running_mean"),
        ("predictor.3.weight", "predictor.3.weight"),
    ],
)
def test_names(published: str, ours: str) -> None:
    assert from_published(published) == ours
    assert to_published(ours) == published

"""The stored numbers of the published implementation, through the kernels."""

import pytest
import torch
from lut_kernels import embed_tokens, gather_patches, kernels_mode, reconstruction_loss, unshuffle_tokens

from tests.golden_data import Golden, golden_files, load_golden


def cases(pattern: str) -> list[Golden]:
    """The stored iterations."""
    return [load_golden(path) for path in golden_files(pattern)]


@pytest.mark.parametrize("golden", cases("mae_*.safetensors"), ids=lambda golden: golden.path.stem)
def test_golden_patches_loss_and_tokens(golden: Golden) -> None:
    patch = golden.config["patch_size"]
    view, mask, pred, restore = (golden[name] for name in ("in.view", "out.mask", "out.pred", "out.ids_restore"))
    hidden = mask.nonzero()[:, 1].view(len(mask), -1)
    chosen = pred.gather(1, hidden[:, :, None].expand(-1, -1, pred.shape[2]))
    kept = golden["out.latent"].shape[1] - 1
    ids = restore.argsort(1)[:, :kept]
    weights = golden.group("model")
    rows = golden["out.patchified_input"].gather(1, ids[:, :, None].expand(-1, -1, pred.shape[2]))
    decoder_width = weights["mask_token"].shape[2]
    latent = golden["out.latent"] @ weights["decoder_embed.weight"].T + weights["decoder_embed.bias"]
    results = {}
    for mode in ("triton", "torch"):
        with kernels_mode(mode):
            assert torch.equal(gather_patches(view, ids, patch), rows)
            assert torch.equal(gather_patches(view, None, patch), golden["out.patchified_input"])
            loss = reconstruction_loss(chosen, view, hidden, patch, norm_pix=golden.path.stem.endswith("a"))
            assert abs(loss - golden["out.loss"]) < 5e-6
            tokens = embed_tokens(golden["out.latent"][:, 1:], weights["cls_token"], weights["pos_embed"], ids)
            full = unshuffle_tokens(latent, weights["mask_token"], weights["decoder_pos_embed"], restore)
            results[mode] = (tokens, full)
    assert results["triton"][1].shape == (len(mask), 1 + mask.shape[1], decoder_width)
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)

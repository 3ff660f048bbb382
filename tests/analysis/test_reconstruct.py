import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lut_kernels import gather_patches
from PIL import Image

from lut_ds.analysis.reconstruct import (
    HIDDEN_GRAY,
    draw_reconstruction,
    fixed_noise,
    paste_patches,
    reconstruct,
    write_reconstruction,
)
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import ImageFolder
from lut_ds.method.decoder import Decoder
from lut_ds.method.encoder import Encoder
from lut_ds.method.lut import IMAGENET_MEAN, IMAGENET_STD, MAE
from lut_ds.transfer.load import find_checkpoint, load_student


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), grid=st.integers(1, 5), side=st.integers(1, 4), data=st.data())
def test_patches_land_where_gather_reads_them(batch, grid, side, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    shape = (batch, grid * side, grid * side, 3)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    count = data.draw(st.integers(1, grid * grid))
    ids = torch.rand(batch, grid * grid, generator=generator).argsort(1)[:, :count]
    patches = torch.randint(256, (batch, count, side, side, 3), generator=generator, dtype=torch.uint8)
    before = pixels.clone()
    pasted = paste_patches(pixels, ids, patches)
    assert torch.equal(pixels, before)
    read = (gather_patches(pasted, ids, side) * 255).round().to(torch.uint8)
    assert torch.equal(read.view_as(patches), patches)
    untouched = torch.ones(batch, grid * grid, dtype=torch.bool).scatter_(1, ids, False)
    rest = [gather_patches(p, None, side)[untouched] for p in (pasted, pixels)]
    assert torch.equal(*rest)


class Oracle(torch.nn.Module):
    """A decoder that knows the answer."""

    def __init__(self, pixels, side, norm_pix):
        super().__init__()
        self.pixels, self.side, self.norm_pix = pixels, side, norm_pix

    def forward(self, latent, ids_restore, ids_predict):
        rows = gather_patches(self.pixels, ids_predict, self.side, IMAGENET_MEAN, IMAGENET_STD)
        if self.norm_pix:
            rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()
        return rows


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_gives_back_the_image(norm_pix):
    pixels = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8)
    student = MAE(Encoder(16, 4, 32, 1, 2), Decoder(32, 4, 16, 1, 2, 48), norm_pix=norm_pix)
    student.decoder = Oracle(pixels, 4, norm_pix)
    found = reconstruct(student, pixels, fixed_noise(4, 16))
    assert np.array_equal(found.predicted, pixels.numpy())
    assert np.array_equal(found.original, pixels.numpy())


def test_exactly_the_hidden_patches_are_gray_and_replaced(lut_run):
    checkpoint = find_checkpoint(lut_run)
    student = load_student(checkpoint)
    pixels, _ = next(iter(EvalLoader(ImageFolder(lut_run / "data", "val"), 32, 6, 1)))
    noise = fixed_noise(6, checkpoint.recipe.model.patches)
    assert torch.equal(noise, fixed_noise(6, checkpoint.recipe.model.patches))
    found = reconstruct(student, pixels, noise)
    hidden = student.mask(noise).mask(0).bool()
    side = checkpoint.recipe.model.patch_size
    tiles = {
        name: gather_patches(torch.from_numpy(getattr(found, name)), None, side) * 255
        for name in ("original", "masked", "predicted")
    }
    assert hidden.sum(1).tolist() == [12] * 6
    assert (tiles["masked"][hidden] == HIDDEN_GRAY).all()
    assert torch.equal(tiles["masked"][~hidden], tiles["original"][~hidden])
    assert torch.equal(tiles["predicted"][~hidden], tiles["original"][~hidden])
    assert not torch.equal(tiles["predicted"][hidden], tiles["original"][hidden])


def test_the_panel_shows_every_sample(tmp_path):
    pixels = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8)
    student = MAE(Encoder(16, 4, 32, 1, 2), Decoder(32, 4, 16, 1, 2, 48))
    found = reconstruct(student, pixels, fixed_noise(5, 16))
    path = write_reconstruction(tmp_path / "deep" / "panel.png", found, list("abcde"), blocks=2)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert [p.name for p in path.parent.iterdir()] == ["panel.png"]
    from lut_ds.analysis.figures import LIGHT

    figure = draw_reconstruction(found, list("abcde"), blocks=2)(LIGHT)
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 15
    for images in (found.original, found.masked, found.predicted):
        assert all(any(np.array_equal(image, s) for s in shown) for image in images)

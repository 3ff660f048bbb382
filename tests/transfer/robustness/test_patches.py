"""Hidden and shuffled patches, by counting; the attention that says which are salient, by timm's own."""

import numpy as np
import torch

from lut_ds.transfer.models import load_model
from lut_ds.transfer.robustness.patches import hide, random_orders, salient_orders, shuffle


def images(count=3, side=32):
    return np.random.default_rng(0).integers(1, 256, (count, side, side, 3)).astype(np.uint8)


def black(pixels, patch):
    cells = pixels.reshape(len(pixels), 32 // patch, patch, 32 // patch, patch, 3)
    return (cells == 0).all(axis=(2, 4, 5))


def test_so_many_patches_are_black_and_the_rest_is_untouched():
    x, orders = images(), random_orders(16, 0, [7, 8, 9])
    before = None
    for ratio, count in ((0.25, 4), (0.5, 8), (0.9, 14)):
        found = hide(x, orders, ratio, 8)
        gone = black(found, 8)
        assert gone.sum(axis=(1, 2)).tolist() == [count] * 3
        keep = ~gone.repeat(8, axis=1).repeat(8, axis=2)
        assert np.array_equal(found[keep], x[keep])
        assert before is None or (gone >= before).all(), "hidden at one ratio, hidden at a higher one"
        before = gone
    assert not np.array_equal(gone[0], gone[1])
    row, column = divmod(int(orders[0, 0]), 4)
    assert black(hide(x, orders, 1 / 16, 8), 8)[0, row, column]


def test_patches_are_drawn_by_seed_and_sample():
    assert np.array_equal(random_orders(16, 3, [5, 6]), random_orders(16, 3, [5, 6]))
    assert np.array_equal(random_orders(16, 3, [5, 6])[1], random_orders(16, 3, [6])[0])
    assert not np.array_equal(random_orders(16, 3, [5]), random_orders(16, 4, [5]))


def test_shuffled_cells_are_the_same_cells_elsewhere():
    x = images()
    for grid in (2, 4, 16):
        found, side = shuffle(x, grid, 1, [0, 1, 2]), 32 // grid

        def cells(image, side=side, grid=grid):
            cut = [image[side * i :, side * j :][:side, :side].tobytes() for i in range(grid) for j in range(grid)]
            return cut

        for before, after in zip(x, found):
            assert sorted(cells(before)) == sorted(cells(after))
            assert grid == 2 or cells(before) != cells(after)
    assert np.array_equal(shuffle(x, 4, 1, [0, 1, 2])[2], shuffle(x[2:], 4, 1, [2])[0])


def test_salience_is_the_attention_of_the_last_block(lut_run):
    found = load_model(lut_run)
    pixels = images(5)
    normalised = found.normalised(torch.from_numpy(pixels))
    orders = salient_orders(found.model, normalised)
    attention, seen = found.model.blocks[-1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found.model.forward_features(normalised)
    assert len(seen) == 1, "timm's plain attention was run"
    weights = seen[0].mean(dim=1)[:, 0, 1:]
    ranked = weights.gather(1, torch.from_numpy(orders))
    assert (ranked.diff(dim=1) <= 1e-6).all()
    assert sorted(orders[0].tolist()) == list(range(16))

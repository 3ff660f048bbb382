"""Wrong shapes, dtypes and devices are refused by name."""

from collections.abc import Callable

import pytest
import torch
from lut_kernels import attention, embed_tokens, gather_patches, reconstruction_loss, unshuffle_tokens

PIXELS = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
IDS = torch.zeros(2, 3, dtype=torch.int64)
X, CLS, POS = torch.zeros(2, 3, 4), torch.zeros(1, 1, 4), torch.zeros(1, 5, 4)
RESTORE = torch.zeros(2, 4, dtype=torch.int64)
PRED = torch.zeros(2, 3, 48)

CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: gather_patches(PIXELS[0], IDS, 4), ValueError, r"pixels: expected shape \[\*, \*, \*, 3\], found"),
    (lambda: gather_patches(PIXELS.int(), IDS, 4), TypeError, "pixels: expected dtype uint8, .* found int32"),
    (lambda: gather_patches(PIXELS, IDS, 3), ValueError, "pixels: .* divisible by patch_size 3, found 8x8"),
    (lambda: gather_patches(PIXELS, IDS.int(), 4), TypeError, "ids: expected dtype int64, found int32"),
    (lambda: gather_patches(PIXELS, IDS[:1], 4), ValueError, r"ids: expected shape \[2, \*\], found \[1, 3\]"),
    (lambda: gather_patches(PIXELS, IDS.to("meta"), 4), ValueError, "ids: expected device cpu .* found meta"),
    (lambda: gather_patches(PIXELS, IDS, 4, dtype=torch.int64), TypeError, "dtype: .* found int64"),
    (lambda: gather_patches(PIXELS, IDS, 4, mean=(1, 2)), ValueError, "mean: expected 3 values, found 2"),
    (lambda: gather_patches(PIXELS, IDS, 4, std=(1, 0, 1)), ValueError, "std: expected 3 positive values"),
    (lambda: gather_patches(torch.zeros(2, 3, 8, 8), IDS, 4, std=(1, 1, 1)), ValueError, "std: expected None"),
    (lambda: embed_tokens(X.long(), CLS, POS, IDS), TypeError, "x: expected dtype .* found int64"),
    (lambda: embed_tokens(X, CLS[..., :3], POS, IDS), ValueError, r"cls_token: expected shape \[1, 1, 4\]"),
    (lambda: embed_tokens(X, CLS, POS, None), ValueError, r"pos_embed: expected shape \[1, 4, 4\]"),
    (lambda: embed_tokens(X, CLS, POS, IDS[:, :2]), ValueError, r"ids: expected shape \[2, 3\], found \[2, 2\]"),
    (lambda: embed_tokens(X, CLS.to("meta"), POS, IDS), ValueError, "cls_token: expected device cpu"),
    (lambda: unshuffle_tokens(X, CLS, POS, RESTORE[:, :3]), ValueError, r"ids_restore: expected shape \[2, 4\]"),
    (lambda: unshuffle_tokens(X, CLS, POS, RESTORE.float()), TypeError, "ids_restore: expected dtype int64"),
    (lambda: unshuffle_tokens(X[:, :0], CLS, POS, RESTORE), ValueError, "x: expected 1 to 5 tokens .* found 0"),
    (lambda: unshuffle_tokens(X, CLS[0], POS, RESTORE), ValueError, "mask_token: expected shape"),
    (lambda: reconstruction_loss(PRED[..., :5], PIXELS, IDS, 4), ValueError, r"pred: expected shape \[2, 3, 48\]"),
    (lambda: reconstruction_loss(PRED.int(), PIXELS, IDS, 4), TypeError, "pred: expected dtype"),
    (lambda: reconstruction_loss(PRED.to("meta"), PIXELS, IDS, 4), ValueError, "pred: expected device cpu"),
    (lambda: attention(torch.zeros(2, 3, 10), 2), ValueError, "num_heads: expected a divisor of 10 / 3"),
    (lambda: attention(torch.zeros(2, 3), 2), ValueError, "qkv: expected shape"),
    (lambda: attention(torch.zeros(2, 3, 12, dtype=torch.int64), 2), TypeError, "qkv: expected dtype"),
]


@pytest.mark.parametrize("call, error, message", CASES)
def test_refused_by_name(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wrong", [-1, 4, 2**62, -(2**63)])
def test_index_out_of_range(wrong: int) -> None:
    ids, restore = IDS.clone(), torch.arange(4).repeat(2, 1)
    ids[1, 2] = restore[1, 3] = wrong
    for name, call in (
        ("ids", lambda: gather_patches(PIXELS, ids, 4)),
        ("ids", lambda: embed_tokens(X, CLS, POS, ids)),
        ("ids_restore", lambda: unshuffle_tokens(X, CLS, POS, restore)),
        ("ids", lambda: reconstruction_loss(PRED, PIXELS, ids, 4)),
    ):
        with pytest.raises(IndexError, match=f"^{name}: expected values from 0 to 3, found {wrong}$"):
            call()


def test_a_shuffle_that_is_no_permutation() -> None:
    restore = torch.tensor([[3, 1, 0, 2], [0, 1, 1, 2]])
    with pytest.raises(ValueError, match=r"ids_restore: expected a permutation .* found a value twice in row 1"):
        unshuffle_tokens(X, CLS, POS, restore)

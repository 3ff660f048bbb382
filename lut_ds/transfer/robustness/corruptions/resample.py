"""Separable filters as matrices: blurs and zooms of any width at the cost of two products."""

import functools

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

Matrix = NDArray[np.float32]


def along_both(matrix: Matrix, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply a filter [S, S] to the rows and columns of [S, S] or [S, S, 3]."""
    turned = image
    for _ in range(2):  # one axis, then the other, as products with few long columns
        product = matrix @ turned.reshape(len(image), -1)
        turned = np.ascontiguousarray(product.reshape(image.shape).swapaxes(0, 1))
    return turned


@functools.lru_cache(maxsize=64)
def blur_matrix(side: int, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Matrix:
    """A Gaussian of `sigma` pixels with scipy's border `mode`, cut at `truncate` deviations."""
    identity = np.eye(side)
    blurred = gaussian_filter1d(identity, sigma, axis=0, mode=mode, truncate=truncate) if sigma > 0 else identity
    return blurred.astype(np.float32)


@functools.lru_cache(maxsize=64)
def zoom_matrix(side: int, factor: float) -> Matrix:
    """Enlarge about the centre, linearly interpolated, and cut to the same size.

    As the published code: the central ceil(S / factor) pixels, whose ends stay ends when they become round(that * factor).
    """
    cropped = int(np.ceil(side / factor))
    size = round(cropped * factor)
    first, trim = (side - cropped) // 2, (size - side) // 2
    at = (np.arange(side) + trim) * ((cropped - 1) / max(size - 1, 1))
    low = np.minimum(at.astype(int), cropped - 1)
    high, share = np.minimum(low + 1, cropped - 1), at - low
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side), first + low), 1 - share)
    np.add.at(matrix, (np.arange(side), first + high), share)
    return matrix.astype(np.float32)

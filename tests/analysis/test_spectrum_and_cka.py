"""Spectra of features of known rank, and the similarity of known representations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.analysis import cka, spectrum
from lut_ds.analysis.cka import MinibatchCKA, gram, unbiased_hsic
from lut_ds.analysis.figures import LIGHT
from lut_ds.analysis.spectrum import centred_spectrum, effective_rank
from lut_ds.errors import UserError
from tests.analysis.models import small_vit, subject


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 6), extra=st.integers(0, 6), offset=st.floats(-50, 50))
def test_equal_directions_are_counted(rank, extra, offset):
    basis = torch.linalg.qr(randn(12, 12)).Q
    rows = torch.cat([basis[:rank], -basis[:rank], torch.zeros(extra, 12)]) + offset
    values = centred_spectrum(rows.double())
    assert (values > 1e-6).sum() == rank
    assert effective_rank(values) == pytest.approx(rank, rel=1e-4)


def test_unequal_values_count_by_their_entropy():
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(torch.zeros(3)) == 0.0


def test_a_models_spectra_are_those_of_its_features():
    shown = subject(small_vit(), images=20)
    found = spectrum.measure(shown).numbers
    images = torch.cat(list(shown.batches()))
    with torch.no_grad():
        tokens = shown.model.forward_features(images)[:, 1:].double().numpy()
    pooled = tokens.mean(axis=1)
    values = np.linalg.svd(pooled - pooled.mean(axis=0), compute_uv=False)[:19]
    np.testing.assert_allclose(found["image"]["log_singular_values"], np.log(values / values[0]), atol=1e-3)
    within = (tokens - tokens.mean(axis=1, keepdims=True)).reshape(-1, 24)
    values = np.linalg.svd(within, compute_uv=False)
    logs = found["token"]["log_singular_values"]
    np.testing.assert_allclose(logs, np.log(values / values[0])[: len(logs)], atol=1e-3)
    assert found["image"]["rank_bound"] == 19
    assert found["token"]["rank_bound"] == 24
    assert found["image"]["effective_rank"] <= 19
    assert len(found["effective_rank_by_layer"]) == 4


def test_images_that_are_all_alike_have_rank_zero():
    shown = subject(small_vit(), images=6)
    shown.pixels[:] = shown.pixels[:1].clone()
    found = spectrum.measure(shown).numbers
    assert found["image"] == {"log_singular_values": [], "effective_rank": 0.0, "rank_bound": 5}


def similarity(x, y, batch=32):
    sums = MinibatchCKA()
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        sums.add(gram(a)[None], gram(b)[None])
    return float(sums.value())


def test_the_estimator_is_the_u_statistic():
    x, y = (gram(randn(6, 3, seed=s)) for s in (0, 1))
    terms = [x[i, j] * (y[i, j] + y[q, r] - 2 * y[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert float(unbiased_hsic(x[None], y[None])) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-9)


def test_the_similarity_of_a_representation_to_itself_is_one():
    x = randn(96, 7)
    assert similarity(x, x) == pytest.approx(1, abs=1e-9)
    rotation = torch.linalg.qr(randn(7, 7, seed=2)).Q
    assert similarity(x, 0.3 * x @ rotation + 100) == pytest.approx(1, abs=1e-4)


def test_it_is_invariant_to_rotation_scale_and_shift_but_not_to_stretching():
    x = randn(128, 6)
    y = x @ randn(6, 9, seed=1) + randn(128, 9, seed=2)
    base = similarity(x, y)
    assert 0.2 < base < 0.98
    rotation = torch.linalg.qr(randn(9, 9, seed=3)).Q
    assert similarity(x, 7 * y @ rotation - 3) == pytest.approx(base, abs=1e-4)
    stretched = y.clone()
    stretched[:, 0] *= 20
    assert abs(similarity(x, stretched) - base) > 0.02


def test_independent_representations_are_near_zero_with_few_images_and_many_dimensions():
    x, y = randn(640, 400, seed=4), randn(640, 400, seed=5)
    assert abs(similarity(x, y, batch=16)) < 0.05  # the biased estimate is above 0.9 here


def test_layers_of_a_model_and_of_two():
    shown = subject(small_vit(), images=21)  # the last batch has 5
    own = cka.measure([shown])["model"].numbers
    square = np.array(own["cka"])
    np.testing.assert_allclose(np.diag(square), 1, atol=1e-6)
    np.testing.assert_allclose(square, square.T, atol=1e-6)
    assert (square[0, 1:] < 0.999).all()
    assert own["images"] == 21
    twin = subject(small_vit(), images=21, name="twin")
    other = subject(small_vit(depth=2), images=21, name="other")
    np.testing.assert_allclose(cka.measure([shown, twin])["between"].numbers["cka"], square, atol=1e-5)
    found = cka.measure([shown, other])
    assert np.array(found["between"].numbers["cka"]).shape == (4, 3)
    titles = [axis.get_title(loc="left") + axis.get_title() for axis in cka.draw(LIGHT, list(found.items())).axes]
    assert {"model", "other", "Between the two"} <= set(titles)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="--images: cka needs at least 4 images, found 3"):
        cka.measure([subject(small_vit(), images=3)])

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_ds.data.sources import ImageFolder
from lut_ds.errors import UserError
from lut_ds.transfer.knn import encoder_features, evaluate_knn, extract_features, knn_predict, knn_top1, pixel_features
from lut_ds.transfer.load import find_checkpoint, load_encoder


def slow_votes(bank, labels, query, k, temperature):
    """One query, one neighbour at a time."""
    similarity = [float(F.cosine_similarity(query, b, dim=0)) for b in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = [0.0] * (int(labels.max()) + 1)
    for i in nearest:
        votes[int(labels[i])] += float(torch.tensor(similarity[i] / temperature, dtype=torch.float64).exp())
    return votes


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(2, 30),
    q=st.integers(1, 9),
    d=st.integers(2, 12),
    classes=st.integers(1, 5),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    data=st.data(),
)
def test_votes_are_those_of_the_written_out_protocol(n, q, d, classes, chunk, temperature, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    bank = torch.randn(n, d, generator=generator)
    queries = torch.randn(q, d, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    ks = [n, data.draw(st.integers(1, n)), 1, n]  # in any order, some named twice
    predicted = knn_predict(bank, labels, queries, ks, temperature, chunk)
    for k in ks:
        for row, query in enumerate(queries):
            votes = slow_votes(bank, labels, query, k, temperature)
            assert votes[int(predicted[k][row])] == pytest.approx(max(votes), rel=1e-4)


def test_scale_of_the_features_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = torch.arange(50) % 4
    scales = torch.rand(50, 1, generator=generator) + 0.1
    assert torch.equal(
        knn_predict(bank, labels, queries, [5])[5], knn_predict(bank * scales, labels, 7 * queries, [5])[5]
    )


def test_near_votes_outweigh_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([1, 0, 0])
    query = torch.tensor([[1.0, 0.05]])
    assert knn_predict(bank, labels, query, [3], temperature=0.07)[3].tolist() == [1]
    assert knn_predict(bank, labels, query, [3], temperature=10.0)[3].tolist() == [0]


def test_top1_is_per_cent():
    features, labels = torch.eye(4), torch.arange(4)
    assert knn_top1((features, labels), (features, torch.tensor([0, 1, 2, 0])), [1]) == {1: 75.0}


@pytest.mark.parametrize("ks", [[], [0], [5]])
def test_impossible_k_is_named(ks):
    with pytest.raises(ValueError, match=r"ks: expected neighbours in 1\.\.4"):
        knn_predict(torch.eye(4), torch.arange(4), torch.eye(4), ks)


def test_raw_pixels_tell_digits_apart_and_shuffled_labels_do_not(lut_run):
    train, val = (ImageFolder(lut_run / "data", split) for split in ("train", "val"))
    result = evaluate_knn(pixel_features, train, val, 32, [1, 10], threads=2)
    assert result["top1"]["10"] > 95
    assert (result["bank"], result["queries"]) == (len(train), len(val))
    bank = extract_features(pixel_features, train, 32, threads=2)
    queries = extract_features(pixel_features, val, 32, threads=2)
    assert knn_top1(bank, queries, [10])[10] == pytest.approx(result["top1"]["10"])
    shuffled = bank[1][torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    assert knn_top1((bank[0], shuffled), queries, [10])[10] < 25


def test_features_are_those_of_timm_on_normalised_images(lut_run):
    encoder = load_encoder(find_checkpoint(lut_run), "ema")
    val = ImageFolder(lut_run / "data", "val")
    features, labels = extract_features(encoder_features(encoder), val, 32, threads=2)
    pixels, again = extract_features(pixel_features, val, 32, threads=2)
    assert torch.equal(labels, again)
    assert labels.tolist() == [val.label(i) for i in range(len(val))]
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ((pixels[:16].view(-1, 32, 32, 3) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = encoder.forward_features(images)[:, 1:].mean(1)
    torch.testing.assert_close(features[:16], expected, atol=1e-5, rtol=1e-4)


def test_different_classes_in_train_and_val_are_refused(lut_run, tmp_path):
    (tmp_path / "val" / "zebra").mkdir(parents=True)
    source = next((lut_run / "data" / "val" / "3").glob("*.jpg"))
    (tmp_path / "val" / "zebra" / "a.jpg").write_bytes(source.read_bytes())
    train, val = ImageFolder(lut_run / "data", "train"), ImageFolder(tmp_path, "val")
    with pytest.raises(UserError, match="same class folders"):
        evaluate_knn(pixel_features, train, val, 32)
    with pytest.raises(UserError, match="smaller k"):
        evaluate_knn(pixel_features, train, train, 32, [10**6])

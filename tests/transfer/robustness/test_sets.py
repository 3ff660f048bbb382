"""Which images are which class: a classifier that reads the class from the pixels is right everywhere, or nowhere else."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lut_ds.engine.launch import Ranks
from lut_ds.errors import UserError
from lut_ds.transfer.features import Compute
from lut_ds.transfer.models import load_model
from lut_ds.transfer.robustness.classes import imagenet_columns, synsets
from lut_ds.transfer.robustness.classifier import Classifier
from lut_ds.transfer.robustness.measure import Pass, measure, unaltered
from lut_ds.transfer.robustness.objectnet import WithoutBorder
from lut_ds.transfer.robustness.sets import find_folder, open_set

ALONE = Compute(Ranks(0, 1, 0, torch.device("cpu"), "none"), batch_size=256, threads=2)
SIDE = 16


def coded(number, border=0):
    """A PNG of one colour that says a number below 1000, within a red border."""
    pixels = np.full((SIDE + 2 * border, SIDE + 2 * border, 3), (255, 0, 0), np.uint8)
    pixels[border : border + SIDE, border : border + SIDE] = (5 * (number % 50), 10 * (number // 50), 77)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_set(root, numbers, border=0):
    """Folders with one image each, of the number that `numbers` says."""
    for name, number in numbers.items():
        (root / name).mkdir(parents=True)
        (root / name / "image.png").write_bytes(coded(number, border))
    return root


@pytest.fixture(scope="module")
def encoder():
    found = load_model("timm:vit_tiny_patch16_224", image_size=SIDE)
    assert found.image_size == SIDE
    return found


def reader(encoder, classes=None, shift=0, distraction=None):
    """A classifier of 1000 classes that reads the number, adds `shift`, and looks that class up in `classes`."""
    order = classes or synsets()
    column = torch.tensor([order.index(name) for name in synsets()])

    def logits(images):
        mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
        red, green, _ = ((images.mean((2, 3)) * std + mean) * 255).T
        number = ((red / 5).round() + 50 * (green / 10).round()).long()
        scores = torch.nn.functional.one_hot(column[(number + shift) % 1000], 1000).float()
        if distraction is not None:
            scores[:, distraction] = 2
        return scores

    return Classifier(encoder, logits, tuple(classes or ()), 1000, 0.875, {}, "")


def top1(classifier, name, folder):
    found = open_set(name, folder, classifier.classes, classifier.count)
    step = Pass(name, found, (0,), unaltered)
    return measure(classifier, step, [0], None, ALONE, lambda n: None)[0]


def test_the_subsets_that_are_published():
    known = synsets()
    assert (len(known), len(set(known)), list(known)) == (1000, 1000, sorted(known))
    assert (known[0], known[207], known[999]) == (
        "n01440764",
        "n02099601",
        "n15075141",
    )  # tench, golden retriever, paper
    for subset in ("a", "r"):
        assert len(set(synsets(subset))) == 200
        assert set(synsets(subset)) < set(known)
        assert list(synsets(subset)) == sorted(synsets(subset))
    assert "n01770081" in synsets("a")  # harvestman
    assert "n01770081" not in synsets("r")
    assert "n01443537" in synsets("r")  # goldfish
    assert "n01443537" not in synsets("a")


@pytest.mark.parametrize("name", ["a", "r"])
def test_only_logits_of_the_subset_count(name, encoder, tmp_path):
    subset = synsets(name)
    folder = write_set(tmp_path / "set", {wnid: synsets().index(wnid) for wnid in subset})
    outside = next(i for i, wnid in enumerate(synsets()) if wnid not in subset)
    inside = synsets().index(subset[17])
    assert top1(reader(encoder), name, folder) == {"top1": 100.0, "top5": 100.0, "images": 200}
    assert top1(reader(encoder, distraction=outside), name, folder)["top1"] == 100
    assert top1(reader(encoder, distraction=inside), name, folder)["top1"] == 0.5, "one class of 200"
    assert top1(reader(encoder, shift=1), name, folder)["top1"] < 3


@pytest.mark.parametrize("name", ["sketch", "v2"])
def test_a_thousand_classes_by_name_and_by_number(name, encoder, tmp_path):
    names = synsets() if name == "sketch" else map(str, range(1000))
    folder = write_set(tmp_path / "set", {text: number for number, text in enumerate(names)})
    shuffled = np.random.default_rng(0).permutation(synsets()).tolist()
    assert top1(reader(encoder), name, folder)["top1"] == 100
    assert top1(reader(encoder, shuffled), name, folder)["top1"] == 100, "columns in an order of their own"
    assert top1(reader(encoder, shift=1), name, folder)["top1"] == 0


@pytest.fixture
def objectnet(tmp_path):
    """Three classes, of which one is two of ImageNet's and one is none of them."""
    root = tmp_path / "objectnet-1.0"
    write_set(root / "images", {"air_freshener": 5, "backpack": 414, "beer_bottle": 907}, border=2)
    (root / "mappings").mkdir()
    labels = {"air_freshener": "Air freshener", "backpack": "Backpack", "beer_bottle": "Beer bottle"}
    described = [f"thing {i}" for i in range(1000)]
    described[7], described[8], described[9] = "backpack, rucksack", "beer bottle", "wine bottle"
    # ImageNet's own numbering is another one than the published classifiers'.
    ids = {i: i for i in range(1000)} | {414: 7, 440: 8, 907: 9, 7: 414, 8: 440, 9: 907}
    content = {
        "folder_to_objectnet_label.json": json.dumps(labels),
        "objectnet_to_imagenet_1k.json": json.dumps(
            {"Backpack": "backpack, rucksack", "Beer bottle": "beer bottle; wine bottle"}
        ),
        "pytorch_to_imagenet_2012_id.json": json.dumps(ids),
        "imagenet_to_label_2012_v2": "\n".join(described) + "\n",
    }
    for name, text in content.items():
        (root / "mappings" / name).write_text(text)
    return root


def test_objectnet_takes_the_classes_that_imagenet_has(objectnet, encoder):
    assert find_folder("objectnet", str(objectnet.parent), {}) == objectnet
    assert top1(reader(encoder), "objectnet", objectnet) == {"top1": 100.0, "top5": None, "images": 2}
    assert top1(reader(encoder, distraction=440), "objectnet", objectnet)["top1"] == 50
    assert top1(reader(encoder, distraction=5), "objectnet", objectnet)["top1"] == 100, "no class of ObjectNet"


def test_objectnets_border_is_cut(objectnet, encoder):
    source = open_set("objectnet", objectnet, (), 1000).source
    assert isinstance(source, WithoutBorder)
    image = np.asarray(Image.open(io.BytesIO(source.read(1))))
    assert image.shape == (SIDE, SIDE, 3)
    assert (image == image[0, 0]).all()


def test_mappings_that_are_not_there_are_named(objectnet):
    (objectnet / "mappings" / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(UserError, match=r"objectnet: .*mappings: expected .* found FileNotFoundError"):
        open_set("objectnet", objectnet, (), 1000)


def test_other_folders_are_refused(tmp_path):
    numbers = dict.fromkeys(synsets("a"), 0)
    short = write_set(tmp_path / "short", {k: v for k, v in numbers.items() if k != "n01498041"})
    with pytest.raises(UserError, match=r"expected its 200 class folders, found none of 'n01498041' \(1 missing"):
        open_set("a", short, (), 1000)
    write_set(tmp_path / "short", {"n01498041": 0, "n01440764": 0})
    with pytest.raises(UserError, match="found also 'n01440764'"):
        open_set("a", short, (), 1000)
    with pytest.raises(UserError, match="found none; download it"):
        open_set("a", tmp_path / "absent", (), 1000)


@pytest.mark.parametrize(("classes", "count"), [((), 10), (("cat", "dog"), 2), (tuple(map(str, range(1000))), 1000)])
def test_classifiers_of_something_else_are_refused(classes, count):
    with pytest.raises(UserError, match="r: expected a checkpoint with ImageNet's 1000 classes"):
        imagenet_columns(classes, count, "r")


def test_a_limit_is_spread_over_the_classes(tmp_path, encoder):
    folder = write_set(tmp_path / "set", dict.fromkeys(synsets("r"), 0))
    found = open_set("r", folder, (), 1000)
    assert found.indices(10).tolist() == list(range(0, 200, 20))
    assert len(found.indices(None)) == len(found.indices(500)) == 200

"""Exports for other software have our features, and a card whose numbers were measured."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from lut_ds.cli import main
from lut_ds.data.sources import open_source
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer import programs
from lut_ds.transfer.evaluate import Request, evaluate_knn
from lut_ds.transfer.interchange import export
from lut_ds.transfer.models import load_model


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def documented_vit(folder, images):
    """The forward pass that Hugging Face documents for ViTModel, in plain torch, from the files of a folder alone."""
    c, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def linear(x, name):
        return F.linear(x, w.pop(f"{name}.weight"), w.pop(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w.pop(f"{name}.weight"), w.pop(f"{name}.bias"), c["layer_norm_eps"])

    def heads(x):
        return x.unflatten(2, (c["num_attention_heads"], -1)).transpose(1, 2)

    name = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images, w.pop(f"{name}.weight"), w.pop(f"{name}.bias"), stride=c["patch_size"]).flatten(2).mT
    x = torch.cat([w.pop("embeddings.cls_token").expand(len(x), -1, -1), x], 1) + w.pop(
        "embeddings.position_embeddings"
    )
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        y = norm(x, f"{layer}.layernorm_before")
        q, k, v = (heads(linear(y, f"{layer}.attention.attention.{part}")) for part in ("query", "key", "value"))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
        assert y.shape[-1] == c["intermediate_size"]
        x = x + linear({"gelu": F.gelu}[c["hidden_act"]](y), f"{layer}.output.dense")
    x = norm(x, "layernorm")
    assert not w, "every tensor has a place"
    assert c["layer_norm_eps"] == 1e-6, "values near 1 do not tell"
    return x


@pytest.fixture(scope="module")
def hf(lut_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "out"
    return folder, export(str(lut_run), "student", str(folder), "hf")


@torch.no_grad()
def test_hugging_faces_forward_has_our_features(hf, lut_run, images):
    folder, result = hf
    assert (result["kind"], result["step"]) == ("student", 30)
    expected = load_model(lut_run, "student").model.forward_features(images)
    torch.testing.assert_close(documented_vit(folder, images), expected, atol=1e-5, rtol=1e-5)
    other = load_model(lut_run, "ema").model.forward_features(images)
    assert (other - expected).abs().max() > 1e-3


def test_an_export_for_transformers_is_the_same_model_here(hf, lut_run):
    run, found = load_model(lut_run, "student"), load_model(hf[0])
    assert found.record["format"] == "transformers"
    for key in ("weights", "kind", "step", "sizes"):
        assert found.record[key] == run.record[key], key
    assert (found.mean, found.std, found.image_size) == (run.mean, run.std, run.image_size)
    assert int(found.image_size / found.crop) == int(run.image_size / run.crop)


def test_a_classifier_of_transformers_has_its_head_and_norm(hf, tmp_path):
    folder = shutil.copytree(hf[0], tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = load_file(folder / "model.safetensors")
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    named = {f"vit.{name}": value for name, value in encoder.items()}
    save_file({**named, **head, "vit.pooler.dense.weight": torch.ones(2)}, folder / "model.safetensors")
    found = load_model(folder)
    assert found.model.norm.eps == found.model.blocks[0].norm1.eps == 0.5
    assert found.record["left_out"] == {"pooler": 1}
    assert torch.equal(found.head["head.weight"], head["classifier.weight"])


@pytest.mark.parametrize(
    "change, words",
    [({"hidden_size": None}, "expected the sizes of a ViT"), ({"hidden_act": "relu"}, "found relu")],
)
def test_a_vit_folder_that_does_not_fit_is_one_line(change, words, hf, tmp_path):
    folder = shutil.copytree(hf[0], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load_model(folder)
    config |= {"hidden_size": 64, "intermediate_size": 256, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected the weights of a ViT of width 64"):
        load_model(folder)


@torch.no_grad()
def test_transformers_itself_has_our_features(hf, lut_run, images):
    transformers = pytest.importorskip("transformers")
    model, loading = transformers.ViTModel.from_pretrained(hf[0], add_pooling_layer=False, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_model(lut_run, "student").model.forward_features(images)
    torch.testing.assert_close(model.eval()(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_the_preprocessor_says_what_timm_does(hf, lut_run, tmp_path):
    export(str(lut_run), "student", str(tmp_path / "timm"))
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    resize, crop, _, normalise = create_transform(**resolve_model_data_config(model), is_training=False).transforms
    told = json.loads((hf[0] / "preprocessor_config.json").read_text())
    assert told["size"] == {"shortest_edge": resize.size}
    assert told["crop_size"] == dict(zip(("height", "width"), crop.size))
    assert told["image_mean"] == pytest.approx(normalise.mean.tolist())
    assert told["image_std"] == pytest.approx(normalise.std.tolist())


@pytest.mark.parametrize("change", [{"fc_norm": True, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_what_vitmodel_cannot_hold_is_refused(change, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **sizes, **change)
    (tmp_path / "in").mkdir()
    config = {"architecture": "vit_base_patch16_224", "model_args": {**sizes, **change}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match="which ViTModel cannot hold; take --format torch-export"):
        export(str(tmp_path / "in"), "ema", str(tmp_path / "out"), "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["torch-export", "torchscript"])
@torch.no_grad()
def test_programs_have_our_features_for_any_batch(form, lut_run, images, tmp_path):
    result = export(str(lut_run), "ema", str(tmp_path / "out"), form)
    assert result["difference"] < 1e-5
    found = load_model(lut_run, "ema")
    if form == "torch-export":
        exported = torch.export.load(tmp_path / "out" / "encoder.pt2")
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if "lut" in name], "only torch's own operators"
        run = exported.module()
    else:
        run = torch.jit.load(tmp_path / "out" / "encoder.torchscript.pt")
    for batch in (1, 4, 5):
        features, tokens = run(images[:batch])
        torch.testing.assert_close(features, found.features(images[:batch], "mean"), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens, found.model.forward_features(images[:batch]), atol=1e-5, rtol=1e-5)


def test_a_program_that_computes_something_else_is_not_written(lut_run, tmp_path, monkeypatch):
    def damaged(program, example, path):
        run = programs._torchscript(program, example, path)
        return lambda images: run(images * 1.01)

    export(str(lut_run), "ema", str(tmp_path / "out"), "torchscript")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setitem(programs._WRITERS, "torchscript", damaged)
    with pytest.raises(RunFault, match="computes other values than the encoder"):
        export(str(lut_run), "student", str(tmp_path / "out"), "torchscript")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_onnx_has_our_features(lut_run, images, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert export(str(lut_run), "ema", str(tmp_path / "out"), "onnx")["difference"] < 1e-5
    session = runtime.InferenceSession(tmp_path / "out" / "encoder.onnx")
    with torch.no_grad():
        expected = load_model(lut_run, "ema").features(images, "mean").numpy()
    assert abs(session.run(["features"], {"images": images.numpy()})[0] - expected).max() < 1e-5


def test_onnx_without_its_packages_is_one_line(lut_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(lut_run), "--format", "onnx", "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip()
    assert error.endswith("found no onnx and no onnxscript; pip install onnx onnxscript")
    assert error.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_are_not_replaced(lut_run, tmp_path):
    export(str(lut_run), "ema", str(tmp_path / "out"), "torchscript")
    export(str(lut_run), "ema", str(tmp_path / "out"), "hf")
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    (tmp_path / "out" / "thesis.tex").write_text("")
    for form in ("hf", "timm"):
        with pytest.raises(UserError, match=r"found thesis\.tex in it; name another"):
            export(str(lut_run), "ema", str(tmp_path / "out"), form)


def knn_of_timm(model, data, k, temperature):
    """Top-1 of k-NN written out, on images through timm's own transform."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)

    @torch.inference_mode()
    def features(split):
        paths = sorted((data / split).glob("*/*.jpg"))
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        return F.normalize(model(batch), dim=1), torch.tensor([int(path.parent.name) for path in paths])

    (bank, known), (queries, labels) = features("train"), features("val")
    similarity, nearest = (queries @ bank.T).topk(k, dim=1)
    votes = F.one_hot(known[nearest], 10) * (similarity / temperature).exp()[..., None]
    return 100 * (votes.sum(1).argmax(1) == labels).double().mean().item()


def test_neighbours_are_worth_the_same_through_timm_and_stand_in_the_card(lut_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "data", "metrics.jsonl", "environment.jsonl"):
        (run / name).symlink_to(lut_run / name)
    found = evaluate_knn(Request(str(run), threads=2), (10,), 0.07)
    result = export(str(run), "ema", str(tmp_path / "out"))
    pooling = {"global_pool": "avg", "fc_norm": False}  # of the patch tokens; timm's own default is the cls token
    arguments = {"num_classes": 0, **result["model_args"], **pooling}
    model = timm.create_model(result["architecture"], checkpoint_path=result["weights"], **arguments).eval()
    model.pretrained_cfg = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert found["top1"]["10"] == pytest.approx(knn_of_timm(model, lut_run / "data", 10, 0.07), abs=0.3)  # one image
    card = Path(result["card"]).read_text()
    val = len(open_source(str(run / "data"), "val"))
    assert f"| k-NN top-1, k = 10, {val:,} images (data) | {found['top1']['10']:.2f} % |" in card
    assert f"`{found['model']['weights']}`" in card
    other = Path(export(str(run), "student", str(tmp_path / "other"))["card"]).read_text()
    assert "k-NN top-1" not in other, "these weights were not measured"


def test_the_card_holds_the_record_and_no_path(hf, lut_run):
    card = (hf[0] / "README.md").read_text()
    last = json.loads((lut_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"Loss at step 30: {last['loss']:.4f}." in card
    assert "4,320 samples were seen." in card
    assert "mask_ratio: 0.75" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    assert "TO BE FILLED IN" in card
    assert "transformers.ViTModel.from_pretrained" in card
    assert str(lut_run) not in card
    assert str(lut_run.parent) not in card


def test_a_published_file_has_a_card_without_a_run(tmp_path):
    model = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
    )
    torch.save({"model": {**model.state_dict(), "mask_token": torch.zeros(1, 1, 8)}, "epoch": 7}, tmp_path / "a.pth")
    result = export(str(tmp_path / "a.pth"), "student", str(tmp_path / "out"), "hf", heads=2)
    card = Path(result["card"]).read_text()
    assert "| after | epoch 7 |" in card
    assert "None were found beside the run" in card
    assert "## Training" not in card

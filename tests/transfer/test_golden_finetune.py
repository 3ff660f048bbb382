"""Fine-tuning against the stored numbers of the published implementation (golden README, sections 4 and 5)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lut_ds.engine.optim import GuardedAdamW, layer_decay_groups
from lut_ds.engine.schedules import lr_at
from lut_ds.transfer.classifier import make_classifier
from lut_ds.transfer.mixing import Mixing, soft_cross_entropy, soft_targets
from tests.golden_data import Golden, assert_states_close, golden_files, golden_json, load_golden, reproducible


@dataclass
class Case:
    """A golden file, the model before its step, and what one forward and backward pass gave."""

    golden: Golden
    model: VisionTransformer
    logits: Tensor
    loss: Tensor


def classifier_of(config: dict[str, Any], classes: int) -> VisionTransformer:
    return make_classifier(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        classes=classes,
        pool="mean" if config["global_pool"] else "cls",
    )


def model_of(golden: Golden) -> VisionTransformer:
    """The stored model before its step: names and shapes must be the same."""
    model = classifier_of(golden.config, golden.config["num_classes"])
    model.load_state_dict(golden.group("model"), strict=True)
    return model


@pytest.fixture(scope="module", params=golden_files("vit_ft_*.safetensors"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    golden = load_golden(request.param)
    model = model_of(golden)
    logits = model(golden["in.image"])
    loss = soft_cross_entropy(logits, golden["in.soft_target"])
    loss.backward()
    return Case(golden, model, logits.detach(), loss.detach())


def test_golden_finetune_forward(case: Case) -> None:
    golden = case.golden
    torch.testing.assert_close(case.logits, golden["out.logits"], atol=2e-5, rtol=0)
    torch.testing.assert_close(case.loss, golden["out.loss"], atol=5e-6, rtol=0)


def test_golden_finetune_label_smoothing(case: Case) -> None:
    golden = case.golden
    labels = golden["in.soft_target"].argmax(dim=1)
    targets = soft_targets(labels, golden.config["num_classes"], Mixing(), 0.1)
    found = soft_cross_entropy(case.logits, targets)
    torch.testing.assert_close(found, golden["out.label_smoothing_loss_0.1"], atol=5e-6, rtol=0)


def test_golden_finetune_gradients(case: Case) -> None:
    gradients = {name: p.grad for name, p in case.model.named_parameters()}
    assert_states_close(gradients, case.golden.group("grad"), atol=3e-6, skip_noise=True)


def test_golden_finetune_step(case: Case) -> None:
    """The stored gradients, through our groups and our optimizer."""
    golden, settings = case.golden, case.golden.config["adamw"]
    schedule = settings["lr_sched"]
    lr = lr_at(schedule["epoch"], schedule["lr"], schedule["min_lr"], schedule["warmup_epochs"], schedule["epochs"])
    model, gradients = model_of(golden), golden.group("grad")
    groups = layer_decay_groups(
        model.named_parameters(), settings["weight_decay"], golden.config["layer_decay"], golden.config["depth"]
    )
    optimizer = GuardedAdamW(groups, 0.0, tuple(settings["betas"]), settings["eps"])
    optimizer.found_inf = torch.zeros(())
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    stored = golden.group("step")
    assert_states_close(model.state_dict(), stored, atol=2e-6, skip_noise=True)
    moved = [
        n for n, v in golden.group("model").items() if not torch.equal(reproducible(n, v), reproducible(n, stored[n]))
    ]
    assert len(moved) == len(stored), "every parameter of the stored step moved, so each was compared"


TABLES = golden_json("schedules.json")["layer_decay"]


@pytest.mark.parametrize("key", TABLES)
def test_golden_layer_decay(key: str) -> None:
    """Layer, learning rate and weight decay of every parameter of a published model."""
    table = TABLES[key]
    decay = float(key.rpartition("decay=")[2])
    depth = table["num_layers"] - 1
    assert [decay ** (depth + 1 - i) for i in range(depth + 2)] == pytest.approx(table["layer_scales"], rel=1e-12)
    width, patch = 48, 16  # the table knows names and dimensions only, which do not depend on the width
    config = {
        "img_size": 32, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": 2, "mlp_ratio": 4.0,
        "global_pool": "global_pool=True" in key,
    }  # fmt: skip
    groups = layer_decay_groups(classifier_of(config, 3).named_parameters(), 0.05, decay, depth)
    found = {
        name: (g["lr_scale"], g["weight_decay"], p.dim()) for g in groups for name, p in zip(g["names"], g["params"])
    }
    expected = {name: (p["lr_scale"], p["weight_decay"], p["ndim"]) for name, p in table["params"].items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert len(groups) == table["n_groups"]

import torch
from torch import nn

from lut_ds.transfer.lars import LARS
from tests.golden_data import golden_files, load_golden


def test_golden_lars():
    golden = load_golden(golden_files("lars.safetensors")[0])
    config = golden.config
    names = sorted(name for name in golden.group("in") if "." not in name)
    params = {name: nn.Parameter(golden["in." + name].clone()) for name in names}
    optimizer = LARS(
        params.values(), config["lr"], config["weight_decay"], config["momentum"], config["trust_coefficient"]
    )
    steps = sum(name.startswith("out.step") for name in golden.tensors) // len(names)
    assert steps > 1
    for step in range(steps):
        for name, parameter in params.items():
            parameter.grad = golden[f"in.grad{step}.{name}"].clone()
        optimizer.step()
        for name, parameter in params.items():
            torch.testing.assert_close(parameter.data, golden[f"out.step{step}.{name}"], atol=1e-6, rtol=1e-6)

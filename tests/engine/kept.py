"""What autograd really keeps of a micro-batch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from lut_ds.config import Recipe
from lut_ds.engine.build import build_student, compile_blocks
from lut_ds.engine.reading import draws_per_sample


def kept_bytes(recipe: Recipe, images: int) -> int:
    """Bytes of the storages that the forward pass saves for the backward pass, each once; weights and inputs are not counted.

    With `train.compile=true` the blocks are compiled, which takes most of a minute.
    """
    student = build_student(recipe)
    if recipe.train.compile is True:
        compile_blocks(student)
    if recipe.precision.compute == "bf16":
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        student.bfloat16()
        for name, buffer in student.named_buffers():
            buffer.data = buffers[name]  # the engine keeps them in fp32 too
    m = recipe.model
    shape = (images, recipe.view_side, recipe.view_side, 3)
    views = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(recipe.method.views)]
    noise = torch.rand(images, m.patches)
    target = tuple(torch.randn(images, m.width) for _ in views)
    draws = torch.rand(images, draws_per_sample(recipe))
    known = {
        t.untyped_storage().data_ptr()
        for t in (*student.parameters(), *student.buffers(), *views, noise, draws, *target)
    }
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, same):
        loss = student(views, noise, target, draws)["loss"]
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in known)


def kept_an_image(recipe: Recipe, images: int = 2) -> float:
    """The part of `kept_bytes` that grows with the batch, for one image; of a lone one some products make no copies."""
    return (kept_bytes(recipe, 2 * images) - kept_bytes(recipe, images)) / images

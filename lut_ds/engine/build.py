"""From a recipe to modules: student, teacher, and the shapes that FLOPs are counted from."""

import copy

import torch
from lut_kernels.fp8 import CAPABILITY
from torch import nn

from lut_ds.config import Recipe
from lut_ds.errors import UserError
from lut_ds.method.decoder import Decoder
from lut_ds.method.degradations import make_degradation
from lut_ds.method.encoder import Encoder
from lut_ds.method.flops import Shape
from lut_ds.method.fp8 import use_fp8_linear
from lut_ds.method.heads import make_head
from lut_ds.method.lut import LUT, MAE, Teacher
from lut_ds.method.masking import keep_count


def build_encoder(recipe: Recipe) -> Encoder:
    """The encoder alone, freshly initialised."""
    m = recipe.model
    return Encoder(m.image_size, m.patch_size, m.width, m.depth, m.heads, m.mlp_ratio, positions=m.positions)


def build_student(recipe: Recipe) -> MAE:
    """The module that is trained, initialised from `run.seed`; equal on every rank. Parameters are fp32."""
    m, method = recipe.model, recipe.method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        encoder = build_encoder(recipe)
        blocks = (m.decoder_width, m.decoder_depth, m.decoder_heads)
        decoder = Decoder(m.width, m.grid, *blocks, m.patch_dim, m.mlp_ratio, m.positions)
        if recipe.train.activation_checkpointing:
            encoder.grad_checkpointing = decoder.grad_checkpointing = True
        degradation = make_degradation(method.degradation, method.degradation_params)
        if method.name == "mae":
            return MAE(
                encoder, decoder, mask_ratio=method.mask_ratio, norm_pix=method.norm_pix, degradation=degradation
            )
        return LUT(
            encoder,
            decoder,
            make_head(method.projector_depth, m.width, method.head_hidden, method.head_norm, method.head_act),
            make_head(method.predictor_depth, m.width, method.head_hidden, method.head_norm, method.head_act),
            mask_ratio=method.mask_ratio,
            norm_pix=method.norm_pix,
            degradation=degradation,
            w_mae=method.w_mae,
            w_bc=method.w_bc,
        )


def build_teacher(recipe: Recipe, student: MAE, device: torch.device) -> Teacher | None:
    """A copy of the student's encoder and projector; weights in the teacher's dtype, buffers in fp32. None for MAE.

    With `precision.teacher=fp8` the linear layers of the blocks, which are nearly all of its work, are fp8, the rest is bf16.
    """
    if not isinstance(student, LUT):
        return None
    teacher = Teacher(copy.deepcopy(student.encoder), copy.deepcopy(student.projector)).to(device)
    dtype = torch.float32 if recipe.precision.teacher == "fp32" else torch.bfloat16
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    if recipe.precision.teacher == "fp8":
        use_fp8_linear(teacher.encoder.blocks)
    return teacher


def check_fp8(recipe: Recipe, device: torch.device) -> None:
    """Refuse an fp8 teacher on a GPU without fp8 tensor cores; on CPUs the same values are computed slowly.

    Raises:
        UserError: what was found, and what to set instead.
    """
    if recipe.precision.teacher != "fp8" or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UserError(
            f"precision.teacher: fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, Hopper, "
            f"Blackwell), found {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}; use precision.teacher=bf16"
        )


def compile_blocks(*modules: nn.Module | None) -> None:
    """torch.compile every transformer block in place: one graph a shape, parameter names unchanged."""
    for module in modules:
        if module is not None:
            for name, child in module.named_modules():
                if name.rpartition(".")[2].isdigit() and name.rpartition(".")[0].endswith("blocks"):
                    # Shapes are fixed: one graph for each of student, teacher and decoder.
                    child.compile(dynamic=False)


def flops_shape(recipe: Recipe) -> Shape:
    """Sizes for `lut_ds.method.flops`."""
    m, method = recipe.model, recipe.method
    return Shape(
        patches=m.patches,
        kept=keep_count(m.patches, method.mask_ratio),
        patch_dim=m.patch_dim,
        width=m.width,
        depth=m.depth,
        mlp_ratio=m.mlp_ratio,
        decoder_width=m.decoder_width,
        decoder_depth=m.decoder_depth,
        views=method.views,
        head_hidden=method.head_hidden,
        projector_depth=method.projector_depth,
        predictor_depth=method.predictor_depth,
    )

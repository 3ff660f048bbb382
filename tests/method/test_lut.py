"""What a LUT or MAE step computes, seen from outside."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lut_ds.method.lut import LUT, Teacher, bc_loss, cosine_distance, encode_views, feature_spread, pool
from tests.method.builders import bfloat16_weights, lut_from, mae_from, randomise, small, teacher_from


def make_lut(**changes: Any) -> LUT:
    """A small student in which no weight is zero."""
    student = lut_from(small(**changes))
    randomise(student)
    return student


def make_teacher(**changes: Any) -> Teacher:
    """A small teacher in which no weight is zero."""
    teacher = teacher_from(small(**changes))
    randomise(teacher)
    return teacher


def draw(batch: int = 4, as_bytes: bool = False) -> tuple[list[Tensor], Tensor]:
    """Two views and mask noise."""
    if as_bytes:
        views = [torch.randint(256, (batch, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    else:
        views = [torch.randn(batch, 3, 32, 32) for _ in range(2)]
    return views, torch.rand(batch, 16)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["BN", "LN", None])
def test_a_step_gives_finite_float32_losses_and_gradients(as_bytes: bool, narrow: bool, norm: str | None) -> None:
    student, teacher = make_lut(head_norm_layer=norm), make_teacher(head_norm_layer=norm)
    if narrow:
        bfloat16_weights(student)
        bfloat16_weights(teacher)
    views, noise = draw(as_bytes=as_bytes)
    out = student(views, noise, teacher(views))
    assert out.keys() == {"loss", "mae", "bc", "feature_spread"}
    assert all(value.dtype == torch.float32 and value.shape == () and value.isfinite() for value in out.values())
    torch.testing.assert_close(out["loss"].detach(), out["mae"] + 0.25 * out["bc"])
    assert not any(out[name].requires_grad for name in ("mae", "bc", "feature_spread"))
    out["loss"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bytes_and_normalised_floats_give_one_loss() -> None:
    student, teacher = make_lut(), make_teacher()
    pixels, noise = draw(as_bytes=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = [((view / 255 - mean) / std).permute(0, 3, 1, 2) for view in pixels]
    found = [copy.deepcopy(student)(views, noise, teacher(views)) for views in (pixels, floats)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_weights_of_the_losses() -> None:
    views, noise = draw()
    teacher_q = make_teacher()(views)
    out = make_lut(w_mae=0.5, w_bc=2.0)(views, noise, teacher_q)
    later = make_lut(w_mae=0.5, w_bc=2.0)(views, noise, lambda: teacher_q)
    assert torch.equal(out["loss"], later["loss"]), "projections that come when they are needed are the same"
    torch.testing.assert_close(out["loss"].detach(), 0.5 * out["mae"] + 2.0 * out["bc"])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from([0.5, 0.6, 0.75]), norm_pix=st.booleans())
def test_reconstruction_loss_reads_hidden_patches_of_view_1_only(seed: int, ratio: float, norm_pix: bool) -> None:
    student = make_lut(seed=seed, mask_ratio=ratio, norm_pix_loss=norm_pix)
    views, noise = draw(batch=2)
    masking = student.mask(noise)
    latent = encode_views(student.encoder, views, masking.ids_keep)[:2]
    loss = student.reconstruct(views[0], latent, masking)
    for ids, counts in ((masking.ids_keep[0], False), (masking.ids_hidden[:, :1], True)):
        flat = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, ids, True)
        where = flat.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        changed = torch.where(where, torch.randn_like(views[0]), views[0])
        assert torch.equal(student.reconstruct(changed, latent, masking), loss) is not counts


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), norm_pix=st.booleans(), ratio=st.sampled_from([0.5, 0.6, 0.75]))
def test_reconstruction_loss_is_the_masked_mean_of_the_equation(seed: int, norm_pix: bool, ratio: float) -> None:
    student = make_lut(seed=seed, norm_pix_loss=norm_pix, mask_ratio=ratio)
    (view, _), noise = draw(batch=3)
    masking = student.mask(noise)
    latent = encode_views(student.encoder, [view], masking.ids_keep[:1])
    pred = student.decoder(latent, masking.ids_restore)
    target = view.view(3, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(3, 16, 192)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(-1)
    expected = (error * masking.mask(0)).sum() / masking.mask(0).sum()
    torch.testing.assert_close(student.reconstruct(view, latent, masking), expected, atol=1e-5, rtol=1e-5)


def test_predicting_some_patches_equals_picking_them_from_all() -> None:
    student = make_lut()
    views, noise = draw()
    masking = student.mask(noise)
    latent = encode_views(student.encoder, views[:1], masking.ids_keep[:1])
    every = student.decoder(latent, masking.ids_restore)
    some = student.decoder(latent, masking.ids_restore, masking.ids_hidden)
    picked = every.gather(1, masking.ids_hidden[..., None].expand(-1, -1, every.shape[2]))
    torch.testing.assert_close(some, picked, atol=1e-6, rtol=1e-6)


def test_decoder_does_not_see_view_2() -> None:
    student, teacher = make_lut(), make_teacher()
    views, noise = draw()
    teacher_q = teacher(views)
    other = [views[0], torch.randn_like(views[1])]
    before, after = student(views, noise, teacher_q), student(other, noise, teacher_q)
    assert torch.equal(before["mae"], after["mae"])
    assert not torch.equal(before["bc"], after["bc"])


@pytest.mark.parametrize("norm", ["BN", "LN", None])
def test_heads_treat_each_view_apart_and_view_1_first(norm: str | None) -> None:
    student = make_lut(head_norm_layer=norm)
    twin = copy.deepcopy(student)
    z1, z2 = torch.randn(4, 5, 32), torch.randn(4, 5, 32) * 3 + 1
    q1, q2 = student.predict(torch.cat([z1, z2]))
    for q, z in ((q1, z1), (q2, z2)):
        torch.testing.assert_close(q, twin.predictor(twin.projector(z[:, 1:].mean(1))), atol=1e-5, rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(student.buffers(), twin.buffers(), strict=True))
    third = student.predict(torch.cat([z1, -z2]))[0]
    assert torch.equal(third, q1)


def test_pooling_leaves_the_cls_token_out() -> None:
    latent = torch.randn(3, 5, 8)
    changed = latent.clone()
    changed[:, 0] += 10.0
    assert torch.equal(pool(latent), pool(changed))
    torch.testing.assert_close(pool(latent), latent[:, 1:].mean(1))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), width=st.integers(2, 32), scale=st.floats(1e-3, 1e3))
def test_cosine_distance(seed: int, width: int, scale: float) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(5, width), torch.randn(5, width)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosine_distance(scale * a, b), (a - b).square().sum(1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(cosine_distance(a, a), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(a, -a), torch.full((5,), 4.0), atol=1e-5, rtol=0)
    assert cosine_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_bc_loss_is_cross_view_and_symmetric() -> None:
    q1, q2, t1, t2 = torch.randn(4, 6, 8).unbind(0)
    assert bc_loss((q1, q2), (q2, q1)).item() == pytest.approx(0.0, abs=1e-6)
    assert bc_loss((q1, q2), (q1, q2)).item() > 0.1
    torch.testing.assert_close(bc_loss((q1, q2), (t1, t2)), bc_loss((q2, q1), (t2, t1)))
    expected = (cosine_distance(q2, t1).mean() + cosine_distance(q1, t2).mean()) / 2
    torch.testing.assert_close(bc_loss((q1, q2), (t1, t2)), expected)


def test_lut_without_a_teacher_is_refused() -> None:
    views, noise = draw()
    with pytest.raises(ValueError, match="teacher_q"):
        make_lut()(views, noise)


def test_mae_takes_one_view_and_no_teacher() -> None:
    config = small()
    model = mae_from(config)
    views, noise = draw()
    out = model(views[:1], noise)
    assert out.keys() == {"loss", "mae", "feature_spread"}
    out["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_teacher_stays_in_eval_mode_and_gives_no_gradient() -> None:
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    views, _ = draw()
    out = teacher([view.requires_grad_() for view in views])
    assert len(out) == 2
    assert not any(q.requires_grad for q in out)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_inside_a_module_in_training_mode_stays_in_eval_mode() -> None:
    both = torch.nn.ModuleList([make_lut(), make_teacher()]).train()
    assert both[0].training
    assert not any(module.training for module in both[1].modules())


def test_teacher_sees_all_patches_and_samples_apart() -> None:
    teacher = make_teacher()
    views, _ = draw()
    both = teacher(views)
    alone = [teacher([view[i : i + 1]])[0] for view in views for i in range(4)]
    torch.testing.assert_close(torch.cat(both), torch.cat(alone), atol=1e-5, rtol=1e-5)
    for patch in range(16):
        row, col = divmod(patch, 4)
        changed = views[0].clone()
        changed[:, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += 1.0
        assert (teacher([changed])[0] - both[0]).abs().amax() > 1e-5


def test_student_gradient_does_not_reach_the_teacher() -> None:
    student, teacher = make_lut(), make_teacher()
    views, noise = draw()
    student(views, noise, teacher(views))["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_feature_spread_tells_collapse_from_isotropy() -> None:
    torch.manual_seed(0)
    assert feature_spread(torch.ones(64, 32)).item() == pytest.approx(0.0, abs=1e-5)
    assert feature_spread(torch.randn(4096, 32)).item() == pytest.approx(1.0, abs=0.05)
    assert not feature_spread(torch.randn(4, 8, requires_grad=True)).requires_grad


def test_checkpointing_changes_no_gradient() -> None:
    student, teacher = make_lut(), make_teacher()
    views, noise = draw()
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(student)
        twin.encoder.grad_checkpointing = twin.decoder.grad_checkpointing = checkpointing
        twin(views, noise, teacher(views))["loss"].backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_batch_is_the_mean_of_its_samples_without_batch_norm() -> None:
    student, teacher = make_lut(head_norm_layer="LN"), make_teacher(head_norm_layer="LN")
    views, noise = draw()
    whole = student(views, noise, teacher(views))
    alone = []
    for i in range(4):
        one = [view[i : i + 1] for view in views]
        alone.append(student(one, noise[i : i + 1], teacher(one)))
    for name in ("loss", "mae", "bc"):
        mean = torch.stack([out[name] for out in alone]).mean()
        torch.testing.assert_close(whole[name], mean, atol=1e-5, rtol=1e-5)

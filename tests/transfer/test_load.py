import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lut_ds.engine.build import build_student
from lut_ds.engine.files import describe_file
from lut_ds.errors import UserError
from lut_ds.transfer.load import all_checkpoints, find_checkpoint, load_encoder, load_student, open_checkpoint


@pytest.fixture
def run_copy(lut_run, tmp_path):
    shutil.copytree(lut_run / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def rewrite(checkpoint, change):
    """Change the tensors of rank 0's file and make the manifest agree again."""
    file = checkpoint / "rank_00000.safetensors"
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][file.name] = describe_file(file)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_newest_checkpoint_is_found_from_any_folder(lut_run):
    found = find_checkpoint(lut_run)
    assert found.step == 30
    assert found.epoch == 3.0
    assert found.kinds == ("student", "ema")
    assert find_checkpoint(lut_run / "checkpoints") == found
    assert find_checkpoint(found.path) == found
    assert [c.step for c in all_checkpoints(lut_run)] == [10, 20, 30]


def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(run_copy):
    newest = find_checkpoint(run_copy).path
    file = newest / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    lines = []
    assert find_checkpoint(run_copy, lines.append).step == 20
    assert len(lines) == 1
    assert newest.name in lines[0]
    with pytest.raises(UserError, match=r"damaged: rank_00000\.safetensors: expected"):
        find_checkpoint(newest)


def test_nothing_valid_is_a_user_error(run_copy, tmp_path):
    for path in (run_copy / "checkpoints").glob("step_*"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="found 3 damaged checkpoints"):
        find_checkpoint(run_copy, lambda line: None)
    with pytest.raises(UserError, match="no checkpoints"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="found nothing there"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found a file"):
        find_checkpoint(tmp_path / "file")


def test_student_and_teacher_differ_and_both_left_the_start(lut_run):
    checkpoint = find_checkpoint(lut_run)
    student, teacher = (load_encoder(checkpoint, kind) for kind in ("student", "ema"))
    initial = build_student(checkpoint.recipe).encoder
    weights = [dict(e.named_parameters())["blocks.0.attn.qkv.weight"] for e in (student, teacher, initial)]
    assert not torch.equal(weights[0], weights[1])
    moved = [(w - weights[2]).norm() for w in weights[:2]]
    assert moved[0] > 0
    assert moved[1] > 0
    assert not student.training


def test_the_whole_student_loads_with_its_buffers(lut_run):
    student = load_student(find_checkpoint(lut_run))
    assert int(student.projector[1].num_batches_tracked) > 0
    assert student.projector[1].running_mean.abs().sum() > 0


def test_an_mae_run_has_no_teacher(mae_run):
    checkpoint = find_checkpoint(mae_run)
    assert checkpoint.kinds == ("student",)
    load_encoder(checkpoint, "student")
    with pytest.raises(UserError, match=r"'mae' has no EMA teacher.*--student"):
        load_encoder(checkpoint, "ema")


def test_a_checkpoint_of_a_fine_tuning_is_told_from_a_mistyped_recipe(run_copy):
    state = find_checkpoint(run_copy).path / "state.json"
    tree = json.loads(state.read_text())
    tree["recipe"] = {"model": {"source": "x"}, "augment": {}}
    state.write_text(json.dumps(tree))
    with pytest.raises(
        UserError, match="expected one of a pre-training run, found one of finetune or segment; name best/"
    ):
        open_checkpoint(state.parent)


def test_nan_weights_are_named(run_copy):
    checkpoint = find_checkpoint(run_copy)

    def poison(tensors):
        tensors["ema.0"][7] = float("nan")

    rewrite(checkpoint.path, poison)
    load_student(find_checkpoint(run_copy))
    with pytest.raises(UserError, match="NaN or infinity in"):
        load_student(find_checkpoint(run_copy), "ema")

"""Ahead-of-time compilation and the committed resource table."""

import itertools
import json
from pathlib import Path

import pytest
from lut_kernels import dispatch, resources
from lut_kernels.dispatch import table
from lut_kernels.tuning import SPACE, attention_cases, cases

COMMITTED = json.loads(resources.PATH.read_text())
ARCHITECTURES = (80, 90, 100)


def index_of(name: str) -> int:
    """Position of a case by name."""
    return next(index for index, case in enumerate(cases()) if case.name == name)


def test_every_chosen_kernel_is_in_the_table_and_fits() -> None:
    chosen = {f"sm_{arch} {cases()[index].name}" for arch, index, _ in resources.distinct(ARCHITECTURES, space=False)}
    assert set(COMMITTED) == chosen
    assert [fault for name, report in COMMITTED.items() for fault in resources.faults(name, report)] == []


# Least share of the bytes that move 16 at a time. The rest: 8-byte patch indices, 4-byte softmax statistics (their rows
# start at any multiple of N), one loss a row.
VECTORISED = {
    "gather_patches u8 P=16 all": (1.0, 1.0),
    "gather_patches u8 P=16 visible": (0.6, 1.0),
    "embed_tokens D=1024 all": (1.0, 1.0),
    "embed_tokens D=1280 visible": (0.8, 1.0),
    "unshuffle_tokens D=512": (0.8, 1.0),
    "unshuffle_tokens_backward D=512": (0.6, 0.8),
    "reconstruction_loss P=16 norm grad": (0.8, 0.8),
    "attention_forward d=64 N=197 eval": (1.0, 1.0),
    "attention_forward d=80 N=197 eval": (1.0, 1.0),
    "attention_backward_one_tile d=64 N=50": (0.9, 1.0),
    "attention_backward_kv d=64 N=197": (0.5, 1.0),
    "attention_backward_q d=64 N=197": (0.9, 1.0),
}


@pytest.mark.parametrize("name", VECTORISED)
def test_wide_accesses_where_the_layout_allows(name: str) -> None:
    for arch in ARCHITECTURES:
        report = COMMITTED[f"sm_{arch} {name}"]
        assert report["load16"] >= VECTORISED[name][0]
        assert report["store16"] >= VECTORISED[name][1]


@pytest.mark.parametrize("name", ["gather_patches u8 P=16 all", "attention_forward d=80 N=50 save"])
def test_compiling_again_gives_the_committed_numbers(name: str) -> None:
    for arch in ARCHITECTURES:
        key, report = resources.compile_case((arch, index_of(name), None))
        assert resources.worse({key: report}, COMMITTED) == []
        assert report["kernel"] == COMMITTED[key]["kernel"]


def test_a_spilling_tile_is_found() -> None:
    tile = {"rows": 128, "step": 64, "warps": 4, "stages": 1}
    _, report = resources.compile_case((80, index_of("attention_backward_kv d=80 N=197"), tile))
    assert report["spilled"] > 0
    assert "spills" in resources.faults("sm_80 x", report)[0]


def test_what_counts_as_worse() -> None:
    report = {"kernel": "k", "registers": 64, "shared": 1024, "spilled": 0, "load16": 1.0, "store16": 1.0}
    name = "sm_90 k"
    assert resources.worse({name: report}, {name: report}) == []
    assert resources.worse({name: report | {"registers": 60}}, {name: report}) == []
    for change in ({"registers": 65}, {"shared": 2048}, {"spilled": 8}, {"load16": 0.5}, {"store16": 0.5}):
        assert len(resources.worse({name: report | change}, {name: report})) == 1
    assert "not in the committed table" in resources.worse({name: report}, {})[0]
    assert len(resources.faults(name, report | {"spilled": 8, "shared": 300 * 1024})) == 2
    assert resources.faults("sm_90 k", report | {"shared": 200 * 1024}) == []
    assert len(resources.faults("sm_80 k", report | {"shared": 200 * 1024})) == 1


def test_check_ends_with_1_where_something_got_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "gather_patches u8 P=16 all"
    monkeypatch.setattr(resources, "distinct", lambda *_: [(90, index_of(name), None)])
    monkeypatch.setattr(resources, "PATH", tmp_path / "resources.json")
    for change, code in ((0, 0), (1, 1)):
        report = COMMITTED[f"sm_90 {name}"]
        changed = report | {"registers": report["registers"] - change}
        resources.PATH.write_text(json.dumps({f"sm_90 {name}": changed}))
        assert resources.main(["--check", "--arch", "90", "--jobs", "1"]) == code
    assert f"registers was {report['registers'] - 1}, is {report['registers']}" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_long_sequences_take_binaries_that_were_compiled(arch: int) -> None:
    compiled = {
        build.key()
        for _, index, tile in resources.distinct((arch,), space=False)
        if (build := resources.build_case(arch, cases()[index], tile)) is not None
    }
    for tokens, head_dim in itertools.product((577, 785, 1025), (32, 64, 80)):  # 384 and 448 pixels
        for case in attention_cases(tokens, head_dim):
            build = resources.build_case(arch, case, None)
            assert build is None or build.key() in compiled


def test_every_space_contains_a_tile_and_names_a_case() -> None:
    assert {case.tile for case in cases()} - {""} == set(SPACE)
    assert all(SPACE.values())


def test_the_whole_space_was_compiled_and_fits_in_shared_memory() -> None:
    committed = json.loads(resources.SPACE_PATH.read_text())
    for arch, index, tile in resources.distinct((80,), space=True):
        name = f"{cases()[index].name} {json.dumps(tile)}" if tile else cases()[index].name
        assert f"sm_{arch} {name}" in committed
    for name, report in committed.items():
        arch = int(name.split()[0].removeprefix("sm_"))
        assert report["shared"] <= resources.SHARED_LIMIT[arch]


def test_lengths_that_take_another_tile_are_compiled_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = json.loads(json.dumps(table()))
    rule = {"up_to": 257, "tile": {"rows": 128, "step": 64, "heads": 1, "warps": 8, "stages": 2}}
    changed["tiles"]["default"]["attention_forward"][:0] = [{**rule, "head_dims": [80]}]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(changed))
    before = len(resources.distinct((90,), space=False))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "TABLE_PATH", path)
        dispatch.forget_table()
        assert len(resources.distinct((90,), space=False)) == before + 2  # with and without saving, for 577 and 1025
    dispatch.forget_table()
    assert len(resources.distinct((90,), space=False)) == before


@pytest.mark.slow
def test_check_of_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(["--check", "--jobs", "1"]) == 0
    assert "0 faults" in capsys.readouterr().out

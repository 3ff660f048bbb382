"""Recipes from outside: what is read, what is refused, and whether the one line says what to do."""

import contextlib
import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lut_ds.config import Recipe, load_recipe, parse_recipe, recipe_keys, shipped_recipes
from lut_ds.errors import UserError

KEYS = [key for key in recipe_keys() if key != "train.deepspeed_override"]


def refused(*overrides: str, recipe: str = "demo") -> str:
    """The line a user reads; fails when the recipe is taken."""
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@st.composite
def slips(draw: st.DrawFn) -> tuple[str, str]:
    """A valid section.key, and the same with one letter dropped, doubled, changed or swapped, in either part."""
    key = draw(st.sampled_from(KEYS))
    at = draw(st.integers(0, len(key) - 1).filter(lambda i: key[i] != "."))
    kind = draw(st.sampled_from(["drop", "double", "change", "swap"]))
    letter = draw(st.sampled_from(string.ascii_lowercase))
    swapped = key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :]
    typed = {
        "drop": key[:at] + key[at + 1 :],
        "double": key[:at] + key[at] + key[at:],
        "change": key[:at] + letter + key[at + 1 :],
        "swap": swapped if "." not in key[at + 1 : at + 2] else key[:at] + key[at + 1 :],
    }[kind]
    return key, typed


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(slips())
def test_a_slip_names_the_key_that_was_meant(slip: tuple[str, str]) -> None:
    key, typed = slip
    section, _, name = typed.partition(".")
    assume(typed not in recipe_keys() and section and name and "." not in name)
    text = refused(f"{typed}=1")
    meant_section = key.split(".")[0]
    if section != meant_section:
        assert f"unknown key {section}; did you mean {meant_section}?" in text
    else:
        assert f"unknown key {typed}; did you mean " in text
        suggested = text.rsplit("did you mean ", 1)[1].rstrip("?")
        # Short keys have near neighbours that are as close; a suggestion must be a key, and nearly always the one meant.
        assert suggested in recipe_keys()
        assert suggested == key or len(name) <= 5 or suggested.split(".")[0] == section


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("optim.blrr", "optim.blr"),
        ("optin.blr", "optim"),
        ("train.globalbatch", "train.global_batch"),
        ("method.maskratio", "method.mask_ratio"),
        ("data.blr", "optim.blr"),
        ("train.mask_ratio", "method.mask_ratio"),
        ("optim.BLR", "optim.blr"),
        ("Run.dir", "run"),
    ],
)
def test_known_slips(typed: str, meant: str) -> None:
    assert refused(f"{typed}=1").endswith(
        f"unknown key {typed if '.' in meant else typed.split('.')[0]}; did you mean {meant}?"
    )


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KEYS), st.text(max_size=30), st.sampled_from(["", "=", "==", ".", " = "]))
def test_no_override_ends_in_a_stack_trace(key: str, text: str, joint: str) -> None:
    # Any other exception is a stack trace to the user; `UserError` itself makes one line of what it is given.
    with contextlib.suppress(UserError):
        assert isinstance(load_recipe("demo", [key + joint + text]), Recipe)


WRONG_TYPES = [
    ("optim.blr", "fast"),
    ("optim.blr", "true"),
    ("optim.blr", "[1]"),
    ("optim.blr", "{a: 1}"),
    ("optim.blr", ""),
    ("optim.betas", "0.9"),
    ("optim.betas", "[0.9]"),
    ("optim.betas", "[0.9, 0.95, 0.99]"),
    ("optim.betas", "[a, b]"),
    ("train.epochs", "1.5"),
    ("train.epochs", "true"),
    ("train.epochs", "ten"),
    ("train.global_batch", "64.0"),
    ("train.compile", "maybe"),
    ("train.deepspeed_override", "3"),
    ("method.name", "mea"),
    ("method.norm_pix", "1"),
    ("method.head_norm", "batch"),
    ("run.wandb", "sometimes"),
    ("run.seed", "1.0"),
    ("precision.compute", "fp64"),
]

OUT_OF_RANGE = [
    ("optim.blr", "-1"),
    ("optim.blr", ".inf"),
    ("optim.blr", ".nan"),
    ("optim.blr", "1e400"),
    ("optim.eps", "0"),
    ("optim.clip_grad", "0"),
    ("optim.clip_grad", ".inf"),
    ("optim.betas", "[0.9, 1.0]"),
    ("optim.betas", "[-0.1, 0.9]"),
    ("optim.weight_decay", ".nan"),
    ("train.epochs", "0"),
    ("train.max_steps", "0"),
    ("train.global_batch", "-64"),
    ("method.mask_ratio", "0"),
    ("method.mask_ratio", "1"),
    ("method.ema_decay", "1.1"),
    ("method.w_bc", "-0.1"),
    ("data.hflip", "2"),
    ("data.crop_scale", "[1.0, 0.2]"),
    ("data.crop_scale", "[0.0, 1.0]"),
    ("data.crop_scale", "[0.2, 5]"),
    ("data.jitter", "[0.4, 0.4, 0.2, 0.6]"),
    ("data.jitter", "[-0.1, 0.4, 0.2, 0.1]"),
    ("model.heads", "0"),
    ("run.seed", "-1"),
    ("run.seed", "4294967296"),
    ("run.log_every", "0"),
]


@pytest.mark.parametrize("key, value", WRONG_TYPES + OUT_OF_RANGE)
def test_a_wrong_value_is_refused_at_its_key(key: str, value: str) -> None:
    text = refused(f"{key}={value}")
    assert text.startswith(f"recipe demo.yaml: {key}")


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["model.patch_size=15"], ["image_size 224", "patch_size 15"]),
        (["model.heads=7"], ["width 768", "heads 7"]),
        (["model.decoder_heads=3"], ["decoder_width 512", "decoder_heads 3"]),
        (["model.width=770", "model.heads=2"], ["width 770", "4"]),
        (["method.mask_ratio=0.4"], ["method.mask_ratio 0.4", "0.5", "disjoint"]),
        (["method.mask_ratio=0.999"], ["method.mask_ratio 0.999", "196"]),
        (["train.global_batch=64", "train.micro_batch=48"], ["train.micro_batch 48", "train.global_batch 64"]),
        (["train.epochs=40", "optim.warmup_epochs=40"], ["optim.warmup_epochs 40", "train.epochs 40"]),
        (["data.crop_pad=224"], ["crop_pad 224", "image_size 224"]),
    ],
)
def test_impossible_combinations_name_both_sides(overrides: list[str], named: list[str]) -> None:
    text = refused(*overrides, recipe="lut_vitb16")
    assert all(part in text for part in named), text


def test_one_view_may_show_more_than_half() -> None:
    assert load_recipe("demo", ["method.name=mae", "method.mask_ratio=0.4"]).method.mask_ratio == 0.4
    assert load_recipe("demo", ["method.mask_ratio=0.5"]).method.mask_ratio == 0.5


@pytest.mark.parametrize("mode", ["off", "offline", "online"])
def test_every_wandb_mode_can_be_typed(mode: str, tmp_path: Path) -> None:
    """`off` is a boolean to YAML 1.1."""
    assert load_recipe("demo", [f"run.wandb={mode}"]).run.wandb == mode
    assert load_recipe(written(tmp_path, f"run: {{wandb: {mode}}}")).run.wandb == mode


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("optim.blr=1e-4", "optim", "blr", 1e-4),
        ("optim.blr=3", "optim", "blr", 3.0),
        ("optim.blr = 3e-4", "optim", "blr", 3e-4),
        ("optim.betas=[0.9, 999e-3]", "optim", "betas", (0.9, 0.999)),
        ("train.max_steps=null", "train", "max_steps", None),
        ("train.compile=true", "train", "compile", True),
        ("train.compile=auto", "train", "compile", "auto"),
        ("optim.clip_grad=~", "optim", "clip_grad", None),
        ("run.dir=a=b", "run", "dir", "a=b"),
        ("run.dir=1e5run", "run", "dir", "1e5run"),
        ("run.dir='123'", "run", "dir", "123"),
        ("data.path=/a b/c", "data", "path", "/a b/c"),
        ("run.dir=/a #b", "run", "dir", "/a #b"),
        ("run.dir=2024", "run", "dir", "2024"),
    ],
)
def test_overrides_are_read_as_yaml(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load_recipe("demo", [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_nested_ones_add_up() -> None:
    zero = "train.deepspeed_override.zero_optimization"
    recipe = load_recipe("demo", ["optim.blr=1", "optim.blr=2", f"{zero}.stage=2", f"{zero}.overlap_comm=true"])
    assert recipe.optim.blr == 2
    assert recipe.train.deepspeed_override == {"zero_optimization": {"stage": 2, "overlap_comm": True}}


@pytest.mark.parametrize(
    "override", ["optim", "optim=3", "optim.blr", "=1", ".blr=1", "optim.=1", "optim..blr=1", "blr=1"]
)
def test_an_override_of_another_form_shows_the_form(override: str) -> None:
    assert "expected section.key=value" in refused(override)


def test_an_override_cannot_go_below_a_value() -> None:
    assert "blr is a value" in refused("optim.blr.x=1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "- optim",
        "optim: {blr: 1",
        "optim:\n\tblr: 1",
        "optim: 3",
        "optim:",
        "1: {}",
        "optim: {1: 2}",
        "? {a: 1}\n: 3",
        "---\n{}\n---\n{}",
        "a: &a [*a]",
        b"\xff\xfe\x00",
        b"\x00",
        "optim: !!python/object/apply:os.mkdir [pwned]",
    ],
)
def test_a_file_that_is_no_recipe_is_one_line_naming_it(text: str | bytes, tmp_path: Path) -> None:
    assert "mine.yaml" in refused(recipe=written(tmp_path, text))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", ["optim: {blr: 1, blr: 2}", "optim: {blr: 1}\nmodel: {}\noptim: {eps: 1.0e-3}"])
def test_a_key_given_twice_is_refused(text: str, tmp_path: Path) -> None:
    """YAML would keep the last one and lose a whole section in silence."""
    assert "twice" in refused(recipe=written(tmp_path, text))


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lut_vitl61", "lut_vitl16"),
        ("demoo", "demo"),
        ("none.yaml", "none.yaml: no such file"),
        ("my.recipe", "my.recipe: no such recipe"),
        ("../config", "../config: no such recipe"),
        ("", "no such recipe"),
        ("x" * 5000, "no such recipe"),
    ],
)
def test_an_unknown_recipe_is_one_line(name: str, hint: str) -> None:
    text = refused(recipe=name)
    assert hint in text
    assert "lut-ds recipes" in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_survive_being_written_down(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    again = load_recipe(written(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


def test_defaults_are_the_published_recipe() -> None:
    recipe = parse_recipe({}, "empty")
    assert (recipe.method.name, recipe.method.mask_ratio, recipe.method.w_bc) == ("lut", 0.75, 0.25)
    assert (recipe.optim.betas, recipe.optim.clip_grad, recipe.train.global_batch) == ((0.9, 0.95), None, 4096)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_without_permission(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "{}"))
    path.chmod(0)
    assert "mine.yaml" in refused(recipe=str(path))

"""DEST/train/<class>/ and DEST/val/<class>/ of links or copies: interrupted, the same command goes on; nothing is overwritten."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lut_ds.data.arrange.layouts import SETS, Listing, check_path
from lut_ds.data.outputs import writable_folder
from lut_ds.data.progress import progress_bar
from lut_ds.errors import UserError

How = Literal["symlink", "hardlink", "copy"]
MANIFEST = "arranged.json"


def arrange(
    name: str,
    source: Path,
    dest: Path,
    how: How = "symlink",
    subset: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Arrange a published set for `lut-ds finetune`.

    Args:
        name: one of `SETS`.
        source: folder that its archives were unpacked to; it is not changed.
        dest: folder to write: missing, empty, or of an earlier, interrupted arrangement of the same.
        how: what each image becomes.
        subset: other numbers of images and classes than the published ones are fine, and so are images that are not there.
        stopped: asked between images; True stops.

    Returns:
        `name`, `source`, `path`, `how`, `classes`, `train`, `val`, `made`, `there` (images that were already), `left_out` (not in
        the source), `smallest`, `largest` (training images of a class), `complete`.

    Raises:
        UserError: annotation files or images that are missing, disagree or are not those published; a class of one split that
            the other has not; a folder or file at `dest` that is not this set's.
    """
    listing = SETS[name].read(source)
    splits, left_out = _present(listing, subset)
    _check(name, listing, splits, subset)
    _claim(dest, {"set": name, "source": str(listing.root.resolve()), "how": how})
    planned = _plan(listing, splits)
    _refuse_strangers(dest, planned)
    made = there = 0
    with progress_bar(f"arranging {name}", len(planned)) as bar:
        for target, path in planned.items():
            if stopped():
                break
            new = _place(listing.root / path, dest / target, how)
            made, there = made + new, there + (not new)
            bar.update()
    counts = Counter(index for _, index in splits["train"])
    return {
        "name": name,
        "source": str(source),
        "path": str(dest),
        "how": how,
        "classes": len(counts),
        **{split: len(images) for split, images in splits.items()},
        "made": made,
        "there": there,
        "left_out": left_out,
        "smallest": min(counts.values()),
        "largest": max(counts.values()),
        "complete": made + there == len(planned),
    }


def describe(result: dict[str, Any]) -> str:
    """The result in words."""
    text = (
        f"{result['path']}: {result['train']:,} training and {result['val']:,} validation images of {result['classes']:,} classes "
        f"({result['smallest']} to {result['largest']} training images a class); {result['made']:,} made, "
        f"{result['there']:,} were there"
    )
    return text if result["complete"] else f"{text}; stopped, the same command goes on"


def _present(listing: Listing, subset: bool) -> tuple[dict[str, list[tuple[str, int]]], int]:
    """The images of each split that are there, and how many are not."""
    splits: dict[str, list[tuple[str, int]]] = {}
    missing: list[str] = []
    for split, images in (("train", listing.train), ("val", listing.val)):
        splits[split] = []
        for path, index in images:
            check_path(path, listing.root)
            there = os.path.isfile(listing.root / path)
            (splits[split] if there else missing).append((path, index) if there else path)  # type: ignore[arg-type]
    if missing and not subset:
        raise UserError(
            f"arrange: {listing.root / missing[0]}: expected an image, found none ({len(missing):,} missing); unpack all of the "
            "archive, or add --subset"
        )
    return splits, len(missing)


def _check(name: str, listing: Listing, splits: dict[str, list[tuple[str, int]]], subset: bool) -> None:
    """Refuse sets that no classifier can be trained and evaluated on, and unless `subset` others than the published."""
    published = SETS[name]
    paths = Counter(path for images in splits.values() for path, _ in images)
    twice = next((path for path, count in paths.items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"arrange: {listing.root}: expected each image once, found {twice} twice in the annotation files"
        )
    classes = {split: {index for _, index in images} for split, images in splits.items()}
    for one, other in (("val", "train"), ("train", "val")):
        if alone := sorted(classes[one] - classes[other]):
            raise UserError(
                f"arrange: {listing.root}: expected the same classes in train and val, found {listing.classes[alone[0]]!r} in {one} "
                f"alone ({len(alone)} such classes); complete the set"
            )
    found = {"classes": len(classes["train"]), **{split: len(images) for split, images in splits.items()}}
    for what, count in found.items():
        expected = getattr(published, what)
        if count != expected and not subset:
            images = "classes" if what == "classes" else f"{what} images"
            raise UserError(
                f"arrange: {listing.root}: expected the {expected:,} {images} of {name}, found {count:,}; complete it, or add --subset"
            )
    if not found["train"]:
        raise UserError(f"arrange: {listing.root}: expected images, found none")


def _plan(listing: Listing, splits: dict[str, list[tuple[str, int]]]) -> dict[str, str]:
    """Source path by target, both relative; UserError where two images would have one name."""
    planned: dict[str, str] = {}
    for split, images in splits.items():
        for path, index in images:
            target = f"{split}/{listing.classes[index]}/{Path(path).name}"
            if target in planned:
                raise UserError(
                    f"arrange: {listing.root}: {planned[target]} and {path} would both become {target}; rename one"
                )
            planned[target] = path
    return planned


def _claim(dest: Path, identity: dict[str, str]) -> None:
    """Make the folder ours, or see that it is."""
    manifest = dest / MANIFEST
    try:
        old = json.loads(manifest.read_text()) if manifest.is_file() else None
    except (OSError, ValueError):
        old = {}
    if old is not None and old != identity:
        raise UserError(
            f"arrange: {dest}: expected an arrangement of {identity}, found one of {old}; give another folder"
        )
    if old is None:
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise UserError(
                f"arrange: {dest}: expected a missing or empty folder, found other files; give another folder"
            )
        writable_folder(dest)
        manifest.write_text(json.dumps(identity) + "\n")


def _refuse_strangers(dest: Path, planned: dict[str, str]) -> None:
    """UserError for an image below `dest` that is not the set's: training would read it too."""
    for split in ("train", "val"):
        for folder, _, files in os.walk(dest / split):
            for file in files:
                target = os.path.relpath(os.path.join(folder, file), dest)
                if target not in planned and not file.startswith("."):
                    raise UserError(
                        f"arrange: {dest / target}: expected images of the set alone, found this; move it away"
                    )


def _place(source: Path, target: Path, how: How) -> bool:
    """Make one link or copy; False where it is there already. UserError for another file in its place."""
    if os.path.lexists(target):
        if _same(source, target, how):
            return False
        raise UserError(
            f"arrange: {target}: expected {source}, found another file; move it away, nothing is overwritten"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "symlink":
        target.symlink_to(source.resolve())
    elif how == "hardlink":
        _hardlink(source, target)
    else:
        aside = target.with_name(f".{target.name}.partial")  # what a killed process left is taken over by the next
        shutil.copyfile(source, aside)
        os.rename(aside, target)
    return True


def _hardlink(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise UserError(
            f"arrange: {target}: cannot be a hard link of {source}: {error.strerror or error}; take --how symlink or copy"
        ) from error


def _same(source: Path, target: Path, how: How) -> bool:
    if how == "symlink":
        return target.is_symlink() and target.resolve() == source.resolve()
    if target.is_symlink():
        return False
    return os.path.samefile(source, target) if how == "hardlink" else target.stat().st_size == source.stat().st_size

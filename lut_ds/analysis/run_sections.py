"""The sections of a report on one run, or on several beside each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lut_ds.analysis import page
from lut_ds.analysis.curves import SPEED, TITLES, curve_keys, draw_accuracy, draw_runs
from lut_ds.analysis.demo_page import draw_knn
from lut_ds.analysis.figures import Draw
from lut_ds.analysis.findings import TITLES as ANALYSES
from lut_ds.analysis.probes import draw_history, draw_knn_by_k, draw_sweep
from lut_ds.analysis.report import CURVES, epoch_means, training_sentence
from lut_ds.analysis.robustness import draw_robustness
from lut_ds.analysis.runs import RunRecord, StoredAnalysis, status
from lut_ds.analysis.scores import SCORES, headline

ABSENT = "-"
_SHORT = 15  # rows of a list that is not folded
_LARGEST = 1_000_000  # bytes of a picture that is taken as it is


def overview(runs: Sequence[RunRecord]) -> page.Section:
    """What, when and where: a column a run."""
    rows: dict[str, list[str]] = {
        "what": [run.kind for run in runs],
        "status": [status(run).state for run in runs],
        "steps": [f"{run.step:,} of {run.steps:,}" for run in runs],
        "epochs": [f"{run.epoch:.4g}" for run in runs],
        "first started": [_day(run.starts[0].get("started", "")) if run.starts else ABSENT for run in runs],
        "last step written": [run.last_written for run in runs],
        "host": [str(run.starts[-1].get("host", ABSENT)) if run.starts else ABSENT for run in runs],
        "data": [str(run.recipe.get("data", {}).get("path")) for run in runs],
        "folder": [str(run.path) for run in runs],
    }
    if len(runs) == 1:
        return page.Section("Overview", page.facts({name: values[0] for name, values in rows.items()}))
    return page.Section("Overview", page.columns([run.name for run in runs], rows))


def training(runs: Sequence[RunRecord]) -> page.Section:
    """Curves of all runs in the same axes, and what was gained."""
    keys = [key for key in TITLES if any(key in curve_keys(run.metrics) for run in runs)]
    keys += [key for key in SPEED if any(key in record for run in runs for record in run.metrics)]
    named = [(run.name if len(runs) > 1 else "", run.metrics) for run in runs]
    said = CURVES
    if "feature_spread" in keys:
        said += " A spread near 0 would mean that all images get the same feature (collapse); 1 is isotropic."
    if any(record.get("applied") == 0 for run in runs for record in run.metrics):
        said += " A red tick on an axis is a step that was not applied."
    body = page.picture(draw_runs(named, keys), "Curves of the training over epochs", said)
    if len(runs) == 1:
        batch = int(runs[0].recipe.get("train", {}).get("global_batch", 0))
        return page.Section(
            "Training", page.text(training_sentence(runs[0].summary, batch)) + body + epoch_means(runs[0].summary)
        )
    return page.Section("Training", body + _last_epochs(runs))


def _last_epochs(runs: Sequence[RunRecord]) -> str:
    """A table of how fast the runs were, and of each metric's mean over the last epoch."""
    found = [run.summary for run in runs]
    rows = [
        ["Images a second", *(f"{summary.images_per_second:,.0f}" for summary in found)],
        ["Seconds of training", *(f"{summary.seconds:,.0f}" for summary in found)],
    ]
    for key in TITLES:
        if any(key in summary.last for summary in found):
            rows.append([TITLES[key], *(f"{s.last[key]:.4g}" if key in s.last else ABSENT for s in found)])
    return page.table(["mean over the last epoch", *(run.name for run in runs)], rows)


def evaluations(runs: Sequence[RunRecord]) -> page.Section | None:
    """What each run was found to be worth; None where none was evaluated."""
    numbers = {run.name: headline(run) for run in runs}
    keys = list(dict.fromkeys(key for found in numbers.values() for key in found))
    if not keys and not any(run.evaluations for run in runs):
        return None
    names = [run.name for run in runs]
    rows = [[key, *(f"{numbers[n][key]:.2f}" if key in numbers[n] else ABSENT for n in names)] for key in keys]
    heads = ["", *names] if len(runs) > 1 else ["", "value"]
    body = page.table(heads, rows, "Accuracies in per cent.") if keys else ""
    for run in runs:
        pictures = "".join(_shown(*each) for each in _evaluated(run))
        pictures += _predictions(run)
        pictures += "".join(
            page.folded(f"{folder}: all that was found", page.facts(flat(found)))
            for folder, found in run.evaluations.items()
        )
        body += page.part(run.name, pictures) if len(runs) > 1 and pictures else pictures
    return page.Section("Evaluations", body)


def _shown(draw: Draw, alt: str, said: str) -> str:
    """A picture, or what is wrong with the results.json that it should show: other code may have written it."""
    try:
        return page.picture(draw, alt, said)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return page.note(f"No picture of {alt}: its results.json is incomplete ({type(error).__name__}: {error})")


def _evaluated(run: RunRecord) -> list[tuple[Draw, str, str]]:
    """A picture of each evaluation that has one, with its alternative text and caption."""
    found: list[tuple[Draw, str, str]] = []
    for results in run.evaluations.values():
        whose = {"ema": "averaged weights", "student": "student"}.get(results.get("model", {}).get("kind"), "model")
        about = f"{results.get('pool', '')} features of the {whose}"
        step = results.get("model", {}).get("step")
        about += f", step {step:,}" if isinstance(step, int) else ""
        if results.get("evaluation") == "knn":
            found.append((partial(draw_knn_by_k, results=results), "k-NN accuracy", f"k-NN on {about}."))
        elif results.get("evaluation") == "robustness":
            said = f"Robustness of step {step:,}." if isinstance(step, int) else "Robustness."
            found.append((partial(draw_robustness, results=results), "robustness", said))
        elif results.get("evaluation") == "probe":
            draw = draw_sweep if results.get("protocol") == "quick" else draw_history
            said = f"Linear probe ({results.get('protocol')}) on {about}."
            found.append((partial(draw, results=results), "linear probe", said))
    if isinstance(knn := run.results.get("knn"), dict):
        found.append((draw_knn(knn), "k-NN over the run", "k-NN over the run; epoch 0 is the random encoder."))
    shown = {name: key for key, name in SCORES.items() if run.scores and all(key in score for score in run.scores)}
    if shown:
        values = {name: [score[key] for score in run.scores] for name, key in shown.items()}
        draw_scores = draw_accuracy([score["epoch"] for score in run.scores], values, {}, "On val, over the run")
        found.append((draw_scores, "accuracy over the run", "On the validation images, over the run."))
    return found


def _predictions(run: RunRecord) -> str:
    """What a segmenter drew of its last evaluation; nothing where there is no picture, or one too large for a page."""
    file = run.path / "predictions.png"
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return ""
    drawn = file.read_bytes()
    return page.stored_picture(drawn, None, "predictions of the last evaluation", "Predictions of the last evaluation.")


def reconstructions(found: Mapping[str, tuple[Draw, str] | str]) -> page.Section | None:
    """A panel with its caption a run, or why there is none; None where no run could have one."""
    if not found:
        return None
    body = ""
    alt = "Images: input, masked input and prediction side by side"
    for name, each in found.items():
        shown = page.note(each) if isinstance(each, str) else page.picture(each[0], alt, each[1], narrow=True)
        body += page.part(name, shown) if len(found) > 1 else shown
    return page.Section("Reconstruction", body)


def analyses(runs: Sequence[RunRecord], stored: Mapping[str, Sequence[StoredAnalysis]]) -> page.Section | None:
    """The figures that `lut-ds analyze` left, one that two runs share once; None where it left none."""
    body = ""
    for name in ANALYSES:
        shown: list[bytes] = []
        for run in runs:
            for each in stored.get(run.name, ()):
                if each.name == name and each.light not in shown:
                    body += _analysis(run.name if len(runs) > 1 else "", each)
                    shown.append(each.light)
    return page.Section("Analyses", body) if body else None


def _analysis(run: str, each: StoredAnalysis) -> str:
    models = each.record["models"]
    steps = [
        f"{who}: {_whose(about)}step {about['step']:,}"
        for who, about in models.items()
        if about.get("step") is not None
    ]
    said = [f"{each.caption} {each.record['images']} images; {', '.join(steps) or ', '.join(models)}."]
    of = " and ".join(models) if len(models) > 1 else run
    title = ANALYSES[each.name] + (f": {of}" if of else "")
    said_of = [_sentence(who if len(each.sentences) > 1 else "", words) for who, words in each.sentences.items()]
    picture = page.stored_picture(each.light, each.dark, ANALYSES[each.name], " ".join(said))
    return page.part(title, page.text(*said_of) + picture)


def _whose(about: Mapping[str, Any]) -> str:
    """Of a model's record: the student, or the average of it."""
    return {"ema": "the average after ", "student": "the student after "}.get(str(about.get("kind")), "")


def _sentence(who: str, words: str) -> str:
    return f"{who}: {words}." if who else f"{words[:1].upper()}{words[1:]}."


def recipes(runs: Sequence[RunRecord]) -> page.Section:
    """The resolved recipes, folded by section; what differs between runs comes first and is marked."""
    names = [run.name for run in runs]
    body = ""
    if len(runs) > 1:
        rows = differences(runs)
        shared = {key: values for key, values in rows.items() if ABSENT not in values}
        said = f"{len(shared)} values differ." if shared else "No value differs that all recipes have."
        body = page.text(said if rows else "The recipes are the same.") + (
            page.columns(names, shared) if shared else ""
        )
        if other := {key: values for key, values in rows.items() if key not in shared}:
            body += page.folded(f"{len(other)} keys that some recipe lacks", page.columns(names, other))
    for section in dict.fromkeys(section for run in runs for section in run.recipe):
        trees = [run.recipe.get(section, {}) for run in runs]
        keys = dict.fromkeys(key for tree in trees for key in tree)
        values = {key: [tree.get(key, ABSENT) for tree in trees] for key in keys}
        table = (
            page.facts({k: v[0] for k, v in values.items()})
            if len(runs) == 1
            else page.columns(names, values, mark=True)
        )
        body += page.folded(section, table)
    return page.Section("Recipe", body)


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Values that are not the same in all recipes, by section.key; a dash where a recipe lacks the key, and
    those last. Without run.dir.
    """
    trees = [{f"{s}.{k}": v for s, values in run.recipe.items() for k, v in values.items()} for run in runs]
    rows = {key: [tree.get(key, ABSENT) for tree in trees] for key in dict.fromkeys(k for tree in trees for k in tree)}
    found = {key: v for key, v in rows.items() if key != "run.dir" and any(value != v[0] for value in v)}
    return dict(sorted(found.items(), key=lambda row: ABSENT in row[1]))


def history(runs: Sequence[RunRecord]) -> page.Section:
    """Starts, resumes, stops and whatever the guards noticed, in order of time."""
    body = ""
    for run in runs:
        rows = sorted([*map(_start, run.starts), *(_event(e) for e in run.events if e["event"] != "saved")])
        counts = Counter(what for _, what, _ in rows)
        saved = [event for event in run.events if event["event"] == "saved"]
        stalls = sum(float(event.get("stall_s") or 0) for event in saved)
        words = [status(run).sentence]
        words.append(f"Events: {', '.join(f'{what} ({count})' for what, count in counts.items())}." if counts else "")
        if saved:
            words.append(
                f"{len(saved):,} checkpoints saved; the steps stood still {stalls:.1f} s for them, all in all."
            )
        table = page.log([(_time(when), what, said) for when, what, said in rows])
        shown = page.text(" ".join(filter(None, words))) + (
            table if len(rows) <= _SHORT else page.folded(f"{len(rows)} events", table)
        )
        if run.unreadable:
            shown += page.note(f"Not readable, and left out: {', '.join(run.unreadable)}")
        body += page.part(run.name, shown) if len(runs) > 1 else shown
    return page.Section("History", body)


def _start(start: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(start.get("started", "")), "started", f"on {start.get('host', ABSENT)}: {start.get('command', ABSENT)}"


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "text")}
    said = event.get("text") or ", ".join(f"{key} {value}" for key, value in rest.items())
    return str(event.get("time", "")), str(event["event"]), str(said)


def environments(runs: Sequence[RunRecord]) -> page.Section:
    """Where and with what each run was last started."""
    found = [flat(run.starts[-1]) if run.starts else {} for run in runs]
    rows = {key: [each.get(key, ABSENT) for each in found] for key in dict.fromkeys(k for each in found for k in each)}
    plain = {key: values for key, values in rows.items() if not key.startswith("versions.")}
    versions = {key.removeprefix("versions."): v for key, v in rows.items() if key.startswith("versions.")}
    if len(runs) == 1:
        body = page.facts({k: v[0] for k, v in plain.items()})
        return page.Section(
            "Environment", body + page.folded("package versions", page.facts({k: v[0] for k, v in versions.items()}))
        )
    names = [run.name for run in runs]
    body = page.columns(names, plain, mark=True) + page.folded(
        "package versions", page.columns(names, versions, mark=True)
    )
    return page.Section("Environment", body)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name; long lists by their length."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = f"{len(value)} entries" if isinstance(value, list) and len(value) > 12 else value
    return found


def _day(text: str) -> str:
    """2026-01-31T12:00:00+0000 as date, hour and minute."""
    return text[:16].replace("T", " ")


def _time(text: str) -> str:
    return text[:19].replace("T", " ")

"""Faults other than kills: each function injects one into a start of a run, asserts how that ends, and says it.

The run is left stopped, with nothing of the fault remaining, so that its next start continues it.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lut_ds.engine.manifest import step_folders, verify
from tests.faults.namespaces import mounted
from tests.faults.victim import ROOT, SAVE_EVERY, Start, Victim, until

SHIFTED_CLOCK = """
import pathlib, time
_real, _set = time.time, pathlib.Path({path!r})
def _shifted():
    try:
        shift = float(_set.read_text())
    except (OSError, ValueError):
        return _real()
    _set.with_name("read").touch()
    return _real() + shift
time.time = _shifted
"""


def stop(victim: Victim, start: Start) -> None:
    """End a start with a signal to its last rank; all ranks must save and agree."""
    start.processes[-1].send_signal(signal.SIGTERM)
    stopped(victim, start)


def stopped(victim: Victim, start: Start) -> int:
    """Wait for a start that ends with a checkpoint of its last recorded step; returns the step."""
    codes = start.end()
    assert codes == [3] * victim.ranks, f"exit {codes}: {start.said()[-2000:]}"
    step = start.result()["step"]
    assert step == victim.last_step()
    assert verify(step_folders(victim.checkpoints)[0]) is None
    assert (victim.checkpoints / "latest").read_text() == f"step_{step:08d}\n"
    return step


def one_line(start: Start, code: int, *words: str) -> str:
    """Wait for a start of one rank that must end with this code, one line that has these words, and no stack trace."""
    codes, lines = start.end(), start.lines()
    assert codes == [code], f"exit {codes}: {start.said()[-2000:]}"
    assert len(lines) == 1, start.said()[-3000:]
    assert all(word in lines[0] for word in words), lines
    return lines[0]


def saving(victim: Victim, start: Start) -> None:
    """Wait until a save of this start begins."""
    old = victim.partials()
    victim.reach(start, 1)
    until(lambda: victim.partials() - old or not start.alive(), "a save", 0.0005)
    assert start.alive()


@contextmanager
def small_disk(victim: Victim, megabytes: int = 16) -> Iterator[list[str]]:
    """Put the run folder on a disk of its own for a while; gives the words before a command that is to see it."""
    home = victim.run
    script = f"cp -a {home} {home}.copy\nmount -t tmpfs -o size={megabytes}m none {home}\ncp -a {home}.copy/. {home}"
    with mounted(script) as namespace:
        victim.run = namespace.inside(home)
        try:
            yield namespace.prefix(ROOT)
            subprocess.run(["find", home, "-mindepth", "1", "-delete"], check=True)  # a mount point must stay
            shutil.copytree(victim.run, home, dirs_exist_ok=True)
        finally:
            victim.run = home
            shutil.rmtree(home.with_name("run.copy"))


def fill(folder: Path, spare: int) -> Path:
    """Write a file until the disk has only `spare` bytes left."""
    ballast = folder / "ballast"
    size = shutil.disk_usage(folder).free - spare
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):  # it is full, as was wanted
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 16)))
    return ballast


def disk_full(when: str) -> Callable[[Victim], str]:
    """A disk that fills up `before a save`, `as a save begins` or `before metrics are written`."""

    def inject(victim: Victim) -> str:
        with small_disk(victim) as prefix:
            rare = ["run.save_every=1000000"] if when == "before metrics are written" else []
            start = victim.start(*rare, prefix=prefix)
            if when == "as a save begins":
                saving(victim, start)
            else:
                victim.reach(start, 2)
            newest = step_folders(victim.checkpoints)[0]
            half = sum(file.stat().st_size for file in newest.iterdir()) // 2
            spare = half if when == "before a save" else 0
            ballast = fill(victim.run, spare)
            # A save under way may give room when it removes an old checkpoint.
            until(lambda: not (start.alive() and fill(victim.run, spare)), "the end of the run", 0.01)
            line = one_line(start, 1, "disk full", "intact")
            ballast.unlink()
            assert victim.damaged() == []
        return f"exit 1: {line.replace(str(victim.folder), '...')}"

    return inject


def read_only(victim: Victim) -> str:
    """A run folder that may only be read."""
    before = contents(victim.run)
    with mounted(f"mount --bind {victim.run} {victim.run}\nmount -o remount,ro,bind {victim.run}") as namespace:
        line = one_line(victim.start(prefix=namespace.prefix(ROOT)), 2, str(victim.run), "name another folder")
    assert contents(victim.run) == before
    return f"exit 2: {line.replace(str(victim.folder), '...')}"


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(file: Path, rng: random.Random) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    """Cut it somewhere."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def damaged_checkpoints(victim: Victim) -> str:
    """The newest four of them, each in another way."""
    rng = random.Random(1)
    newest = step_folders(victim.checkpoints)
    assert len(newest) > 4, "too few checkpoints to damage"
    flip(newest[0] / "rank_00000.safetensors", rng)
    flip(newest[1] / "shared.safetensors", rng)
    truncate(newest[2] / "state.json", rng)
    (newest[3] / "manifest.json").unlink()
    start = victim.go(victim.last_step() + SAVE_EVERY)
    assert start.result()["resumed_from"] == int(newest[4].name.removeprefix("step_"))
    for path in newest[:4]:
        assert f"{path.name} is damaged and passed over" in start.said()
        if verify(path):  # else the run has replaced it
            shutil.rmtree(path)
    return "four damaged ones named and passed over, continued from the fifth"


def all_checkpoints_damaged(victim: Victim) -> str:
    """Every one."""
    saved = victim.checkpoints.with_name("kept")
    shutil.copytree(victim.checkpoints, saved)
    rng = random.Random(2)
    for path in step_folders(victim.checkpoints):
        flip(path / "rank_00000.safetensors", rng)
    metrics = (victim.run / "metrics.jsonl").read_bytes()
    before = contents(victim.checkpoints)
    line = one_line(victim.start(), 2, "checkpoints are damaged")
    assert contents(victim.checkpoints) == before
    assert (victim.run / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(victim.checkpoints)
    saved.rename(victim.checkpoints)
    return f"exit 2: {line.replace(str(victim.folder), '...')}"


def tracker_killed(victim: Victim) -> str:
    """The process of Weights & Biases is killed."""
    clean = {name: "" for name in os.environ if name.startswith("WANDB_")}
    start = victim.start("run.wandb=offline", env={**clean, "HOME": str(victim.folder)})
    main = psutil.Process(start.processes[0].pid)

    def services() -> list[psutil.Process]:
        assert start.alive(), start.said()[-2000:]
        return [child for child in main.children(recursive=True) if child.name().startswith("wandb-core")]

    for service in until(services, "a wandb service"):
        service.kill()
    victim.reach(start, 10)
    stop(victim, start)
    assert start.said().count("wandb: mirror stopped, the run goes on") == 1, start.said()[-2000:]
    return "said once; the run went on"


def data_away(seconds: float) -> Callable[[Victim], str]:
    """The data folder is unmounted (renamed) for so long."""

    def inject(victim: Victim) -> str:
        away = victim.data.with_name("away")
        start = victim.start()
        victim.reach(start, 2)
        victim.data.rename(away)
        try:
            until(lambda: "waiting up to" in start.said() or not start.alive(), "the loss of the data")
            time.sleep(seconds)
        finally:
            away.rename(victim.data)
        victim.reach(start, 10)
        stop(victim, start)
        assert "data: can be read again, after" in start.said()
        assert not (victim.run / "quarantine.jsonl").exists()
        return "said, waited, went on; no sample was counted as bad"

    return inject


def rank_paused(seconds: float) -> Callable[[Victim], str]:
    """The last rank stands still (SIGSTOP) for so long, below guard.hang_seconds."""

    def inject(victim: Victim) -> str:
        start = victim.start()
        victim.reach(start, 2)
        start.processes[-1].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        start.processes[-1].send_signal(signal.SIGCONT)
        victim.reach(start, 10)
        stop(victim, start)
        return "the others waited; the run went on"

    return inject


def clock_jumps(victim: Victim) -> str:
    """The wall clock goes back by an hour, then forward by a day."""
    folder = victim.folder / "clock"
    folder.mkdir(exist_ok=True)
    setting = folder / "shift"
    (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK.format(path=str(setting)))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    start = victim.start(env={"PYTHONPATH": path})
    victim.reach(start, 2)
    for shift in (-3600, 86400):
        setting.with_name("new").write_text(str(shift))
        setting.with_name("new").replace(setting)
        victim.reach(start, 8)
    stop(victim, start)
    assert setting.with_name("read").exists()  # the run did look at that clock
    shutil.rmtree(folder)
    return "not noticed: durations come from the monotonic clock"


def signals_in_a_save(victim: Victim) -> str:
    """SIGTERM while a checkpoint is written, and another signal at once."""
    start = victim.start()
    saving(victim, start)
    start.processes[0].send_signal(signal.SIGTERM)
    start.processes[0].send_signal(signal.SIGUSR1)
    return f"saved step {stopped(victim, start)}, exit 3"


def stop_file(victim: Victim) -> str:
    """A file named `stop` in the run folder."""
    start = victim.start()
    victim.reach(start, 2)
    (victim.run / "stop").touch()
    step = stopped(victim, start)
    assert not (victim.run / "stop").exists()
    return f"saved step {step}, exit 3, took the file away"


def lost_files(victim: Victim) -> str:
    """After a kill: `latest` and `.lock` are gone, the last line of metrics.jsonl is cut, events.jsonl too."""
    start = victim.start("run.save_every=1000000")
    newest = int(step_folders(victim.checkpoints)[0].name.removeprefix("step_"))
    until(lambda: victim.last_step() >= newest + 4 or not start.alive(), "steps without a checkpoint")
    start.kill()
    (victim.checkpoints / "latest").unlink()
    (victim.run / ".lock").unlink()
    for name in ("metrics.jsonl", "events.jsonl"):
        os.truncate(victim.run / name, (victim.run / name).stat().st_size - 15)
    start = victim.go(victim.last_step() // SAVE_EVERY * SAVE_EVERY + 2 * SAVE_EVERY)
    assert start.result()["resumed_from"] == newest
    return "continued from the newest checkpoint; the steps after it were run again"


def metrics_lost(victim: Victim) -> str:
    """metrics.jsonl is cut in a line before the newest checkpoint; what was cut is put back afterwards."""
    file = victim.run / "metrics.jsonl"
    whole, step = file.read_text().splitlines(keepends=True), victim.last_step()
    file.write_text("".join(whole)[: sum(map(len, whole[:-6])) + 20])
    start = victim.go(step + SAVE_EVERY)
    assert f"the records of steps {step - 5} to {step} are lost" in start.said()
    assert len(victim.events("metrics_lost")) == 1
    file.write_text("".join([*whole, *file.read_text().splitlines(keepends=True)[-SAVE_EVERY:]]))
    return "said which records are lost; the steps after them as undisturbed"

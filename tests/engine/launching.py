"""Starting real ranks from tests."""

import atexit
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GPUS = Path("/dev/nvidiactl").exists()  # what CUDA has opened does not survive a fork


PATIENCE = 600.0  # seconds for anything that must happen: only what hangs takes so long, on however busy a machine
# Below the ports that the system gives to whoever asks for any: one of those may be taken before a rank listens there.
PORTS, WORKERS = range(10_100, 16_000), 8


@functools.cache
def _ports() -> Iterator[int]:
    """Ports round and round: this process's part of `PORTS`, where no other worker of this session looks for one."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    part = PORTS[worker % WORKERS :: WORKERS]
    first = os.getpid() % len(part)  # another session on this machine
    return itertools.cycle([*part[first:], *part[:first]])


def free_port() -> int:
    """A TCP port on which nobody listens."""
    for port in _ports():
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")


class Nursery:
    """The process that forks ranks (tests/engine/nursery.py); one for each process that runs tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.nursery"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.files = tempfile.TemporaryDirectory(prefix="ranks")
        atexit.register(self.close)

    def ask(self, **request: Any) -> int | None:
        """A request and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it, and whatever rank was forgotten."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self.files.cleanup()


@functools.cache
def nursery() -> Nursery:
    """This process's."""
    return Nursery()


class Rank:
    """A rank that the nursery forked, with what tests need of `subprocess.Popen`.

    Args:
        module, arguments: what it runs.
        env: its whole environment.
        said: existing files for its standard output and error; None makes some.
    """

    def __init__(
        self, module: str, arguments: list[str], env: dict[str, str], said: tuple[Path, Path] | None = None
    ) -> None:
        self._nursery = nursery()
        self._said = said or [Path(tempfile.mkstemp(dir=self._nursery.files.name)[1]) for _ in range(2)]
        out, err = map(str, self._said)
        pid = self._nursery.ask(module=module, arguments=arguments, env=env, cwd=str(ROOT), out=out, err=err)
        assert pid is not None
        self.pid, self.args = pid, [module, *arguments]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to standard output and error."""
        self.wait(timeout)
        out, err = (file.read_text(errors="replace") for file in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[str] | Rank


def start_ranks(command: list[str], world_size: int, **env: str) -> list[Process]:
    """One process a rank with the environment that torchrun would set; `python -m` commands are forked where that works."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    forked = not GPUS and not env  # what is set may be read while modules load
    return [
        _start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, forked) for rank in range(world_size)
    ]


def _start(command: list[str], env: dict[str, str], forked: bool) -> Process:
    if forked and command[:2] == [sys.executable, "-m"]:
        return Rank(command[2], command[3:], env)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_ranks(command: list[str], world_size: int, **env: str) -> list[tuple[str, str]]:
    """Run ranks to their end; fails with what they printed unless all exit 0."""
    processes = start_ranks(command, world_size, **env)
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=PATIENCE))
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"exit {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return outputs

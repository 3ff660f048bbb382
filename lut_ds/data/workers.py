"""Worker processes that may crash: a decoder that dies of one file must name that file and not end hours of work."""

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lut_ds.errors import RunFault, UserError

R = TypeVar("R")
Chunk = NDArray[np.int64]
Work = Callable[[Chunk], R]
_START = 600.0  # seconds: imports from shared storage, by every core at once
_POLL = 0.2  # seconds between looks at the clock and at the caller's wish to stop


@dataclass(frozen=True)
class Crash:
    """Why the worker of a chunk of one item gave no answer: it died, or it took too long."""

    why: str


@dataclass(frozen=True)
class _Error:
    """An exception in a worker: the words of a UserError or RunFault, or a traceback."""

    kind: type[Exception]
    text: str


@dataclass
class _Worker:
    process: Any
    pipe: "Connection[Any, Any]"
    chunk: Chunk
    since: float
    open: bool = False  # whether it has called the opener


class Crew(Generic[R]):
    """Processes that each call `opener` once and then the function it returns on one chunk of items after another.

    A chunk whose worker dies or is silent for `patience` seconds is tried again, item by item; an item that does so
    alone is answered by a `Crash`. Workers are forked from a server that has imported `preload` and started no thread, so
    that starting one costs milliseconds. They ignore Ctrl-C and end with this process.

    Args:
        opener: picklable.
        workers: processes.
        preload: modules; importing them must start no thread. The first crew of a process decides.
        patience: seconds.
    """

    def __init__(
        self, opener: Callable[[], Work[R]], workers: int, *, preload: Sequence[str] = (), patience: float = 300.0
    ) -> None:
        self._opener, self._workers, self._patience = opener, workers, patience
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._busy: list[_Worker] = []
        self._idle: list[_Worker] = []

    def run(
        self, chunks: Iterable[Chunk], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Chunk, R | Crash]]:
        """The answer to every chunk, as they come; ends early once `stopped()`.

        Raises:
            UserError, RunFault: what a worker raised; RunFault with a traceback for any other exception in it.
        """
        todo, again = iter(chunks), deque[Chunk]()
        try:
            while not stopped():
                while len(self._busy) < self._workers:
                    chunk = again.popleft() if again else next(todo, None)
                    if chunk is None:
                        break
                    self._give(chunk)
                if not self._busy:
                    return
                for worker, answer in self._answers():
                    if isinstance(answer, Crash) and len(worker.chunk) > 1:
                        again.extend(np.split(worker.chunk, len(worker.chunk)))
                    else:
                        yield worker.chunk, answer
        finally:
            self._close()

    def _give(self, chunk: Chunk) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        worker.chunk, worker.since = chunk, time.monotonic()
        self._busy.append(worker)
        with suppress(BrokenPipeError):  # it died while idle: found when its answer is read
            worker.pipe.send(chunk)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._opener), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, np.empty(0, np.int64), 0.0)

    def _answers(self) -> Iterator[tuple[_Worker, R | Crash]]:
        """What has come within a moment."""
        ready = wait([worker.pipe for worker in self._busy], timeout=_POLL)
        for worker in list(self._busy):
            if worker.pipe in ready:
                if (answer := self._receive(worker)) is not None:
                    self._busy.remove(worker)
                    yield worker, answer
            elif time.monotonic() - worker.since > (self._patience if worker.open else _START):
                self._busy.remove(worker)
                worker.process.kill()
                _end(worker)
                if not worker.open:
                    raise RunFault(f"a worker process could not start in {_START:g} s")
                yield worker, Crash(f"no answer in {self._patience:g} s")

    def _receive(self, worker: _Worker) -> R | Crash | None:
        """The worker's answer; None when all it says is that it is ready."""
        try:
            answer = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            how = _end(worker)
            if not worker.open:
                raise RunFault(f"a worker process could not start: {how}") from None
            return Crash(how)
        if isinstance(answer, _Error):
            raise answer.kind(answer.text)
        if not worker.open:
            worker.open, worker.since = True, time.monotonic()
            return None
        self._idle.append(worker)
        return answer

    def _close(self) -> None:
        for worker in self._busy:
            worker.process.terminate()
        for worker in self._busy + self._idle:
            worker.pipe.close()
        for worker in self._busy + self._idle:
            _end(worker)
        self._busy, self._idle = [], []


def _end(worker: _Worker) -> str:
    """Wait for a process that is about to end; how it ended."""
    worker.pipe.close()
    worker.process.join(10.0)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    code = worker.process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: "Connection[Any, Any]", opener: Callable[[], Work[Any]]) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    with _told(pipe):
        work = opener()
        pipe.send(None)
        while True:
            try:
                chunk = pipe.recv()
            except EOFError:
                return
            pipe.send(work(chunk))


@contextmanager
def _told(pipe: "Connection[Any, Any]") -> Iterator[None]:
    """Send an exception to the parent."""
    try:
        yield
    except (UserError, RunFault) as error:
        pipe.send(_Error(type(error), str(error)))
    except BrokenPipeError:  # the parent is gone
        return
    except Exception:  # noqa: BLE001 - the parent raises it
        pipe.send(_Error(RunFault, f"a worker process failed:\n{traceback.format_exc()}"))

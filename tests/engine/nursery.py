"""A process that has loaded torch and DeepSpeed once and forks ranks: python -m tests.engine.nursery

Loading takes 5 s of a core, many times what a rank of a few tiny steps computes. A fork of this process is a rank like any
other from there on: a process of its own with its own signals, files and threads, that runs its module as `python -m` does and
ends through the interpreter's own exit.

Reads a JSON object a line from standard input and answers with one: `{"module", "arguments", "env", "cwd", "out", "err"}`
starts a rank (answer: its pid), `{"poll": pid}` asks for its exit status (null while it runs).
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def serve() -> dict[str, Any] | None:
    """Answer requests; returns one in the fork that is to run it, None in this process once the input has ended."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            found, status = os.waitpid(request["poll"], os.WNOHANG)
            running -= {found}
            answer = os.waitstatus_to_exitcode(status) if found else None
        else:
            answer = os.fork()
            if not answer:
                return request
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def become(request: dict[str, Any]) -> None:
    """Take on the files, environment and module of a request."""
    for number, (name, flags) in enumerate(
        [("/dev/null", os.O_RDONLY), *((request[k], os.O_WRONLY) for k in ("out", "err"))]
    ):
        handle = os.open(name, flags)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["", *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    answers, sys.stdout = sys.stdout, sys.stderr  # of libraries that print
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - loads torch's compiler, as the first engine does

    from lut_ds.config import load_recipe
    from lut_ds.data.pipeline import build_pipeline
    from lut_ds.engine.reading import view_specs

    # DALI translates the pipeline's definition when it is first used, which takes a second.
    build_pipeline(
        view_specs(load_recipe("demo", ["data.photometric=true"])),
        16,
        dict,
        batch_size=1,
        threads=1,
        device_id=None,
        prefetch=1,
    )
    sys.stdout = answers
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would have one of them only"
    wanted = serve()
    if wanted is not None:
        become(wanted)

"""Ranks that share a folder of checkpoints, or believe so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.launching import PATIENCE, start_ranks

TWO = """
import os, sys
import torch, torch.distributed as dist
from pathlib import Path
from lut_ds.engine.checkpoint import CheckpointStore
from lut_ds.errors import RunFault, UserError

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo")
store = CheckpointStore(folder, rank, 2, 3, None, lambda line: print("said", line))
own = {"w": torch.full((10,), float(rank))}
store.save(1, own, {}, {}, {})
try:
    if rank == 1:  # a folder where this rank's file goes: its write fails, the other's does not
        import lut_ds.engine.checkpoint as module
        write_tensors = module.write_tensors
        module.write_tensors = lambda path, *rest: (path.mkdir(), write_tensors(path, *rest))
    store.save(2, own, {}, {}, {})
except RunFault as fault:
    print("fault", fault)
if rank == 0:
    with open(folder / "step_00000001" / "rank_00001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
dist.barrier()
try:
    store.newest_valid()
except UserError as error:
    print("newest", error)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_fail_and_judge_together(tmp_path: Path) -> None:
    """One rank's failure is every rank's; a file that only the other rank has checked counts for both."""
    processes = start_ranks([sys.executable, "-c", TWO, str(tmp_path / "c")], 2)
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        assert "fault checkpoint of step 2 not written" in out
        assert "rank 1: " in out
        assert "all 1 checkpoints are damaged" in out
    assert "said checkpoint step_00000001 is damaged" in outputs[0][0]
    assert "said" not in outputs[1][0]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["latest", "step_00000001"]


APART = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from lut_ds.engine.sharedfolder import check_shared
from lut_ds.errors import UserError
dist.init_process_group("gloo")
for folder in sys.argv[1:]:
    try:
        check_shared(Path(folder), int(os.environ["RANK"]), 2, 2.0)
        print("shared", os.listdir(folder))
    except UserError as error:
        print("refused", error)
    dist.barrier()
dist.destroy_process_group()
"""
# Rank 1 gets an empty file system in place of the first folder, as on a node that lacks the share, and a read-only one of the second.
MOUNTED = """
python=$1; shift
[ $RANK = 0 ] || [ -n "$INSIDE" ] || exec unshare -rm env INSIDE=1 sh -ec "$0" "$0" "$python" "$@"
[ $RANK = 0 ] || { mount -t tmpfs none "$2"; mount -t tmpfs -o ro none "$3"; }
exec "$python" -c "$@"
"""


@pytest.mark.slow
def test_a_rank_that_has_another_folder_or_may_not_write_is_named(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    folders = [str(tmp_path / name) for name in ("hidden", "readonly", "shared")]
    for folder in folders:
        Path(folder).mkdir()
    processes = start_ranks(["sh", "-ec", MOUNTED, MOUNTED, sys.executable, APART, *folders], 2)
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        hidden, readonly, shared = out.splitlines()
        assert hidden.startswith(f"refused run.dir: {folders[0]}: what rank 1 wrote is not seen on ")
        assert readonly.startswith(f"refused run.dir: {folders[1]}: rank 1 on ")
        assert "cannot write it: Read-only file system; name another folder" in readonly
        assert shared.startswith("shared")
    assert not os.listdir(folders[2])

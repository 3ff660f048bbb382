"""A mount namespace of one's own: small disks and read-only folders that exist for a test alone."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAPPED = [] if os.geteuid() == 0 else ["--map-root-user"]


def mounting_works() -> bool:
    """Whether this user may mount in a namespace of one's own."""
    command = ["unshare", *MAPPED, "--mount", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Namespace:
    """A process that keeps a mount namespace.

    Args:
        keeper: the process.
    """

    def __init__(self, keeper: subprocess.Popen[str]) -> None:
        self._keeper = keeper

    def prefix(self, folder: Path) -> list[str]:
        """Words before a command that is to run inside, in a folder."""
        user = ["--user", "--preserve-credentials"] if MAPPED else []
        enter = ["nsenter", "--target", str(self._keeper.pid), "--mount", *user]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]

    def inside(self, path: Path) -> Path:
        """A path of the namespace, as seen from outside."""
        return Path(f"/proc/{self._keeper.pid}/root") / path.relative_to("/")


@contextmanager
def mounted(script: str) -> Iterator[Namespace]:
    """A namespace in which a shell script has mounted something; it is gone, with all it holds, afterwards."""
    keeper = subprocess.Popen(
        ["unshare", *MAPPED, "--mount", "sh", "-ec", f"{script}\necho ready\nread line || true"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        assert keeper.stdout.readline() == "ready\n", "mount failed"
        yield Namespace(keeper)
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()

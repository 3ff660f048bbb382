"""The two ways a command ends badly: the user's input is wrong (exit 2), or the run failed (exit 1)."""


class UserError(Exception):
    """Input that cannot work: recipe, arguments, folders. One line: what, where, expected, found, what to do. Exit code 2.

    Args:
        message: the line.
        this_rank: the error concerns this rank alone, so it speaks even where rank 0 speaks for all.
    """

    def __init__(self, message: str, *, this_rank: bool = False) -> None:
        super().__init__(" ".join(message.split()))
        self.this_rank = this_rank


class RunFault(Exception):
    """A fault while running (disk full, unreadable data, lost rank). The last good checkpoint is intact. Exit code 1."""

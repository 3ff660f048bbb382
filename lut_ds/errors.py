"""The two ways a command ends badly: the user's input is wrong (exit 2), or the run failed (exit 1)."""


class UserError(Exception):
    """Input that cannot work: recipe, arguments, folders. One line: what, where, expected, found, what to do. Exit code 2."""


class RunFault(Exception):
    """A fault while running (disk full, unreadable data, lost rank). The last good checkpoint is intact. Exit code 1."""

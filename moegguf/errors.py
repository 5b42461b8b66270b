"""The one error a user is meant to see.

Everything that can be wrong with what a user gave us (a recipe, a file, a flag, a full disk) ends as a
`UserError`: what is wrong, where, what was expected, and how to mend it. `cli.main` prints it as one
line a fault and exits with 2. Any other exception that reaches `cli.main` is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. `message` says what and where, `mend` says what to do about it.

    Several faults found in one go are reported together: `UserError.of([...])` holds them in `faults`.
    """

    def __init__(self, message: str, mend: str = "", *, faults: tuple[UserError, ...] = ()) -> None:
        super().__init__(f"{message}; {mend}" if mend else message)
        self.message = message
        self.mend = mend
        self.faults: tuple[UserError, ...] = faults or (self,)

    @classmethod
    def of(cls, faults: Iterable[UserError]) -> UserError:
        """One error that reports all of `faults` (at least one), each on its own line."""
        flat = tuple(single for fault in faults for single in fault.faults)
        return flat[0] if len(flat) == 1 else cls("\n".join(map(str, flat)), faults=flat)


def one_line(text: str) -> str:
    """`text`, that may come from a file, as one line that cannot steer a terminal: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

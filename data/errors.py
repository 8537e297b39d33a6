"""What a user can mend: raised anywhere, printed by `launch` as one line per problem, exit status 2."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a config, data file, artifact or command line.

    Each problem is one line that says what is wrong, the value found, and what to do.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, ...]]:
        return type(self), tuple(self.problems)  # so that it can be sent to other processes


class SharedUserError(UserError):
    """A UserError that every rank of a run raises alike; the first of them tells it."""

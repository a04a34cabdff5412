"""The errors that a user can cause, each with a message of one line that says what would work.

A command turns them into exit code 2, the server into an OpenAI-shaped 4xx body, and the Python
API raises them as they are. Anything else that is raised is a fault of ours.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work; the message says what was wrong and what would."""


class ConfigError(UserError):
    """An option, or a combination of options, that cannot work."""


class CheckpointError(UserError):
    """A model directory that is missing, incomplete or of another shape than its config says."""


class RequestError(UserError):
    """A request that cannot be served: a bad parameter, or a prompt that does not fit."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelError(Exception):
    """The model computed what no request can use, such as NaN. The fault is not the request's."""


class TransferError(Exception):
    """A record that another engine has computed did not come, so the request cannot go on here."""


class RankError(Exception):
    """The ranks of a group cannot go on together; the message names the one that is at fault."""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_library_failure(error: BaseException) -> bool:
    """Whether native code failed: it raised an `Exception`, or its Rust part panicked, which
    reaches Python as something else."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"

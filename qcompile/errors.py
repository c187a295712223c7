"""Errors that qcompile raises on purpose, each with the exit status that the command line gives it.

Every message is one line that names the file, node or tensor, and says what to do next.
"""


class QcompileError(Exception):
    """Base of all errors below; `exit_status` is what the command line exits with."""

    exit_status = 1


class InputError(QcompileError):
    """Something the user gave cannot be used: a file, an option, data. Exit status 2."""

    exit_status = 2


class ModelError(InputError):
    """The model file is missing, broken, unsupported or already quantised."""


class DataError(InputError):
    """Calibration or evaluation data do not fit the model, are empty, or hold NaN/Inf."""


class PassError(QcompileError):
    """A pass broke its promise; a fault of the program. Exit status 1, no output is left behind."""


class LimitError(QcompileError):
    """The result broke a limit that was asked for (`--max-drop` ...). Exit status 3.

    compiled: what was compiled all the same (`qcompile.pipeline.Compiled`), its file kept under another name.
    """

    exit_status = 3

    def __init__(self, message: str, compiled: object = None) -> None:
        super().__init__(message)
        self.compiled = compiled

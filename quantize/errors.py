"""Errors a user can act on. Each class fixes the process exit code (documented in
docs/troubleshooting.md)."""


class PqError(Exception):
    """Base of all expected errors: one line that names the thing and the remedy."""

    exit_code = 1


class UsageError(PqError):
    """The command line contradicts itself or names something that does not exist."""

    exit_code = 2


class RecipeError(PqError):
    """The recipe cannot be used; the message gives file, line, path, value and remedy."""

    exit_code = 3


class ModelError(PqError):
    """The source checkpoint is broken, unsupported or does not fit the recipe."""

    exit_code = 4


class UnderivedError(ModelError):
    """What stands where in the decoder could not be derived from the model; the line says why."""


class DataError(PqError):
    """Calibration or evaluation text is missing, unreadable or too short."""

    exit_code = 5


class OutputError(PqError):
    """The output cannot be written: non-empty folder, read-only or full disk, or
    another process at work on it."""

    exit_code = 6


class VerifyError(PqError):
    """A written checkpoint does not read back as what was written."""

    exit_code = 7


class RoomError(PqError):
    """The memory that the command may use does not suffice."""

    exit_code = 8


class QualityError(PqError):
    """The accuracy gate failed: a figure is worse than its baseline allows."""

    exit_code = 9


class PlanError(PqError):
    """No deployment does what was asked of it on the GPUs that there are."""

    exit_code = 10


class StoppedError(PqError):
    """The work was stopped on request, and what is done of it is kept."""

    exit_code = 75


class LostError(StoppedError):
    """Another process of the launch died (75), or failed, with the code of its error."""

    def __init__(self, text: str, exit_code: int = StoppedError.exit_code) -> None:
        super().__init__(text)
        self.exit_code = exit_code

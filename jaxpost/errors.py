"""What a user can get wrong. Each error is one line with the remedy and knows the process's exit code."""


class JaxpostError(ValueError):
    """Base of every error that jaxpost raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(JaxpostError):
    """A flag, a model or a combination of them that cannot work."""

    exit_code = 2


class DataError(JaxpostError):
    """A dataset, a row or a column that cannot be used."""

    exit_code = 3


class RewardError(DataError):
    """A reward function that fails too often."""


class RolloutError(DataError):
    """A rollout function that raises, or returns what is no rollout."""


class PreemptedError(JaxpostError):
    """The run has been told to stop; what it has is saved, and the same command continues it."""

    exit_code = 75


class NonFiniteError(JaxpostError):
    """The loss or the gradient is not a number."""

    exit_code = 77


class CheckpointError(JaxpostError):
    """A checkpoint cannot be written or read."""

    exit_code = 78


class HubError(CheckpointError):
    """The Hugging Face Hub refuses, or cannot be reached."""


def one_line(error: BaseException) -> str:
    """A library's message (its type's name if it has none), to be quoted in ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__

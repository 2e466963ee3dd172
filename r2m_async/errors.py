"""The errors that a user can meet.

Each message gives the key of the config (or file and line), the value, the reason and the remedy.
"""

from collections.abc import Callable


class ConfigError(ValueError):
    """The user's config, or a name in it, asks for something that is impossible or does not exist."""


class NoRoom(ConfigError):
    """The cluster has no room for the processes of a run.

    For a run that has been there already this is a loss, and no mistake of the user's.
    """


def all_at_once(*checks: Callable[[], object]) -> None:
    """Makes all checks, in this order, so that the user can correct everything at once.

    Raises one ConfigError with the messages of all checks that raised a ConfigError, in a line each.
    """
    messages = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            messages.append(str(error))
    if messages:
        raise ConfigError("\n".join(messages))


class DataError(ValueError):
    """A record of the user's data cannot be used. The message names file and line."""


class CodecError(ValueError):
    """`codec.decode` got a buffer that `codec.encode` did not write, or `encode` got an object that it cannot write."""


class DiskError(RuntimeError):
    """The disk refused to write or remove something. The message names the path, the reason and the remedy.

    Nothing half written is left under that path.
    """


class StageLost(RuntimeError):
    """A process of the run died, or does not answer.

    `stage` is the name of the stage that it belonged to. It is None where that is not known, for example if a payload
    was lost together with the process that held it.
    """

    def __init__(self, stage: str | None, message: str) -> None:
        super().__init__(message)
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[str | None, str]]:
        """Lets Ray send the error to another process: the default would call `__init__` with the message alone."""
        return type(self), (self.stage, str(self))


class StalledRun(RuntimeError):
    """Nothing happened for longer than the run allows. The message lists who waits for what."""


class StepFailed(RuntimeError):
    """A training step could not be taken. The message names the step or the version, and what stood in its way."""


class NonFiniteStep(StepFailed):
    """A number that a step needs, or has computed, is NaN or infinite. The message names where it came from."""


class FunctionFailed(StepFailed):
    """A function of the user raised an error, or returned something that cannot be used.

    If it raised, the message holds the traceback, which begins in the user's code.
    """


class FunctionsHang(FunctionFailed):
    """Too many calls of the user's functions have missed their deadline and still run. More are not begun."""


class RewardFailed(FunctionFailed):
    """A reward function failed for a group in every try. The group is given up.

    `reason` is what the group is counted under in the ledger.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Lets Ray send the error to another process, as in `StageLost`."""
        return type(self), (self.reason, str(self))


class GenerationFailed(StepFailed):
    """A rollout engine that still lives could not finish the responses of a group. It may be asked again."""

    reason = "generation_failed"
    """What the group is counted under in the ledger."""


class LearnerOutOfMemory(StepFailed):
    """A forward or backward pass of the policy learner does not fit into its memory."""


class WeightMismatch(RuntimeError):
    """A rollout engine does not have the weights that the learner sent, or computes something else with them.

    The message names the engine and the version, and the parameter where it is known.
    """

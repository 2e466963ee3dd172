"""The errors a user can meet. Each message gives the key (or file and line), the value, the reason and the remedy."""

import contextlib
from pathlib import Path


class ConfigError(ValueError):
    """The user's configuration asks for something that cannot be."""


def name_remedy(name: str | Path) -> str:
    """What to do about a model that could not be loaded by this name of a directory or at Hugging Face."""
    from transformers import PreTrainedConfig

    with contextlib.suppress(OSError, ValueError):
        if "auto_map" in PreTrainedConfig.get_config_dict(name, local_files_only=True)[0]:
            return (
                "the model comes with Python code of its own, which would have to be run to load it (trust_remote_code). "
                "This version runs no such code and supports no such models; name one whose architecture transformers has"
            )
    if Path(name).exists():
        return "correct the name"
    return f"there is no such directory either (now in {Path.cwd()}); correct the name"


class DataError(ValueError):
    """A record of the user's data cannot be used; the message names file and line."""


class CodecError(ValueError):
    """A buffer that arrived is not what `codec.encode` writes."""


class DiskError(RuntimeError):
    """Something cannot be written; the message names the path, the reason and the remedy. Nothing of it is there."""


class StageLost(RuntimeError):
    """The process behind `stage` died, or a payload was lost with a process (`stage` is then None)."""

    def __init__(self, stage: str | None, message: str) -> None:
        super().__init__(message)
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[str | None, str]]:
        return type(self), (self.stage, str(self))


class StalledRun(RuntimeError):
    """Nothing happened for longer than the run allows; the message lists who waits for what."""


class StepFailed(RuntimeError):
    """A policy step could not be taken; the message names the step and its groups."""


class NonFiniteStep(StepFailed):
    """A number that it needs, or made, is NaN or infinite; the message names what gave it."""


class FunctionFailed(StepFailed):
    """A function of the user's raised, or returned what cannot be used; the message has the function's own traceback."""


class LearnerOutOfMemory(StepFailed):
    """The policy learner's memory does not hold one of its passes."""


class WeightMismatch(RuntimeError):
    """An engine does not have the weights that the learner sent; the message names engine, version and parameter."""

"""Every error of ours can go from one process to another: else its cause is lost there."""

import importlib
import inspect
import pickle
import pkgutil

import pytest

import r2m_async


def errors() -> list[type]:
    """All classes of errors in the package, but for those that never leave their process."""
    for module in pkgutil.walk_packages(r2m_async.__path__, "r2m_async."):
        if module.name.rpartition(".")[2] not in ("state_attention_triton", "math_worker", "cli", "__main__"):
            importlib.import_module(module.name)
    found, left = [], [BaseException]
    while left:
        kinds = left.pop().__subclasses__()
        left += kinds
        found += [one for one in kinds if one.__module__.startswith("r2m_async.")]
    return sorted(set(found), key=lambda one: one.__qualname__)


EXAMPLES = {"reason": "too_long", "message": "what was wrong", "stage": "queue", "place": [0, 1], "number": 2}


@pytest.mark.models
def test_every_error_comes_out_of_another_process_as_it_went_in():
    kinds = errors()
    assert {"BadRecord", "StageLost", "AdvantageNotFinite", "RewardFailed"} <= {one.__name__ for one in kinds}
    for kind in kinds:
        own = "__init__" in vars(kind) or any("__init__" in vars(base) for base in kind.__mro__ if base in kinds)
        names = list(inspect.signature(kind.__init__).parameters)[1:] if own else ["message"]
        error = kind(*(EXAMPLES[name] for name in names))
        error.add_note("what is left")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error), kind
        assert {**vars(error), "__notes__": None} == {**vars(again), "__notes__": None}, kind

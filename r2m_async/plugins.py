"""Functions of the user's own, named `module:attr` in the config: how they are found, and how they are called.

They may raise anything, and may return anything. What goes wrong in one is told as its own: by the config's key and the
function's name, with the traceback from the function on and none of ours or Ray's.
"""

import difflib
import importlib
import math
import reprlib
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from r2m_async.errors import ConfigError, FunctionFailed

FLOAT32_MAX = 3.4028234663852886e38
"""Rewards are float32: a larger number would become infinite."""

_SHORT = reprlib.Repr()  # which survives a value whose own repr raises
_SHORT.maxstring = _SHORT.maxother = 80


def named_function(name: str, key: str) -> Callable[..., Any]:
    """The callable that `name` = "module:attr" stands for under the config's `key`. Raises ConfigError naming both."""
    module_name, _, attr = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's module may raise anything as it starts, SystemExit too
        what, frames = own_failure(error)
        if not frames and isinstance(
            error, ImportError | ValueError
        ):  # no line of the module has run: it was not found
            what, frames = str(error), "; install it, or put its folder on PYTHONPATH"
        else:
            frames = f"; correct the module{frames}"
        raise ConfigError(
            f"{key} = {name!r}: cannot import module {module_name!r} to find {attr!r} in it ({what}){frames}"
        ) from None
    if not callable(getattr(module, attr, None)):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{key} = {name!r}: module {module_name!r} has no callable {attr!r}{nearest(attr, names)}")
    return getattr(module, attr)


def called(function: Callable[..., Any], arguments: tuple[Any, ...], key: str, name: str, place: str) -> Any:
    """What the user's function `name`, under the config's `key`, returns; `place` says of which step or response.

    Raises FunctionFailed for whatever the function raises, SystemExit too. KeyboardInterrupt passes: it comes from the
    terminal, not from the function.
    """
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        what, frames = own_failure(error)
        raise FunctionFailed(f"{place}: {key} {name!r} raised {what}{frames}") from None


def called_for_number(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    key: str,
    name: str,
    place: str,
    finite: bool = True,
) -> float:
    """`called` of a function that scores a response: the `as_number` of what it returns.

    Raises FunctionFailed also for what is no number, and with `finite` for NaN, for infinity and for what is infinite in
    float32; without it the last is returned as infinity.
    """
    value = called(function, arguments, key, name, place)
    number = as_number(value)
    if number is not None and abs(number) <= FLOAT32_MAX:
        return number
    if number is None or finite:
        why = "no number" if number is None else "infinite in float32" if math.isfinite(number) else "not finite"
        raise FunctionFailed(
            f"{place}: {key} {name!r} returned {shown(value)}, which is {why}; it must return one finite number for every "
            f"response"
        )
    return math.copysign(math.inf, number) if number == number else number


def as_number(value: Any) -> float | None:
    """A bool, a number of any library or an array of one number, as a float; None for text and all that is no number."""
    try:
        item = value.item() if hasattr(value, "item") else value  # of arrays and tensors, where they have one number
        return None if isinstance(item, str | bytes | bytearray) else float(item)
    except Exception:  # whatever a value of the user's own class raises when it is to be a number, it is none
        return None


def shown(value: Any) -> str:
    """Of a value, its type and the beginning of its repr."""
    return f"{_SHORT.repr(value)} ({type(value).__name__})"


def own_failure(error: BaseException) -> tuple[str, str]:
    """What the user's code raised, in a line, and its traceback from that code on, which begins with a line's end.

    The caller's own frame, which caught it, and those of the import system are left out; where nothing remains, as after
    a call with too many arguments, the traceback is empty.
    """
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = error.__traceback__ and error.__traceback__.tb_next
    while frames and "importlib" in frames.tb_frame.f_code.co_filename:
        frames = frames.tb_next
    if frames is None:
        return what, ""
    return what, f"\n{''.join(traceback.format_exception(type(error), error, frames)).rstrip()}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""Finds and calls the functions that a user names in the config as `module:attr`.

Such a function may raise anything and return anything. An error message about it names the key of the config and the
function. Its traceback begins in the user's code; it shows no frame of this library or of Ray.
"""

import difflib
import functools
import importlib
import inspect
import math
import os
import reprlib
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from r2m_async.errors import ConfigError, FunctionFailed

FLOAT32_MAX = 3.4028234663852886e38
"""The largest finite float32. Rewards are float32, so a larger number would become infinite."""

_SHORT = reprlib.Repr()  # unlike plain repr, it cuts what is long
_SHORT.maxstring = _SHORT.maxother = 80


def named_function(name: str, key: str) -> Callable[..., Any]:
    """Imports and returns the callable that `name` stands for.

    Args:
        name: "module:attr".
        key: the key of the config that holds the name, for error messages.

    Raises ConfigError, naming both, if the module cannot be imported or has no such callable.
    """
    module_name, _, attr = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # the user's module may raise anything while it is imported, SystemExit too
        if _from_the_terminal(error):
            raise
        what, frames = own_failure(error)
        if not frames and isinstance(
            error, ImportError | ValueError
        ):  # no line of the module was executed, so it was not found
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


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], key: str, name: str, inputs: int = 0
) -> None:
    """Checks keyword arguments that a config gives to a function. Only the signature is read. The function is not called.

    A parameter with a plain annotation, such as `float` or `Sequence[str]`, takes values of that type alone.

    Args:
        key: the key of the config that holds the options, for messages.
        name: the function's name in the config.
        inputs: how many arguments the function takes first, which are no options.

    Raises ConfigError if the function does not know some of the options, lacks some that it requires, or takes values of
    another type, with a line for each.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[inputs:]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {name} does not say what it takes ({error}); name a function of Python's") from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = ", ".join(p.name for p in named) or "none"
    broken = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in named]
        broken = [
            f"{key}.{option} is unknown to {name}{nearest(option, names)}. It accepts: {accepted}"
            for option in options
            if option not in names
        ]
    broken += wrong_types(function, options, key, name)
    broken += [
        f"{key} lacks {p.name}, which {name} requires. It accepts: {accepted}"
        for p in named
        if p.default is p.empty and p.name not in options
    ]
    if broken:
        raise ConfigError("\n".join(broken))


def wrong_types(function: Callable[..., Any], options: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Returns a line for each option whose value is of another type than its parameter's annotation says.

    Arguments are those of `check_options`. An annotation that is not plain says nothing here, nor does a function without a
    signature, as compiled ones may be.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    plain = function.func if isinstance(function, functools.partial) else function
    names = getattr(plain.__init__ if inspect.isclass(plain) else inspect.unwrap(plain), "__globals__", {})
    told = []
    for option, value in options.items():
        if option not in parameters or value is parameters[option].default:
            continue
        asked = _resolved(parameters[option].annotation, names)
        if not _fits(value, asked):
            hint = "; write it without quotes" if isinstance(value, str) and _fits(_unquoted(value), asked) else ""
            told.append(f"{key}.{option} is {value!r}, and {name} takes {inspect.formatannotation(asked)} there{hint}")
    return told


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation stands for, which may be a text. Any if there is none, or if it cannot be told.

    Each is resolved by itself: one that names what is imported for type checkers alone must not hide the others.
    """
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names)["it"]
    except Exception:  # the user's annotations may be anything
        return Any


def _fits(value: Any, asked: Any) -> bool:
    """Whether a value of a config is of the type that an annotation asks for. True if the annotation is not plain."""
    origin, parts = typing.get_origin(asked), typing.get_args(asked)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if asked in (bool, str, int, float):
        # In Python a truth value is an integer.
        return isinstance(value, (int, float) if asked is float else asked) and isinstance(value, bool) <= (
            asked is bool
        )
    if asked in (None, type(None)):
        return value is None
    kind = origin or asked
    if kind in (dict, Mapping):
        return isinstance(value, dict) and (not parts or all(_fits(one, parts[1]) for one in value.values()))
    if kind in (list, tuple, set, Sequence, Iterable, Collection):
        wanted = parts[:1] if kind is not tuple or parts[1:] == (...,) else ()
        return isinstance(value, list | tuple) and all(_fits(one, part) for one in value for part in wanted)
    return True


def _unquoted(text: str) -> Any:
    """What YAML would have read without quotes, as far as numbers and truth values go; else the text."""
    if text.lower() in ("true", "false", "yes", "no", "on", "off"):
        return True
    try:
        return float(text)
    except ValueError:
        return text


def called(function: Callable[..., Any], arguments: tuple[Any, ...], key: str, name: str, place: str) -> Any:
    """Calls a function of the user and returns its result.

    Args:
        key: the key of the config that names the function, for error messages.
        name: the function's name in the config.
        place: the step or response for which it is called, for error messages.

    Raises FunctionFailed for whatever the function raises, even SystemExit. Only a KeyboardInterrupt that comes from the
    terminal passes unchanged.

    A function may fork. Its child ends here, if the function itself does not end it: it must not go on as a second run.
    """
    pid = os.getpid()
    try:
        result = function(*arguments)
        if os.getpid() != pid:
            raise SystemExit
        return result
    except BaseException as error:
        if os.getpid() != pid:
            end_child(error)
        if _from_the_terminal(error):
            raise
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
    """Calls a function of the user that scores a response, and returns its result as a float.

    Arguments are those of `called`, and one more:
        finite: if True, the result must be finite in float32. If False, NaN and infinity are returned, and a number
            that is too large for float32 is returned as infinity with its sign.

    Raises FunctionFailed for whatever the function raises, for a result that is no number, and with `finite` for one
    that is not finite in float32.
    """
    return finite_number(called(function, arguments, key, name, place), key, name, place, finite)


def finite_number(value: Any, key: str, name: str, place: str, finite: bool = True) -> float:
    """Returns what a function of the user returned, as a float. `called_for_number` says what it raises."""
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
    """Converts a value to a float, or returns None if it is no number.

    Numbers are bools, numbers of any library, and arrays or tensors that hold a single number. Text is never a number,
    even if it spells one.
    """
    try:
        item = value.item() if hasattr(value, "item") else value  # `item` raises for an array of several numbers
        return None if isinstance(item, str | bytes | bytearray) else float(item)
    except BaseException as error:  # a value of the user's own class may raise anything here; then it is no number
        if _from_the_terminal(error):
            raise
        return None


_terminal = True


def no_terminal() -> None:
    """Says that this is a process of a stage, which no terminal interrupts. A KeyboardInterrupt is then the user's own."""
    global _terminal
    _terminal = False


def _from_the_terminal(error: BaseException) -> bool:
    """Whether somebody pressed Ctrl-C. Python raises that in the main thread, and in no other."""
    in_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and _terminal and in_main


def end_child(error: BaseException) -> NoReturn:
    """Ends a forked process as Python would end a program, but without what its parent wants done at the end."""
    status = 1
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        status = int(error.code or 0)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def shown(value: Any) -> str:
    """Describes a value in an error message: the beginning of its repr, and its type."""
    try:
        text = _SHORT.repr(value)
    # An integer of 5000 digits, and a value of the user's own class that raises anything.
    except BaseException as error:
        if _from_the_terminal(error):
            raise
        text = f"a value that cannot be shown: {type(error).__name__}"
    return f"{text} ({type(value).__name__})"


def own_failure(error: BaseException) -> tuple[str, str]:
    """Describes an error that the user's code raised: (the error in a line, its traceback).

    The traceback begins with a line break. It leaves out the frame that caught the error and the frames of the import
    system. It is empty if no other frame is left, for example if the function was called with too many arguments.
    """
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = error.__traceback__ and error.__traceback__.tb_next
    while frames and "importlib" in frames.tb_frame.f_code.co_filename:
        frames = frames.tb_next
    if frames is None:
        return what, ""
    return what, f"\n{''.join(traceback.format_exception(type(error), error, frames)).rstrip()}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the name most similar to `name`, or "" if no name is similar."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""

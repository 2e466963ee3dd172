"""What a reward function can be given, and what its signature asks for.

A reward function names what it wants to know, as in TRL: `def exact(response, answer)` is given the response and the
column `answer` of the data record. A function with `**kwargs` is given everything. A function of two positional
parameters with other names is called as f(prompt, response), as all functions once were.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from r2m_async.config import RewardFunction
from r2m_async.errors import ConfigError
from r2m_async.plugins import named_function, nearest, wrong_types
from r2m_async.trajectories import Prompt, Trajectory

KNOWN = ("prompt", "response", "messages", "tokens", "finished")
"""The names of the arguments that every reward function can ask for, whatever the data has."""
INFO = "info"
"""One more such name if there is a `rollouts.function`. Without one it is a column's name like any other."""


def known_arguments(prompt: Prompt, trajectory: Trajectory) -> dict[str, Any]:
    """Returns all that a reward function can be given for a response, by name.

    - `prompt`: the text that the policy read.
    - `response`: the text of the response, without special tokens.
    - `messages`: the prompt as a list of turns, each a dict with `role` and `content`. Raw text is one turn of the user.
    - `tokens`: the tokens of the response, a list of integers; those alone that the policy wrote.
    - `finished`: whether the policy ended the response itself.

    - `info`: what the user's rollout function noted in `Rollout.info`, if there is a `rollouts.function`.

    The columns of the data record come besides. A column with one of the names above is not given.

    All of it is the caller's own: a function may change what it is given.
    """
    turns = (("user", prompt.content),) if isinstance(prompt.content, str) else prompt.content
    return {
        **copy.deepcopy(dict(prompt.columns)),
        "prompt": prompt.text,
        "response": trajectory.text,
        "messages": [{"role": role, "content": content} for role, content in turns],
        "tokens": trajectory.of_policy(trajectory.token_ids).tolist(),
        "finished": trajectory.finish_reason == "stop",
        **({} if trajectory.info is None else {INFO: copy.deepcopy(dict(trajectory.info))}),
    }


_ABOUT_THE_RESPONSE = ("response", "tokens", "finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What the signature of a reward function asks for. `of` reads it."""

    required: tuple[str, ...]
    """The parameters without default, but for those that `options` of the config give."""
    optional: tuple[str, ...]
    """The parameters with a default, but for those that `options` give."""
    by_position: tuple[str, ...]
    """Those of both that cannot be given by name, in their order."""
    takes_all: bool
    """Whether it has `**kwargs`."""
    places: tuple[str, ...]
    """What it is given by position, if it is not given what it names."""
    fits_places: bool
    """Whether it can be called in this way: as many values fit, and no name says that they mean something else."""
    about: tuple[str, ...] = _ABOUT_THE_RESPONSE
    """The names that are about the response. A function that asks for one of them is called by name."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        options: Collection[str] = (),
        places: tuple[str, ...] = ("prompt", "response"),
        noted: bool = False,
    ) -> Signature:
        """Reads the signature of a function.

        options: the names of the options that it is called with.
        places: the names of what functions of its kind were always given by position.
        noted: whether `info` means what a rollout function noted, and no column of the data.
        """
        about = (*_ABOUT_THE_RESPONSE, *([INFO] if noted else []))
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):  # some functions written in C have none
            return cls(required=(), optional=(), by_position=(), takes_all=False, places=places, fits_places=True)
        kinds = signature.parameters.values()
        named = [one for one in kinds if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        asked = [one for one in named if one.name not in options]
        first = [one.name for one in asked if one.kind is not one.KEYWORD_ONLY][: len(places)]
        try:
            signature.bind(*places, **dict.fromkeys(options))
            # A name of its own (`text`) may mean any of them, and `prompt` and `response` mean themselves.
            meant = [name == own or name not in (*KNOWN, *about) for name, own in zip(first, places, strict=False)]
        except TypeError:
            meant = [False]
        return cls(
            required=tuple(one.name for one in asked if one.default is one.empty),
            optional=tuple(one.name for one in asked if one.default is not one.empty),
            by_position=tuple(one.name for one in asked if one.kind is one.POSITIONAL_ONLY),
            takes_all=any(one.kind is one.VAR_KEYWORD for one in kinds),
            places=places,
            fits_places=all(meant),
            about=about,
        )

    def style(self, columns: Collection[str]) -> Literal["keywords", "places"] | None:
        """How the function is called if the data has these columns: by name, or by position (`places`).

        None if it cannot be called: it asks for something that nobody knows.

        A function that asks for nothing of the response by name is called as f(prompt, response), whatever the columns
        are. An old function f(prompt, answer) scores its second argument. It must not be given something else as soon
        as the data has a column `answer`.
        """
        asks = {*self.required, *self.optional}
        by_name = self.takes_all or not asks.isdisjoint(self.about)
        if by_name and not self.unknown(columns):
            return "keywords"
        return "places" if self.fits_places or not self.unknown(columns) else None

    def unknown(self, columns: Collection[str]) -> list[str]:
        """The required parameters that are neither known names nor columns."""
        return [name for name in self.required if name not in KNOWN and name not in columns]

    def arguments(self, known: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional arguments and the keyword arguments for a response.

        known: all that `known_arguments` returned for it.
        """
        if self.style(known) != "keywords":
            return tuple(known[name] for name in self.places), {}
        named = known if self.takes_all else (*self.required, *self.optional)
        positions = [name for name in self.by_position if name in known]
        return tuple(known[name] for name in positions), {
            name: known[name] for name in named if name in known and name not in positions
        }


def keys_read(function: Callable[..., Any]) -> list[str]:
    """Returns the names that a function's source takes from its `**kwargs` as `kwargs["name"]`, in their order.

    A name that it compares by `in` is left out. Without source, such as for a lambda, there are none.
    """
    given = function.keywords if isinstance(function, functools.partial) else {}
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    except (OSError, TypeError, SyntaxError):
        return []
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef | ast.AsyncFunctionDef) or body.args.kwarg is None:
        return []
    everything, read, compared = body.args.kwarg.arg, dict[str, tuple[int, int]](), set[Any]()
    for node in ast.walk(body):
        match node:
            case ast.Compare(left=ast.Constant(value=value)):
                compared.add(value)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key)), ctx=ast.Load()):
                if name == everything:
                    read[key] = min(read.get(key, (node.lineno, node.col_offset)), (node.lineno, node.col_offset))
    return [key for key in sorted(read, key=read.__getitem__) if key not in compared and key not in given]


def find_function(key: str, setting: RewardFunction) -> Callable[..., Any]:
    """Finds the function of a setting, and checks that it takes the options.

    key: the key of the config that holds the setting, for messages.

    A function may have an attribute `check_options`: a function that is called with the options alone, and raises
    ConfigError or ValueError if they are wrong. All functions of this package have one.

    Raises ConfigError if there is no such function, if it could never return a number, or if an option does not fit its
    signature or its `check_options`.
    """
    function = named_function(setting.function, key)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{key} {setting.function!r} yields, and a reward function returns one number: use `return`")
    if inspect.isclass(function) and "__call__" in vars(function):
        raise ConfigError(
            f"{key} {setting.function!r} is a class, and calling it makes an object and no number: make one in its module, "
            f"`scorer = {function.__name__}()`, and name that"
        )
    _check_names(function, key, setting)
    if check := getattr(function, "check_options", None):
        try:
            check(**setting.options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key} {setting.function!r}: {error}") from None
    # Last: what the function's own check says of a value is better.
    if wrong := wrong_types(function, setting.options, f"{key}.options", setting.function):
        raise ConfigError("\n".join(wrong))
    return function


def _check_names(function: Callable[..., Any], key: str, setting: RewardFunction) -> None:
    """Raises ConfigError if a function has no parameter of an option's name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return
    takes = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for name in setting.options:
        if name in KNOWN:
            raise ConfigError(
                f"{key}.options has {name!r}, which every reward function is given for each response: take it out"
            )
        if name not in takes and not takes_all:
            raise ConfigError(
                f"{key}.options has {name!r} and {setting.function} has no such parameter{nearest(name, takes)}"
            )

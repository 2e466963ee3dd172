"""What all configs have in common: a config is a frozen tree of sections.

It is read from YAML, and changed by calling a section, which returns a new config. Whatever is wrong in it is refused
with the reason.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from r2m_async.errors import ConfigError, all_at_once
from r2m_async.yaml_tree import check_plain, cut_repr, parse_yaml, read_yaml, write_yaml


def _keys_below(tree: dict[str, Any], above: list[str], path: str | Path) -> dict[str, Any]:
    """Returns the mapping of keys at a place in a tree. It is made if there is none.

    So an override such as `model.lora.rank=8` works without a `model.lora` in the file.

    Args:
        tree: the tree of a config. It is changed in place.
        above: the names of the keys that lead to the mapping, from the top.
        path: the file of the config, for messages.

    Raises ConfigError if there is a value in the place that is no mapping.
    """
    for place, key in enumerate(above, 1):
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            name = ".".join(above[:place])
            raise ConfigError(
                f"{path}: {name} is {tree[key]!r}, not a section of keys; give the whole of it: {name}=..."
            )
        tree = tree[key]
    return tree


def _replace_key(tree: dict[str, Any], override: str, path: str | Path) -> None:
    """Replaces one key in a tree, as an override of the form section.key=value says.

    Args:
        tree: the tree of a config. It is changed in place.
        override: the override.
        path: the file of the config, for messages.

    Raises ConfigError for an override of another form, and for a value that is not YAML.
    """
    key, equals, value = override.partition("=")
    *above, field = key.split(".")
    if not (equals and above and all(above) and field):
        raise ConfigError(f"{override!r} is not of the form section.key=value, e.g. run.num_steps=20")
    keys = _keys_below(tree, above, path)
    keys[field] = parse_yaml(value, cut_repr(override))


def _as_lists(value: Any) -> Any:
    """A copy of a value in which all tuples are lists. YAML and JSON have no tuples, but Python's users pass some."""
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


Rule = Callable[..., str | None]
"""A function of sections, each under its name in the config: None, or a message if the rule is broken.

A rule that is broken by several keys has a line for each.
"""


@functools.cache
def _sections_of(rule: Rule) -> frozenset[str]:
    """The names of the sections that a rule is about."""
    return frozenset(inspect.signature(rule).parameters)


def one_per_line(messages: Iterable[str]) -> str | None:
    """Returns the messages of a rule in a line each, or None if there are none."""
    return "\n".join(messages) or None


Options = dict[str, JsonValue]
"""The type of a key that holds further keys, which are not ours: another library defines them, or a user's code."""

LONGEST = 1e9
"""The most seconds of a deadline, 30 years. Locks, sockets and collectives fail on a number that their clocks cannot hold."""
LARGEST = 1e37
"""The largest absolute value of a number in a config.

Numbers are used with float32 tensors, whose largest is 3.4e38. There is room for AdamW, whose first step multiplies the
learning rate by ten.
"""


_SECRET_KEY = re.compile(r"(?i)(.*_)?(api_?key|passw(or)?d|secret|credentials?|(access|auth|bearer)_token|private_key)")
_SECRET_IN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@")


def _secret_in(value: Any, key: str = "") -> str | None:
    """Says where a value holds what looks like a secret, without the secret itself. None if it holds none."""
    if isinstance(value, str):
        if value and _SECRET_KEY.fullmatch(key):
            return f"the value of {key!r}"
        return "the password in a URL" if _SECRET_IN_URL.search(value) else None
    if isinstance(value, BaseModel):
        value = dict(value)
    inside = (
        value.items() if isinstance(value, dict) else ((key, one) for one in value) if isinstance(value, list) else ()
    )
    return next((found for name, one in inside if (found := _secret_in(one, str(name))) is not None), None)


def _without_secrets(value: Any, key: str = "") -> Any:
    """Returns a value with `***` in the place of what looks like a secret, for messages."""
    if isinstance(value, str):
        return "***" if _secret_in(value, key) else value
    if isinstance(value, dict):
        return {name: _without_secrets(one, str(name)) for name, one in value.items()}
    return [_without_secrets(one, key) for one in value] if isinstance(value, list) else value


def _is_too_large(value: Any) -> bool:
    """Whether a value is a number beyond LARGEST, or has one in it."""
    if isinstance(value, dict | list | tuple):
        return any(map(_is_too_large, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and abs(value) > LARGEST


class Keys(BaseModel):
    """Keys with values of a type each: a section of a config, or a mapping within one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_what_yaml_made_of_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what YAML reads as another value than was meant, and pydantic would take: `yes` as the number 1."""
        types = _types_of(cast(Any, cls.model_fields[str(info.field_name)].annotation))
        numbers = any(one in (int, float) or type(one) is int for one in types)  # `Literal[1, 2]` consists of 1 and 2
        if numbers and bool not in types and _has_truth_value(value):
            raise ValueError("a truth value, as YAML reads yes, no, on, off, true and false; write a number")
        if {str, type(None)} <= types and isinstance(value, str) and value.lower() == "none":
            raise ValueError("for YAML this is a text; write null for nothing")
        return value

    @field_validator("*")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        """Refuses a number that is too large to compute with. pydantic calls this for every key."""
        if _is_too_large(value):
            raise ValueError(f"beyond the {LARGEST:g} that float32 can still compute with; use a smaller number")
        return value


@functools.cache
def _types_of(annotation: Any) -> set[Any]:
    """The types that an annotation consists of."""
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*map(_types_of, parts))


def _has_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_truth_value, value)))


class Section(Keys):
    """One section of a config. Calling it returns a new config, in which the named keys are changed.

    For example, `config.rollouts(num_actors=8)` is a config with eight rollout actors.
    """

    _config: Any = PrivateAttr(None)
    """The config to which this section belongs. None while it belongs to none."""
    _name: str = PrivateAttr("")
    """The name of this section in that config."""

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        """Refuses a secret: the config is written to the run directory, to every checkpoint, and into logs."""
        if (where := _secret_in(value)) is not None:
            raise PydanticCustomError(
                "secret",
                f"{where} would be written to the run directory and its checkpoints: put the secret into an environment "
                f"variable, and give the variable's name, as in `api_key_env`",
            )
        return value

    def changed(self, changes: dict[str, Any]) -> Any:
        """Returns a new config with some keys of this section changed. Calling the section does the same.

        Args:
            changes: the new values by key.

        Raises ConfigError for an unknown key, for a value that is not allowed, and if the section belongs to no config.
        """
        if self._config is None:
            raise ConfigError(
                f"{type(self).__name__}: this section belongs to no config, and calling a section changes a config; make "
                f"one of it (`R2MConfig(run=RunSection(...))`) or give the changes to the constructor"
            )
        tree = self._config.to_dict()
        tree[self._name].update(_as_lists(changes))
        return type(self._config).from_dict(tree)

    # A type checker must not see this: config.py tells it of a call that takes the keys of each section alone.
    if not TYPE_CHECKING:

        def __call__(self, /, **changes: Any) -> Any:
            """Returns a new config with some keys of this section changed (`changed`)."""
            return self.changed(changes)

    def __eq__(self, other: object) -> bool:
        """Whether two sections have the same keys and values. They may belong to different configs."""
        # pydantic would also compare the configs that they belong to, which hold these sections again.
        return type(self) is type(other) and self.model_dump() == other.model_dump()


class ConfigTree(BaseModel):
    """A whole config. Its fields are sections.

    Construction raises ConfigError for whatever is wrong. The message names the key, the value, the rule that it
    breaks, and what would be valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    rules: ClassVar[tuple[Rule, ...]] = ()
    """The rules that must hold between keys, in the order in which their messages are shown."""

    def __init__(self, /, **sections: Any) -> None:
        """Makes a config of sections. A section may be given as an object or as a dict, and is optional."""
        try:
            check_plain(sections)
            super().__init__(**sections)
        except ValidationError as error:
            problems = error.errors()
            told = _explain_all(problems, type(self).model_fields)
            wrong = {str(problem["loc"][0]) for problem in problems if problem["loc"]}
            if wrong:  # then pydantic has not come to the rules
                told += self.broken_rules(self._valid_sections(sections, wrong))
            raise ConfigError("\n".join(told)) from None
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        """Checks all rules between keys. All messages come at once, so the user can correct everything at once."""
        if broken := self.broken_rules({name: getattr(self, name) for name in type(self).model_fields}):
            raise ValueError("\n".join(broken))
        return self

    @classmethod
    def broken_rules(cls, sections: dict[str, Any]) -> list[str]:
        """Returns the messages of all rules that some sections break, given by their names.

        A rule about a section that is not given is left out.
        """
        asked = ((rule, _sections_of(rule)) for rule in cls.rules)
        told = (rule(**{name: sections[name] for name in names}) for rule, names in asked if names <= sections.keys())
        return [message for message in told if message]

    @classmethod
    def _valid_sections(cls, sections: dict[str, Any], wrong: set[str]) -> dict[str, Any]:
        """Returns the sections of a config that could not be made, but for those named in `wrong`.

        Args:
            sections: the arguments of the constructor.
            wrong: the names of the sections that are not valid.
        """
        valid = {}
        for name, field in cls.model_fields.items():
            if name not in wrong:
                given = sections.get(name, field.default)
                valid[name] = given if isinstance(given, Section) else cast(Any, field.annotation).model_validate(given)
        return valid

    def model_post_init(self, _: Any) -> None:
        """Tells every section to which config it belongs. pydantic calls this at the end of construction."""
        # Copies, because a section may be a default, which all configs share, or belong to another config already.
        for name in type(self).model_fields:
            section = getattr(self, name).model_copy()
            section._config, section._name = self, name
            # Past pydantic, which refuses changes of a frozen object.
            self.__dict__[name] = section

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """Makes a config of a dict with sections, each a dict with keys. Raises ConfigError for whatever is wrong."""
        return cls(**{str(key): section for key, section in tree.items()})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Reads a config from a YAML file.

        If the file has the key `base`, it names another config file, relative to this one. That file is read first, and
        the keys of this file replace its keys.

        Args:
            path: the file.
            overrides: strings of the form section.key=value, which replace keys of the file. A value is read as YAML.

        Raises ConfigError for whatever is wrong, with the file or the override in the message.
        """
        tree = _read_yaml(Path(path))
        all_at_once(*(functools.partial(_replace_key, tree, override, path) for override in overrides))
        try:
            return cls.from_dict(tree)
        except ConfigError as error:
            given = tuple(override.partition("=")[0] for override in overrides)
            lines = str(error).splitlines()
            told = (line if line.startswith(given) else f"{path}: {line}" for line in lines)
            raise ConfigError("\n".join(told)) from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole config as a dict of plain values, defaults included. `from_dict` reads it back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the whole config as YAML text, defaults included. `from_yaml` reads it back from a file."""
        return write_yaml(self.to_dict())


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a file and its base files, and returns the merged tree. Raises ConfigError if a file cannot be used.

    Args:
        path: the file.
        above: the files whose base this file is, directly or through others.
    """
    tree = read_yaml(path)
    if path.resolve() in above:
        raise ConfigError(f"{path}: its base files name each other in a circle")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; expected sections like `run:` with keys under them")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; expected the path of another config file, relative to this one")
    merged = _read_yaml(path.parent / base, (*above, path.resolve()))
    for section, values in tree.items():
        both_sections = isinstance(values, dict) and isinstance(merged.get(section), dict)
        merged[section] = {**merged[section], **values} if both_sections else values
    return merged


def _explain_all(problems: list[Any], sections: dict[str, Any]) -> list[str]:
    """Says what is wrong, in a line for each problem. Keys that stand together under the wrong section share a line.

    Args:
        problems: pydantic's records of the errors.
        sections: the fields of the config, by the name of the section.
    """
    homes = [_home(problem, sections) for problem in problems]
    told = []
    for problem, home in zip(problems, homes, strict=True):
        where = problem["loc"][:-1]
        together = [
            str(other["loc"][-1])
            for other, its in zip(problems, homes, strict=True)
            if home and its == home and other["loc"][:-1] == where
        ]
        if len(together) < 2:
            told.append(_explain(problem, sections))
        elif problem["loc"][-1] == together[0]:
            section = ".".join(map(str, where))
            told.append(f"{section}: no such keys: {', '.join(together)}; did you mean those of {home}?")
    return told


def _home(problem: Any, sections: dict[str, Any]) -> str | None:
    """The section that has an unknown key, or None if there is none, or if the problem is another one."""
    if problem["type"] != "extra_forbidden":
        return None
    return _home_of(problem["loc"][-1], sections)


def _home_of(key: str, sections: dict[str, Any]) -> str | None:
    """The first section that has a key, or None."""
    return next((name for name, field in sections.items() if key in field.annotation.model_fields), None)


def _explain(problem: Any, sections: dict[str, Any]) -> str:
    """Says in one line what is wrong.

    Args:
        problem: pydantic's record of one error.
        sections: the fields of the config, by the name of the section.
    """
    # A key of several types has parts such as `<mapping>` in its path, which name the type. Only the keys are shown.
    location = [str(part) for part in problem["loc"] if not str(part).startswith("<")]
    # Inside a JSON value, pydantic's path names the type of each value beside its key. Only the keys are shown.
    if len(location) > 3 and sections[location[0]].annotation.model_fields[location[1]].annotation == Options:
        location[3:] = location[4::2]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden" and location[-1] in ("top_p", "top_k", "min_p"):
        return (
            f"{key}: training samples from the whole distribution, because a truncated one would bias the ratio of Eq. 2; "
            f"leave it out and use rollouts.temperature"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key{nearest(location, sections)}"
    if not location:
        return str(problem["msg"]).removeprefix("Value error, ")
    why = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "secret":
        return f"{key}: {why}"  # without the value
    told = f"{key}: {why[0].lower()}{why[1:]}; got {cut_repr(_without_secrets(problem['input']))}"
    if problem["type"] == "string_type" and isinstance(problem["input"], (bool, int, float)):
        told += " (YAML reads it as a number or a truth value; put it in quotes)"
    return told


def nearest(location: list[str], sections: dict[str, Any]) -> str:
    """The end of a message about an unknown key: the same key in another section, a similar one, or all valid keys.

    Args:
        location: the names that lead to the unknown key, and its own name at the end.
        sections: the fields of the config, by the name of the section.
    """
    owner = sections
    # `model.lora` is a section inside a section.
    for key in location[:-1]:
        if key in owner:  # else it is a name in a mapping, whose values all have the fields that were found
            owner = _fields_of(owner[key].annotation)
    if home := _home_of(location[-1], sections):
        return f"; did you mean {home}.{location[-1]}?"
    close = difflib.get_close_matches(location[-1], owner, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; valid are {', '.join(owner)}"


def _fields_of(annotation: Any) -> dict[str, Any]:
    """The fields of a section, given the type of the key that holds it. The type may also allow None, or a mapping."""
    parts = [annotation]
    while not hasattr(parts[0], "model_fields"):
        parts = [*get_args(parts[0]), *parts[1:]]
    return cast(dict[str, Any], parts[0].model_fields)

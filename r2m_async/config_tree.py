"""What every config is: a frozen tree of sections, read from YAML, changed by calling a section, refused with reasons."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, PrivateAttr, ValidationError, field_validator

from r2m_async.errors import ConfigError
from r2m_async.yaml_tree import check_plain, cut_repr, parse_yaml, read_yaml, write_yaml


def _keys_below(tree: dict[str, Any], above: list[str], path: str | Path) -> dict[str, Any]:
    """The mapping at `above`, made where there is none yet: `model.lora.rank=8` needs no `model.lora` before."""
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


def _as_lists(value: Any) -> Any:
    """YAML and JSON have no tuples; Python's users do."""
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


Options = dict[str, JsonValue]
"""Keys that another library defines, or a user's estimator."""

LARGEST = 1e37
"""Of the tree's numbers. They meet float32 tensors, which end at 3.4e38, and AdamW's first step takes ten times its rate."""


class Section(BaseModel):
    """One section of a config. Calling it returns a new config with the named keys changed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    _config: Any = PrivateAttr(None)
    _name: str = PrivateAttr("")

    @field_validator("*")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > LARGEST:
            raise ValueError(f"beyond the {LARGEST:g} that float32 can still compute with; use a smaller number")
        return value

    def changed(self, changes: dict[str, Any]) -> Any:
        """The config with some of this section's keys changed; what calling the section does."""
        if self._config is None:
            raise ConfigError(
                f"{type(self).__name__}: this section belongs to no config, and calling a section changes a config; make "
                f"one of it (`R2MConfig(run=RunSection(...))`) or give the changes to the constructor"
            )
        tree = self._config.to_dict()
        tree[self._name].update(_as_lists(changes))
        return type(self._config).from_dict(tree)

    if not TYPE_CHECKING:  # to a type checker each section's call has that section's keys: see `R2MConfig`

        def __call__(self, /, **changes: Any) -> Any:
            return self.changed(changes)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump() == other.model_dump()


class ConfigTree(BaseModel):
    """A whole config: its fields are sections.

    Raises `ConfigError` naming the key, the value, the rule it breaks and what would be valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, /, **sections: Any) -> None:
        try:
            check_plain(sections)
            super().__init__(**sections)
        except ValidationError as error:
            raise ConfigError(
                "\n".join(_explain(problem, type(self).model_fields) for problem in error.errors())
            ) from None
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def model_post_init(self, _: Any) -> None:
        for name in type(self).model_fields:
            section = getattr(self, name).model_copy()
            section._config, section._name = self, name
            self.__dict__[name] = section

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        return cls(**{str(key): section for key, section in tree.items()})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Reads a file, and under it the files its `base` key names; `overrides` are `section.key=value` strings."""
        tree = _read_yaml(Path(path))
        for override in overrides:
            key, equals, value = override.partition("=")
            *above, field = key.split(".")
            if not (equals and above and all(above) and field):
                raise ConfigError(f"{override!r} is not of the form section.key=value, e.g. run.num_steps=20")
            keys = _keys_below(tree, above, path)
            keys[field] = parse_yaml(value, cut_repr(override))
        try:
            return cls.from_dict(tree)
        except ConfigError as error:
            given = tuple(override.partition("=")[0] for override in overrides)
            lines = str(error).splitlines()
            told = (line if line.startswith(given) else f"{path}: {line}" for line in lines)
            raise ConfigError("\n".join(told)) from None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
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


def _explain(problem: Any, sections: dict[str, Any]) -> str:
    """One line of what is wrong, from pydantic's record of it."""
    location = [str(part) for part in problem["loc"]]
    if len(location) > 3 and sections[location[0]].annotation.model_fields[location[1]].annotation == Options:
        location[3:] = location[4::2]  # pydantic names each value's type before its key
    key = ".".join(location)
    if problem["type"] == "extra_forbidden" and location[-1] in ("top_p", "top_k", "min_p"):
        return (
            f"{key}: training samples from the whole distribution, because a truncated one would bias the ratio of Eq. 2; "
            f"leave it out and use rollouts.temperature"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key{_nearest(location, sections)}"
    if not location:
        return str(problem["msg"]).removeprefix("Value error, ")
    why = problem["msg"].removeprefix("Value error, ")
    told = f"{key}: {why[0].lower()}{why[1:]}; got {cut_repr(problem['input'])}"
    if problem["type"] == "string_type" and isinstance(problem["input"], (bool, int, float)):
        told += " (YAML reads it as a number or a truth value; put it in quotes)"
    return told


def _nearest(location: list[str], sections: dict[str, Any]) -> str:
    owner = sections
    for key in location[:-1]:  # model.lora is a section within one
        owner = _fields_of(owner[key].annotation)
    elsewhere = [
        f"{name}.{location[-1]}" for name, field in sections.items() if location[-1] in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(location[-1], owner, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; valid are {', '.join(owner)}"


def _fields_of(annotation: Any) -> dict[str, Any]:
    """The fields of a section, or of one that may be None."""
    found = next(part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields"))
    return cast(dict[str, Any], found.model_fields)

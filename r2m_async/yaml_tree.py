"""Reads and writes YAML. Every config, base file, override and study goes through these functions.

They use PyYAML's safe YAML 1.1, with these differences:
- Numbers are those of YAML 1.2 and of JSON: `1e-6` is a number, `017` is 17, `0o17` is 15, and `1:30` is text. An
  underscore between digits is allowed, as in `1_000`.
- A date is read as text.
- A key that occurs twice in one mapping is refused.
- Only plain values are allowed: all other tags are refused.
- Depth and size are limited, so that what was read can be copied, printed and written again.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from r2m_async.errors import ConfigError

MAX_DEPTH = 32
"""The largest depth of nested lists and mappings."""
MAX_VALUES = 100_000
"""The largest number of values in one file, keys included. An alias counts as much as what it stands for."""

_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = {
    "int": re.compile(r"[-+]?(?:[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)[eE][-+]?[0-9]+"
        r"|[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""The numbers of YAML 1.2. YAML 1.1 reads `1e-6` as text, `017` as 15, and `1:30` as 90."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Converts the text of an integer. Raises ValueError if it is none."""
    text = loader.construct_scalar(node).replace("_", "")
    # Base 0 reads the prefixes, and refuses `017`.
    return int(text, 0 if text.lstrip("-+")[:2] in ("0o", "0x", "0b") else 10)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences that the module's docstring lists."""

    yaml_constructors: ClassVar = {
        _PREFIX + kind: yaml.SafeLoader.yaml_constructors[_PREFIX + kind]
        for kind in ("null", "bool", "float", "str", "seq", "map")
    } | {None: yaml.SafeLoader.yaml_constructors[None]}
    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]  # a class attribute; PyYAML's stubs say the instance's
        first: [(tag, form) for tag, form in resolvers if tag.removeprefix(_PREFIX) not in ("timestamp", *_NUMBERS)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Builds a node of the tree and limits its depth and size. Raises ConstructorError or ComposerError.

        Each alias counts as much as what it stands for. Otherwise a short file of ten aliases of ten aliases, and so
        on, would fill any memory once it is copied or printed.
        """
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # in the stubs
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConstructorError(None, None, f"is nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if node not in self._sizes:
            # An alias stands for a node whose size is known, unless that node is not finished: it contains the alias.
            if isinstance(event, yaml.AliasEvent):
                told = f"alias *{event.anchor} stands within what it names"
                raise ComposerError(None, None, told, event.start_mark)  # type: ignore[arg-type]  # stubs lack C's Mark
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                parts = itertools.chain.from_iterable(parts)
            self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        if self._sizes[node] > MAX_VALUES:
            raise ConstructorError(None, None, f"holds more than {MAX_VALUES} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # a str or None, which the stubs call a dict
        """Builds a mapping and raises ConstructorError for a key that occurs twice.

        The check happens here, before merge keys (`<<`) add further keys: a mapping may override a key that it merges.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # such a key cannot be hashed, and is refused later, when the dict is made
            name = key.value if key.tag == _PREFIX + "merge" else self.construct_object(key)
            if name in lines:
                told = f"key {name!r} stands here and in line {lines[name]} already; leave one of them out"
                raise ConstructorError(None, None, told, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Converts a node to a value. Raises ConstructorError, with the line, if its text does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # an int of 5000 digits, `!!int few`, `!!bool few`
            told = f"is no {node.tag.removeprefix(_PREFIX)} that can be read: {error}"
            raise ConstructorError(None, None, told, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper. It quotes every text that YAML 1.1, YAML 1.2 or `_Loader` would not read back as text."""

    def ignore_aliases(self, _: Any) -> bool:
        """Returns True: an object that occurs twice is written in full both times, and not as an alias."""
        return True


_Loader.add_constructor(_PREFIX + "int", _integer)
for _one in (_Loader, _Dumper):
    for _kind, _form in _NUMBERS.items():
        _one.add_implicit_resolver(_PREFIX + _kind, _form, list("-+.0123456789"))


def read_yaml(path: Path) -> Any:
    """Reads a YAML file: None, bool, int, float, str, and lists and dicts of these.

    Raises ConfigError with the file and the reason, and with the line where it is known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Reads YAML from a text, as `read_yaml` does from a file. Raises ConfigError; the message begins with `source`."""
    try:
        tree = yaml.load(text, _Loader)
        check_plain(tree)
    except ConstructorError as error:
        assert error.problem_mark is not None
        raise ConfigError(f"{source}: line {error.problem_mark.line + 1}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = f"{place}{error.problem or error.context}; put a text with such signs in quotes"
        raise ConfigError(f"{source}: is not YAML: {told}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return tree


def write_yaml(tree: Any) -> str:
    """Returns the YAML text that `parse_yaml` reads back as the same tree. Keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def check_plain(tree: Any) -> None:
    """Raises ValueError, naming the key, for a tree that could not be printed, written again or used in a file name.

    Such a tree is too deep or too large; one that contains itself is both. Or it holds an integer of more than 64 bits,
    or a text with a NUL character or half of a surrogate pair.
    """
    values: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for number in itertools.count(1):
        if not values:
            return
        path, value = values.pop()
        told = None
        if len(path) > MAX_DEPTH:
            told = f"is nested deeper than {MAX_DEPTH} levels"
        elif number > MAX_VALUES:
            told = f"is one of more than {MAX_VALUES} values"
        elif isinstance(value, dict):
            values += [((*path, str(key)), one) for key, one in value.items()]
            values += [(path, key) for key in value]  # keys are checked before values, so `path` can be printed
        elif isinstance(value, (list, tuple)):
            values += [((*path, str(index)), one) for index, one in enumerate(value)]
        elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            told = f"{value!a} has a character that no file can be named with: NUL, or half of a surrogate pair"
        elif isinstance(value, int) and value.bit_length() > 64:
            told = f"has an integer of {value.bit_length()} bits; at most 64 can be used"
        if told:
            raise ValueError(f"{'.'.join(path[:4]) or 'the file'}{'...' * (len(path) > 4)}: {told}")


def cut_repr(value: Any) -> str:
    """`repr(value)` for an error message, cut after 200 characters."""
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:200]}..."

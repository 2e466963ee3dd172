"""How this library reads and writes YAML: every config, base file, override and study goes through these functions.

It is PyYAML's safe YAML 1.1 with these differences. `1e-6` is a number, as in YAML 1.2 and in JSON. A date is a text.
A key that stands twice in one mapping is refused, and so are all tags but those of plain values. What is read is
small enough to be copied, printed and written again.
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
"""Levels of lists and mappings in each other."""
MAX_VALUES = 100_000
"""Of one tree, keys included, each alias counted as if it were written out."""

_PREFIX = "tag:yaml.org,2002:"
_EXPONENT = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+|[-+]\.[0-9]+)\Z")
"""The floats of YAML 1.2 that YAML 1.1 reads as texts: with an exponent, or with a sign before a point."""


class _Loader(yaml.SafeLoader):
    yaml_constructors: ClassVar = {
        _PREFIX + kind: yaml.SafeLoader.yaml_constructors[_PREFIX + kind]
        for kind in ("null", "bool", "int", "float", "str", "seq", "map")
    } | {None: yaml.SafeLoader.yaml_constructors[None]}
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in resolvers if tag != _PREFIX + "timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Counts each alias as if it were written out: ten aliases of ten aliases, and so on, fill any memory."""
        event = self.peek_event()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConstructorError(None, None, f"is nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node not in self._sizes:
            if isinstance(event, yaml.AliasEvent):
                raise ComposerError(None, None, f"alias *{event.anchor} stands within what it names", event.start_mark)
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                parts = itertools.chain.from_iterable(parts)
            self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        if self._sizes[node] > MAX_VALUES:
            raise ConstructorError(None, None, f"holds more than {MAX_VALUES} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Looks for doubled keys here, before merge keys (`<<`) add others, over which a mapping's own may win."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused where the mapping is made: it cannot be hashed
            name = key.value if key.tag == _PREFIX + "merge" else self.construct_object(key)
            if name in lines:
                told = f"key {name!r} stands here and in line {lines[name]} already; leave one of them out"
                raise ConstructorError(None, None, told, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # an int of 5000 digits, `!!int few`, `!!bool few`
            told = f"is no {node.tag.removeprefix(_PREFIX)} that can be read: {error}"
            raise ConstructorError(None, None, told, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what one of YAML 1.1, YAML 1.2 and `_Loader` would not read as the text that it is."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(_PREFIX + "float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path) -> Any:
    """What the file holds: None, bool, int, float, str, and lists and dicts of these.

    Raises ConfigError with the file and the reason, and where it can be said the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """As `read_yaml`; errors begin with `source`."""
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
    """What `parse_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def check_plain(tree: Any) -> None:
    """Raises ValueError, naming the key, for what cannot be printed, named a file after or written again.

    That is a tree too deep or too large (one that holds itself is both), an integer of more than 64 bits, and a text
    with a NUL character or half of a surrogate pair.
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
            values += [(path, key) for key in value]  # looked at first, so that `path` can always be printed
        elif isinstance(value, (list, tuple)):
            values += [((*path, str(index)), one) for index, one in enumerate(value)]
        elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            told = f"{value!a} has a character that no file can be named with: NUL, or half of a surrogate pair"
        elif isinstance(value, int) and value.bit_length() > 64:
            told = f"has an integer of {value.bit_length()} bits; at most 64 can be used"
        if told:
            raise ValueError(f"{'.'.join(path[:4]) or 'the file'}{'...' * (len(path) > 4)}: {told}")


def cut_repr(value: Any) -> str:
    """`repr(value)` for an error's line: at most 200 characters."""
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:200]}..."

"""What the keys of a config mean: explained in words, and as a JSON schema for editors.

Both are read from the declarations of the sections (`config_sections.py` and `reward_models/config.py`), and nothing is
written twice. `r2m config` shows them.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic.json_schema import GenerateJsonSchema

from r2m_async.config_tree import ConfigTree, nearest
from r2m_async.errors import ConfigError
from r2m_async.yaml_tree import write_yaml

UNITS = {
    "seconds": (
        "rollouts.function_timeout",
        "rollouts.hang_after",
        "scheduling.overage_after",
        "scheduling.stall_after",
        "cluster.wait",
        "weights.timeout",
        "labels.timeout",
        "reward.functions.NAME.timeout",
    ),
    "bytes": ("queue.max_bytes", "queue.journal", "cluster.annotator_memory"),
    "tokens": (
        "rollouts.max_prompt_tokens",
        "rollouts.max_new_tokens",
        "reward.max_tokens",
        "reward.overlong.start",
        "reward.overlong.end",
        "learner.tokens_per_microbatch",
        "optimizer.tokens_per_microbatch",
        "data.max_tokens",
        "data.filters.max_prompt_tokens",
        "data.filters.max_chosen_tokens",
        "data.filters.max_rejected_tokens",
    ),
    "policy steps": (
        "run.num_steps",
        "model.reference_every",
        "head.omega_horizon",
        "scheduling.max_policy_age",
        "scheduling.max_head_age",
        "labels.max_age",
        "learner.warmup",
        "evaluation.every",
        "checkpoint.every",
    ),
    "nats": ("objective.kl_cap", "objective.kl_target", "objective.kl_stop", "learner.max_mismatch"),
    "units of reward": (
        "reward.clip",
        "reward.missing_eos_penalty",
        "reward.overlong.penalty",
        "reward.normalize_clip",
        "critic.clip",
    ),
    "units of reward per token": ("reward.length_penalty",),
}
"""The unit of each key that has one. Counts, shares and factors have none. `NAME` is any name in a mapping."""

_LIMITS = {"minimum": "{:g} or more", "exclusiveMinimum": "more than {:g}", "maximum": "{:g} or less"} | {
    "exclusiveMaximum": "less than {:g}"
}


class _WithoutTitles(GenerateJsonSchema):
    """pydantic's schema without the titles that it makes of the keys' names, which editors would show as headings."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Whether a key gets a title."""
        return False

    def get_default_value(self, schema: Any) -> Any:
        """The default of a key, also where a function makes it, which pydantic leaves out."""
        return schema["default_factory"]() if "default_factory" in schema else super().get_default_value(schema)


@functools.cache
def json_schema(tree: type[ConfigTree]) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of the YAML files of a config, for editors that check while one types.

    It knows every key, its type, its limits and its default, and has the keys' docs as descriptions. The rules that hold
    between keys are not in it: `r2m check` has them.

    Args:
        tree: the class of the config, for example `R2MConfig`. Every call returns the same object, so it must not be changed.
    """
    found = tree.model_json_schema(schema_generator=_WithoutTitles)
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["properties"]["base"] = {
        "type": "string",
        "description": "Another config file, relative to this one. It is read first, and the keys of this file replace its keys.",
    }
    for node in _nodes(found):
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
    return found


def keys_by_section(tree: type[ConfigTree], option: str = "") -> str:
    """Returns a text with the names of all keys, in a paragraph for each section, for `--help`.

    Args:
        tree: the class of the config.
        option: the option of `r2m config` that chooses this class, with a space behind it.
    """
    told = [
        f"Keys by section. `r2m config {option}--explain KEY` says what one is: doc, type, allowed values, default."
    ]
    for name, field in tree.model_fields.items():
        keys = f"{name}: {' '.join(_fields(field))}"
        told.append(_filled(keys, "  ", "    "))
    return "\n".join(told)


def allowed_values(tree: type[ConfigTree]) -> dict[str, tuple[str, ...]]:
    """Returns all keys, such as `scheduling.lag`, each with the values that it allows. None are there if it allows too many.

    Args:
        tree: the class of the config.
    """
    schema, found = json_schema(tree), dict[str, tuple[str, ...]]()

    def look(node: dict[str, Any], name: str) -> None:
        choices, values = _choices(schema, node), list[str]()
        for one in choices:
            values += map(str, one.get("enum", ("true", "false") if one.get("type") == "boolean" else ()))
            for key, below in one.get("properties", {}).items():
                look(below, f"{name}.{key}")
        found[name] = tuple(values)

    for section in tree.model_fields:
        [fields] = _choices(schema, schema["properties"][section])
        for key, node in fields["properties"].items():
            look(node, f"{section}.{key}")
    return found


def described(tree: type[ConfigTree]) -> dict[str, tuple[str, dict[str, str]]]:
    """Returns all sections and keys in order, each with its doc, and a key with its type, unit and default, too.

    The keys below a mapping of names are under `NAME`, as in `UNITS`.

    Args:
        tree: the class of the config.
    """
    schema, found = json_schema(tree), dict[str, tuple[str, dict[str, str]]]()

    def look(node: dict[str, Any], path: list[str]) -> None:
        found[".".join(path)] = _doc(schema, node), _facts(schema, node, path)
        for one in _choices(schema, node):
            below, at = one.get("properties", {}), path
            if isinstance(one.get("additionalProperties"), dict):
                [below] = [mapped.get("properties", {}) for mapped in _choices(schema, one["additionalProperties"])]
                at = [*path, "NAME"]
            for key, inside in below.items():
                look(inside, [*at, key])

    for section in tree.model_fields:
        look(schema["properties"][section], [section])
    return found


def explain(tree: type[ConfigTree], key: str = "") -> str:
    """Says what a key is: its doc, type, allowed values, unit and default.

    Args:
        tree: the class of the config.
        key: a key such as `scheduling.max_policy_age`, or the name of a section, whose keys are then listed. A name without
            its section is every key of that name. Empty lists the sections.

    Raises ConfigError for an unknown key. The message names the nearest one.
    """
    schema = json_schema(tree)
    if not key:
        return _listed(schema, {name: schema["properties"][name] for name in tree.model_fields})
    *above, last = names = key.split(".")
    if not above and last not in schema["properties"]:
        homes = [name for name, field in tree.model_fields.items() if last in _fields(field)]
        if homes:
            return "\n".join(explain(tree, f"{home}.{last}") for home in homes)
    node, path = schema, list[str]()
    for name in names:
        choices = _choices(schema, node)
        inside = next((one for one in choices if name in one.get("properties", {})), None)
        mapping = next((one for one in choices if isinstance(one.get("additionalProperties"), dict)), None)
        if inside is not None:
            node, path = inside["properties"][name], [*path, name]
        elif mapping is not None:
            node, path = mapping["additionalProperties"], [*path, "NAME"]
        else:
            if not any("properties" in one for one in choices):
                raise ConfigError(f"{key}: no such key: {'.'.join(path)} has no keys below it")
            # Of a misspelt section the key behind it says which one was meant.
            close = difflib.get_close_matches(key, allowed_values(tree), n=1) if above and not path else []
            remedy = f"; did you mean {close[0]}?" if close else nearest([*path, name], dict(tree.model_fields))
            raise ConfigError(f"{key}: no such key{remedy}")
    fields = next((one for one in _choices(schema, node) if "properties" in one), None)
    doc = _doc(schema, node)
    told = [key, _filled(doc, "  ", "  ")] if doc else [key]
    told += [f"  {name:<8}{value}" for name, value in _facts(schema, node, path).items()]
    if fields is not None:
        told.append(_listed(schema, fields["properties"]).rstrip("\n"))
    return "\n".join(told) + "\n"


def _doc(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """The doc of a section or a key: its own, or else that of the keys below it."""
    docs = (one.get("description", "") for one in (node, *_choices(schema, node)))
    return next((doc for doc in docs if doc), "")


def _facts(schema: dict[str, Any], node: dict[str, Any], path: Sequence[str]) -> dict[str, str]:
    """The type, the unit and the default of a key, as far as it has them; nothing of a section."""
    if len(path) < 2:
        return {}
    facts = {"type": _type(schema, node), "unit": _unit(".".join(path)), "default": _default(node)}
    return {name: value for name, value in facts.items() if value is not None}


def _filled(text: str, first: str, others: str) -> str:
    """A text in lines of 100 characters. first, others: how the first line and the others begin."""
    # Names such as `kernels-community/flash-attn2` stay whole, so that they can be copied.
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _fields(field: Any) -> dict[str, Any]:
    """The keys of a section, given the field of the config that holds it."""
    return cast(dict[str, Any], field.annotation.model_fields)


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a schema, from the top down."""
    if isinstance(node, dict):
        yield node
    for one in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(one)


def _choices(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives that a node of a schema allows, with references followed."""
    if "$ref" in node:
        target = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return _choices(schema, target)
    several = node.get("anyOf") or node.get("oneOf")
    return [one for part in several for one in _choices(schema, part)] if several else [node]


def _type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """The type and the allowed values of a node, in words."""
    return " or ".join(dict.fromkeys(_one_type(schema, one) for one in _choices(schema, node)))


def _one_type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """The type of a node without alternatives, in words."""
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "items" in node:
        return f"list of {_type(schema, node['items'])}"
    if isinstance(node.get("additionalProperties"), dict):
        return f"mapping of names to {_type(schema, node['additionalProperties'])}"
    if "properties" in node:
        return "keys of its own"
    limits = [form.format(node[name]) for name, form in _LIMITS.items() if name in node and abs(node[name]) < 1e30]
    return ", ".join([str(node.get("type") or node.get("const", "any value")), *limits])


def _unit(key: str) -> str | None:
    """The unit of a key, or None."""
    return next((unit for unit, keys in UNITS.items() if key in keys), None)


def _default(node: dict[str, Any]) -> str:
    """The default of a key as YAML has it."""
    if "default" not in node:
        return "none: it must be given"
    return node["default"] if isinstance(node["default"], str) else json.dumps(node["default"])


def _first_sentence(doc: str) -> str:
    """The first sentence of a doc."""
    return re.split(r"(?<!Eq)\. ", doc)[0].rstrip(".") + "." if doc else ""


def _listed(schema: dict[str, Any], keys: dict[str, dict[str, Any]]) -> str:
    """A line for each key or section: its name, and the first sentence of its doc."""
    width = max(map(len, keys)) + 2
    told = []
    for name, node in keys.items():
        first = _first_sentence(_doc(schema, node))
        told.append(_filled(first, f"  {name:<{width}}", " " * (width + 2)))
    return "\n".join(told) + "\n"


def commented(tree: type[ConfigTree], values: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the YAML text of some keys, each behind the first sentence of its doc as a comment.

    Args:
        tree: the class of the config.
        values: the values of the keys, by section and key.
    """
    schema, told = json_schema(tree), []
    for section, keys in values.items():
        [fields] = _choices(schema, schema["properties"][section])
        told.append(f"\n# {_first_sentence(fields['description'])}\n{section}:\n")
        for key, value in keys.items():
            doc = _first_sentence(fields["properties"][key]["description"])
            told.append(_filled(doc, "  # ", "  # ") + "\n")
            told.append(textwrap.indent(write_yaml({key: value}), "  "))
    return "".join(told)

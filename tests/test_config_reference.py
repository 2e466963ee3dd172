"""`r2m config`: the keys explained, and the JSON schema for editors."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.config_reference import UNITS, explain, json_schema, keys_by_section
from r2m_async.errors import ConfigError
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.yaml_tree import read_yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("studies", "reward_model", "cluster")
)
REWARD_MODELS = sorted((CONFIGS / "reward_model").glob("*.yaml"))


def keys_of(fields: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(name, doc) of all keys of a config; `NAME` stands for any name in a mapping."""
    for name, field in fields.items():
        if above:
            yield f"{above}{name}", field.description
        parts, mapped = [field.annotation], False
        while parts:
            part = parts.pop()
            if hasattr(part, "model_fields"):
                yield from keys_of(part.model_fields, f"{above}{name}.{'NAME.' * mapped}")
            mapped = mapped or getattr(part, "__origin__", None) is dict
            parts += get_args(part)


ALL = [(tree, *key) for tree in (R2MConfig, RewardModelConfig) for key in keys_of(tree.model_fields)]


@pytest.mark.parametrize(
    "tree, path",
    [(R2MConfig, path) for path in RUNS] + [(RewardModelConfig, path) for path in REWARD_MODELS],
    ids=lambda value: getattr(value, "stem", ""),
)
def test_the_schema_takes_every_file_under_configs_and_refuses_a_misspelt_key_in_it(tree, path):
    validator = jsonschema.Draft202012Validator(json_schema(tree))
    read = read_yaml(path)
    assert [error.message for error in validator.iter_errors(read)] == []
    read["run"] = {**read.get("run", {}), "nmae": "x"}
    [error] = validator.iter_errors(read)
    assert "'nmae' was unexpected" in error.message


def test_the_schema_takes_what_the_config_takes_and_refuses_what_it_refuses():
    schema = json_schema(R2MConfig)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(R2MConfig().to_dict())
    assert validator.is_valid({"base": "quickstart.yaml", "model": {"lora": {"rank": 8}}})
    assert validator.is_valid({"reward": {"functions": {"mine": {"function": "mine:f", "weight": 2}}}})
    for wrong in (
        {"rnu": {}},
        {"run": {"num_steps": 0}},
        {"rollouts": {"engine": "vlm"}},
        {"model": {"lora": {"rnk": 8}}},
        {"reward": {"functions": {"mine": {"wieght": 2}}}},
    ):
        assert not validator.is_valid(wrong), wrong
        with pytest.raises(ConfigError):
            R2MConfig.from_dict(wrong)


def test_the_schema_has_the_keys_docs_for_its_descriptions():
    section = json_schema(R2MConfig)["$defs"]["SchedulingSection"]["properties"]
    assert section["max_policy_age"]["description"].startswith("The largest policy age, in steps: the step that trains")
    assert all("\n" not in key["description"] for key in section.values())


def test_every_key_is_explained_by_its_whole_doc():
    assert len(ALL) > 200
    for tree, key, doc in ALL:
        told = explain(tree, key)
        assert told.startswith(f"{key}\n")
        assert " ".join(doc.split()) in " ".join(told.split()), key
        assert re.search(r"^  type    \S", told, re.M) and re.search(r"^  default \S", told, re.M), key


def test_only_a_key_without_a_default_must_be_given_and_a_first_sentence_is_whole():
    told = {key for tree, key, _ in ALL if "it must be given" in explain(tree, key)}
    assert told == {"reward.overlong.start", "reward.functions.NAME.function"}
    assert 'default {"ray.io/market-type": "!spot"}' in explain(R2MConfig, "cluster.stable")
    assert re.search(r"^  width +Width d of the head's cross-attention \(Eq\. 3\)\.$", explain(R2MConfig, "head"), re.M)


def test_an_explanation_has_type_limits_unit_default_and_allowed_values():
    told = explain(R2MConfig, "scheduling.max_policy_age")
    assert told.endswith("  type    integer, 0 or more\n  unit    policy steps\n  default 0\n")
    assert "  type    one of transformers, vllm\n" in explain(R2MConfig, "rollouts.engine")
    assert "  type    number, more than 0 or null\n  unit    nats\n  default null\n" in explain(
        R2MConfig, "objective.kl_cap"
    )
    assert "  default true\n" in explain(R2MConfig, "checkpoint.at_end")
    assert "  default none: it must be given\n" in explain(R2MConfig, "reward.overlong.start")
    assert "  rank     Inner dimension" in explain(R2MConfig, "model.lora")
    assert "unit    seconds" in explain(R2MConfig, "reward.functions.answer.timeout")


def test_without_its_section_a_key_is_explained_in_all_of_them_and_a_section_lists_its_keys():
    assert re.findall(r"^\S+", explain(R2MConfig, "lr"), re.M) == ["head.lr", "critic.lr", "learner.lr"]
    section = explain(R2MConfig, "queue")
    assert "  max_bytes  The most bytes that all groups together may take in the queue.\n" in section
    assert re.findall(r"^  (\w+) +[A-Z`]", explain(R2MConfig), re.M) == list(R2MConfig.model_fields)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("rollouts.max_new_token", "did you mean rollouts.max_new_tokens?"),
        ("schedulin", "did you mean scheduling?"),
        ("lerner.lr", "did you mean learner.lr?"),
        ("xyzzy.like_it", "valid are run, model"),
        ("scheduling.num_actors", "did you mean rollouts.num_actors?"),
        ("model.lora.rnk", "did you mean model.lora.rank?"),
        ("run.seed.x", "run.seed has no keys below it"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(capsys, key, nearest):
    assert main(["config", "--explain", key]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"r2m: {key}: no such key") and nearest in err


def test_the_units_are_those_that_the_docs_begin_with():
    names = {key for _, key, _ in ALL}
    assert {key for keys in UNITS.values() for key in keys} <= names
    begins = {
        "seconds": r"Seconds ",
        "bytes": r"(The most b|B)ytes ",
        "tokens": r"The most tokens |The number of response tokens ",
    }
    for unit, pattern in begins.items():
        assert {key for _, key, doc in ALL if re.match(pattern, doc)} <= set(UNITS[unit]), unit


@pytest.mark.parametrize(
    "command, tree",
    [(["train"], R2MConfig), (["check"], R2MConfig), (["reward-model", "train"], RewardModelConfig)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_help_names_every_key(capsys, command, tree):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(keys_by_section(tree).splitlines()[1].split()) in text
    for name, field in tree.model_fields.items():
        assert f" {name}: {' '.join(field.annotation.model_fields)}" in text

"""What YAML is read as, wherever the library reads it, and what is refused."""

import math
import random
import string

import pytest
import yaml

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.studies.study import read_study


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def study(tmp_path, text):
    """Reads a study file of this text; of its runs the first one's config, if it has any."""
    (tmp_path / "base.yaml").touch()
    runs = read_study(written(tmp_path / "study.yaml", text), tmp_path)[2]
    return runs[0].config if runs else None


FLOATS = {
    "1e-6": 1e-6,
    "-.5": -0.5,
    "+.5": 0.5,
    "1E6": 1e6,
    "-2e+3": -2e3,
    "1.e5": 1e5,
    "+.5e-3": 5e-4,
    "12e03": 12e3,
    "1.0e-6": 1e-6,
    "0.5": 0.5,
}
TEXTS = [
    "1e",
    "e6",
    "1e-",
    "1e6x",
    "0x1e-6",
    "1.2.3e4",
    "2026-01-01",
    "2026-01-01 10:00:00",
    "v1e6",
    "-e5",
    ".",
    "1:30",
    "-1:30.5",
    "0o8",
    "0b2",
    "_1",
]


@pytest.mark.parametrize("number", FLOATS)
def test_a_float_of_yaml_12_is_a_number_in_every_open_dict_of_every_file(tmp_path, number):
    options = f"{{x: {number}, deep: {{y: [{number}]}}}}"
    expected = {"x": FLOATS[number], "deep": {"y": [FLOATS[number]]}}
    keys = ("advantage.options", "rollouts.engine_options", "learner.zero_options")
    whole = "rollouts: {engine: vllm}\nlearner: {backend: deepspeed}\n"
    written(tmp_path / "base.yaml", whole + f"advantage: {{options: {options}}}")
    file = written(
        tmp_path / "config.yaml", f"base: base.yaml\nlearner: {{backend: deepspeed, zero_options: {options}}}"
    )
    config = R2MConfig.from_yaml(file, [f"rollouts.engine_options={options}"])
    read = [getattr(getattr(config, section), key) for section, key in (name.split(".") for name in keys)]
    assert read == [expected] * 3
    again = R2MConfig.from_yaml(written(tmp_path / "again.yaml", config.to_yaml()))
    assert again == config and type(again.advantage.options["x"]) is float

    of_study = f"base: base.yaml\nseeds: [0]\nset: {{advantage.options: {options}}}\n"
    (tmp_path / "base.yaml").write_text(whole)
    config = read_study(written(tmp_path / "study.yaml", of_study), tmp_path)[2][0].config
    assert config.advantage.options == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("017", 17),
        ("-09", -9),
        ("0o17", 15),
        ("0x1F", 31),
        ("-0b11", -3),
        ("1_000", 1000),
        ("1_0.5_0", 10.5),
        ("08.5", 8.5),
    ],
)
def test_digits_are_decimal_whatever_they_begin_with_and_prefixes_are_those_of_yaml_12(tmp_path, number, expected):
    text = f"advantage: {{options: {{x: {number}, y: '{number}'}}}}"
    config = R2MConfig.from_yaml(written(tmp_path / "config.yaml", text), [f"advantage.options.z={number}"])
    assert config.advantage.options == {"x": expected, "y": number, "z": expected}
    # A text that looks like a number is quoted, for us and for readers of YAML 1.1.
    assert R2MConfig.from_yaml(written(tmp_path / "again.yaml", config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml())["advantage"]["options"] == {"x": expected, "y": number, "z": expected}


def test_a_float_is_a_number_in_the_configs_of_reward_models(tmp_path):
    file = written(tmp_path / "rm.yaml", "optimizer: {lr: 1e-3, batch_size: 1e1}")
    config = RewardModelConfig.from_yaml(file, ["loss.bsr_weight=2e-3"])
    assert (config.optimizer.lr, config.optimizer.batch_size, config.loss.bsr_weight) == (1e-3, 10, 2e-3)
    with pytest.raises(ConfigError, match=r"run\.name: .*got 1e-06 \(.*put it in quotes"):
        R2MConfig.from_yaml(written(tmp_path / "name.yaml", "run: {name: 1e-6}"))


@pytest.mark.parametrize("text", [*TEXTS, *FLOATS, "yes", "null", "0o10", "=", "<<", "é", "a: b", " x", "a\nb"])
def test_a_text_that_is_written_out_is_read_back_as_that_text_by_us_and_by_pyyaml(tmp_path, text):
    config = R2MConfig(run={"name": text}, advantage={"options": {text: text}})
    assert R2MConfig.from_yaml(written(tmp_path / "config.yaml", config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml())["advantage"]["options"] == {text: text}
    if text in TEXTS:
        read = R2MConfig.from_yaml(written(tmp_path / "plain.yaml", f"advantage: {{options: {{x: {text}}}}}"))
        assert read.advantage.options == {"x": text}


DOUBLED = [
    ("head: {lr: 0.1}\nrun: {}\nhead: {width: 4}\n", "head", (1, 3)),
    ("head:\n  lr: 0.1\n  width: 4\n  lr: 0.1\n", "lr", (2, 4)),
    ("head: {lr: 1, 'lr': 1}", "lr", (1, 1)),
    ("advantage:\n  options:\n    a:\n    - {x: 1,\n       y: 1,\n       x: 1}\n", "x", (4, 6)),
    ("base: base.yaml\nbase: base.yaml\n", "base", (1, 2)),
    ("advantage: {options: {a: {1: 2, 0x1: 3}}}", "1", (1, 1)),
    ("head: {<<: {lr: 1}, <<: {lr: 2}}", "<<", (1, 1)),
]


@pytest.mark.parametrize(("text", "key", "lines"), DOUBLED)
def test_a_key_that_stands_twice_is_refused_with_file_key_and_both_lines(tmp_path, text, key, lines):
    (tmp_path / "base.yaml").touch()
    told = rf"line {lines[1]}: key '?{key}'? stands here and in line {lines[0]} already"
    for config in (R2MConfig, RewardModelConfig):
        with pytest.raises(ConfigError, match=rf"config\.yaml: {told}"):
            config.from_yaml(written(tmp_path / "config.yaml", text))
        with pytest.raises(ConfigError, match=rf"below\.yaml: {told}"):
            written(tmp_path / "below.yaml", text)
            config.from_yaml(written(tmp_path / "config.yaml", "base: below.yaml"))
    with pytest.raises(ConfigError, match=rf"study\.yaml: {told}"):
        study(tmp_path, text)


def test_a_key_that_stands_twice_in_an_override_or_a_study_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'advantage\.options=\{x: 1, x: 2\}': line 1: key 'x' stands here and in line 1"
    ):
        R2MConfig.from_yaml(written(tmp_path / "config.yaml", ""), ["advantage.options={x: 1, x: 2}"])
    with pytest.raises(ConfigError, match=r"study\.yaml: line 5: key 'a' stands here and in line 4 already"):
        study(tmp_path, "base: base.yaml\nseeds: [0]\ngrid:\n  lr: {a: {head.lr: 1e-3},\n       a: {head.lr: 1e-4}}\n")


def test_what_a_mapping_says_itself_wins_over_what_it_merges_and_over_its_base_file(tmp_path):
    text = (
        "advantage: {options: {deep: {deeper: &both {<<: &one {x: 1, y: 1}, x: 2}}}}\n"
        "learner: {backend: deepspeed, zero_options: {<<: *both, y: 3, z: *one}}\n"
    )
    written(tmp_path / "base.yaml", text)
    config = R2MConfig.from_yaml(written(tmp_path / "config.yaml", "base: base.yaml\nadvantage: {name: grpo}"))
    assert config.advantage.options == {"deep": {"deeper": {"x": 2, "y": 1}}}
    assert config.learner.zero_options == {"x": 2, "y": 3, "z": {"x": 1, "y": 1}}


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" if n else "a0: &a0 [x]\n" for n in range(20))
MERGES = "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" if n else "a0: &a0 {x: 1}\n" for n in range(20)
)
WRONG = {
    "self:": "self",
    "self: {x: 1}": r"self: no such key",
    "cls: 1\nsections: 2": "cls: no such key",
    "[" * 3000 + "]" * 3000: "nested deeper than 32 levels",
    "advantage: {options: {x: " + "{a: " * 200 + "1" + "}" * 202: "nested deeper than 32 levels",
    "- " * 500 + "x": "nested deeper than 32 levels",
    "run: {seed: " + "1" * 5000 + "}": "line 1: is no int that can be read",
    "run: {seed: " + "1" * 4000 + "}": r"run\.seed: has an integer of 13285 bits",
    "? " + "1" * 5000 + "\n: x": "line 1: is no int that can be read",
    "advantage: {options: {x: !!int few}}": "line 1: is no int that can be read",
    "advantage: {options: {x: !!float few}}": "line 1: is no float that can be read",
    "advantage: {options: {x: !!bool few}}": "line 1: is no bool that can be read",
    "advantage: {options: {x: !!int ''}}": "line 1: is no int that can be read",
    'run: {name: "\\ud800"}': r"run\.name: '\\ud800' has a character",
    'advantage: {options: {"\\udfff": 1}}': r"advantage\.options: '\\udfff' has a character",
    'run: {name: "a\\0b"}': r"run\.name: 'a\\x00b' has a character",
    'base: "a\\0b"': r"base: 'a\\x00b' has a character",
    b"run: {name: \xff}": "is not YAML",
    b"run: {name: \xed\xa0\x80}": "is not YAML",
    "run: {name: x}".encode("utf-16"): "is not YAML",
    b"run: {name: \x00}": "is not YAML: .*special characters",
    BOMB: "line 6: holds more than 100000 values",
    MERGES: "line 6: holds more than 100000 values",
    "advantage: {options: {x: &a [*a]}}": r"is not YAML: line 1, .*alias \*a stands within what it names",
    "advantage: {options: &a {x: *a}}": r"alias \*a stands within",
    "advantage: {options: *a}": "undefined alias",
    "advantage: {options: {x: {1: 2}}}": r"advantage\.options\.x",
    "advantage: {options: {x: {yes: 2}}}": r"advantage\.options\.x",
    "advantage: {options: {~: 2}}": r"advantage\.options",
    "? [a]\n: b": "line 1: found unhashable key",
    "? {a: b}\n: b": "line 1: found unhashable key",
    "advantage: {options: {x: .inf}}": r"advantage\.options\.x: input should be a finite number; got inf",
    "advantage: {options: {x: [1e999]}}": r"advantage\.options\.x\.0: input should be a finite number; got inf",
    "run: [name, x]": r"run: input should be",
    "run: x": r"run: input should be",
    "run: {name: [x]}": r"run\.name: ",
    "advantage: {options: [x]}": r"advantage\.options: input should be",
    "run: !!python/object/apply:os.system [ls]": r"tag:yaml.org,2002:python/object/apply:os.system",
    "run: !!python/name:os.system": "line 1: could not determine a constructor",
    "advantage: {options: {x: !!binary aGk=}}": "line 1: could not determine a constructor",
    "advantage: {options: {x: !!timestamp 2026-01-01}}": "line 1: could not determine a constructor",
    "advantage: {options: {x: !!set {a}}}": "line 1: could not determine a constructor",
    "advantage: {options: {x: !mine a}}": "line 1: could not determine a constructor",
    "run: {}\n---\nrun: {}": "is not YAML",
    "base: .": "cannot be read: Is a directory",
    "base: " + "x" * 300: "cannot be read: File name too long",
    "base: loop.yaml": "cannot be read",
    "\t": "is not YAML",
    "run: {name: 'x": "is not YAML",
    "%YAML 3.0\n---\nrun: {}": "is not YAML",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_a_config_ends_in_a_config_error_with_file_and_reason(tmp_path, text):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match=WRONG[text]) as caught:
        R2MConfig.from_yaml(written(tmp_path / "config.yaml", text))
    told = str(caught.value)
    assert str(tmp_path) in told and "\n\n" not in told and len(told) < 600
    told.encode()
    with pytest.raises(ConfigError):
        study(tmp_path, text)


def test_what_cannot_be_a_config_is_refused_in_python_and_in_overrides_too(tmp_path):
    itself: list = []
    itself += [itself, itself]
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    for value in (
        itself,
        deep,
        10**5000,
        -(10**5000),
        "\ud800",
        "\0",
        {"\udc80": 1},
        {1: 2},
        b"x",
        math.nan,
        {"x"},
        object(),
    ):
        for tree in ({"advantage": {"options": {"x": value}}}, {"run": {"seed": value}}, {"run": value}, {"x": value}):
            with pytest.raises(ConfigError):
                R2MConfig.from_dict(tree)
    for sections in ({"self": {}}, {"cls": 1}, {"sections": []}, {"\ud800": 1}):
        with pytest.raises(ConfigError):
            R2MConfig.from_dict(sections)
        with pytest.raises(ConfigError):
            R2MConfig().run(**sections)
    file = written(tmp_path / "config.yaml", "")
    for value in ("[" * 3000, "1" * 5000, '"\\ud800"', "\udcff", "\0", "&a [*a]", "!!binary aGk=", "x: y: z"):
        with pytest.raises(ConfigError, match="run.name"):
            R2MConfig.from_yaml(file, [f"run.name={value}"])
    for override in ("self.x=1", "self.self=1", "run.self=1", ".=", "run.=", ".x=1", "\udcff.x=1"):
        with pytest.raises(ConfigError):
            R2MConfig.from_yaml(file, [override])


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    assert R2MConfig.from_yaml(written(tmp_path / "config.yaml", "\ufeffrun: {num_steps: 7}")).run.num_steps == 7


def random_value(rng: random.Random, depth: int = 0):
    """Anything that a YAML file, or a caller, might hold where a value belongs, and mostly does not."""
    scalars = (
        None, True, 0, -1, 3, 2**63, 2**64, 10**4400, 0.5, 1e308, math.inf, math.nan, "", "x", "1e-6", "yes", "~", "\0",
        "\ud800", "é\u2028\x85", b"x", ("x",), "embedded", "r2m", "cpu", "=", "<<", "&a", "*a", "!x", "- x", ": ", "\t",
    )  # fmt: skip
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(scalars)
    parts = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if rng.random() < 0.4:
        return parts
    names = ("x", "rank", "self", "eps", "", "\ud800", 1, None, True, 1.5, "a.b")
    return {rng.choice(names): part for part in parts}


def random_tree(rng: random.Random) -> dict:
    if rng.random() < 0.5:
        return {"advantage": {"options": {"x": random_value(rng)}}}
    sections = [*R2MConfig.model_fields, "base", "self", 1, None, "run "]
    tree = {}
    for section in rng.sample(sections, rng.randrange(1, 4)):
        keys = (
            list(R2MConfig.model_fields[section].annotation.model_fields)
            if section in R2MConfig.model_fields
            else ["x"]
        )
        some = {rng.choice([*keys, "self", "x"]): random_value(rng) for _ in range(rng.randrange(3))}
        tree[section] = some if rng.random() < 0.9 else random_value(rng)
    return tree


def random_text(rng: random.Random, whole: str) -> str:
    """A config's text, cut, doubled, or with signs of YAML strewn in."""
    signs = ("&a ", "*a", "<<: ", "!!int ", "!!set ", "[", "]", "{", "}", ": ", "- ", "? ", "|\n", "'", '"', "\\", "#", "%", "@",
             "\n", "\t", "\0", "\ufeff", "---\n", "...\n", "1e-6", ".inf", "self", "9" * 4400, "\ud800", "[" * 400)  # fmt: skip
    text = whole
    for _ in range(rng.randrange(1, 4)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + 40)
        change = rng.random()
        if change < 0.6:
            text = text[:at] + rng.choice((*signs, *string.punctuation)) + text[at:]
        elif change < 0.8:
            text = text[:at] + text[end:]
        else:
            text = text[:end] + text[at:]
    return text


def test_of_hundreds_of_random_trees_and_files_each_is_a_config_that_can_be_written_or_a_config_error(tmp_path):
    rng, config, accepted, refused = random.Random(16), R2MConfig(), 0, 0
    whole = config.advantage(options={"eps": 1e-6, "x": ["1e-6", {"y": None}]}).to_yaml().partition("objective:")[0]
    file, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    for number in range(500):
        try:
            if number % 2:
                config = R2MConfig.from_dict(random_tree(rng))
            else:
                config = R2MConfig.from_yaml(written(file, random_text(rng, whole)))
        except ConfigError as error:
            refused += 1
            assert 0 < len(str(error)) < 3000
            continue
        accepted += 1
        if accepted % 4 == 0:  # PyYAML takes 20 ms for a whole tree
            assert R2MConfig.from_yaml(written(again, config.to_yaml())) == config
    assert accepted > 50 and refused > 200

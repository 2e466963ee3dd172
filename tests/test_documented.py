"""Every public function, class and method says what it does; every file of documents is reachable from its index.

What documents name is there: files, commands with their options, keys of configs, and targets of make.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.config_reference import allowed_values
from r2m_async.reward_models.config import RewardModelConfig

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("r2m_async", "actors", "learners") for path in sorted((ROOT / package).rglob("*.py"))]
DOCUMENTS = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
PAST = ("CHANGELOG.md",)
"""Documents that name what there was."""
SHOWN = [*DOCUMENTS, *sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "examples").glob("*.[py]*"))]
"""What shows commands: documents, and the comments of configs and examples."""
SHOWN = [path for path in SHOWN if path.name not in PAST]
MISTYPED = {"run.num_step", "run.num_stps", "lerner.lr", "section.key"}
"""Keys that documents mistype, to show what the command says, and the one that stands for any."""


def undocumented(tree: ast.AST, above: str = "") -> list[str]:
    """Names of public definitions without a docstring; what lies in a function is not public."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{above}{node.name}"
            found += [] if ast.get_docstring(node) else [name]
            if isinstance(node, ast.ClassDef):
                found += undocumented(node, f"{name}.")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert undocumented(tree) == []


@pytest.mark.parametrize(
    "path",
    DOCUMENTS,
    ids=lambda path: path.name,
)
def test_the_files_that_a_document_names_are_there(path):
    text = path.read_text(encoding="utf-8")
    if path.name in PAST:
        text = ""
    named = re.findall(r"`((?:r2m_async|actors|learners|tests|benchmarks|configs|docs)/[\w./-]+\.\w+)`", text)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text)]
    missing = [
        name for name in named if "NAME" not in name and not (ROOT / name).exists()
    ]  # NAME: whatever it is called
    assert missing + [link for link in links if link and not (path.parent / link).exists()] == []


def test_the_index_leads_to_every_document():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md" and f"({path.name}" not in text
    ] == []


def commands_in(text: str) -> list[list[str]]:
    """The words behind `r2m` of each command of a text: of those in backticks, and of those that begin a line of code."""
    before = r"(?:[A-Z_]+=\S+ )*(?:\S*bin/)?r2m (?=[a-z])"
    text = re.sub(r"\\\n[#\s]*", "", text)
    quoted = re.findall(rf"`{before}([^`]+)`", text)
    lines = re.findall(rf"^(?: {{4,}}|\s*#  *)(?:\$ )?{before}(.+)$", text, re.MULTILINE)
    found = []
    for command in [*quoted, *lines]:
        words = shlex.split(command.replace("\\|", "|"), comments=True)
        # What the shell takes ends the command: a pipe, another command, a redirection.
        end = next((place for place, word in enumerate(words) if re.match(r"[|&;<]|\d?>", word)), len(words))
        found.append(words[:end])
    return found


def keys_known(kind) -> set[str]:
    """The keys of a config, and the sections that hold them."""
    return {key[: len(key) - len(rest)] for key in allowed_values(kind) for rest in ("", key[key.find(".") :])}


def wrong_with(words: list[str]) -> str:
    """What is wrong with a command line, without running it."""
    # A command that is only mentioned has no arguments. argparse leaves at --help, before it asks for them.
    asked = ["1" if word == "N" else word for word in (*words, "--help")]
    try:
        main(asked)
    except SystemExit as end:
        if end.code:
            return f"{' '.join(words)}: cannot be parsed"
    kind = RewardModelConfig if words[0] == "reward-model" else R2MConfig
    keys = [word.partition("=")[0] for word in words[1:] if re.match(r"[a-z_]+\.[a-z_.]+=", word)]
    unknown = [key for key in keys if ".".join(key.split(".")[:2]) not in keys_known(kind) | MISTYPED]
    files = [word for word in words if re.match(r"(configs|examples)/", word) and "NAME" not in word]
    absent = [name for name in files if not (ROOT / name).exists()]
    return f"{' '.join(words)}: {unknown + absent} is not there" if unknown + absent else ""


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_keys_and_targets_that_a_document_names_are_there(path, capsys):
    text = path.read_text(encoding="utf-8")
    wrong = [told for words in commands_in(text) if (told := wrong_with(words))]
    keys = keys_known(R2MConfig) | keys_known(RewardModelConfig)
    sections = "|".join({key for key in keys if "." not in key})
    named = re.findall(rf"`((?:{sections})\.[a-z_]+)(?:[:=.][^`]*)?`(?! TAB)", text)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong += [key for key in named if key not in keys and not re.search(r"\.(jsonl?|py|md|png|html|yaml)$", key)]
    wrong += [target for target in re.findall(r"`make ([a-z0-9-]+)", text) if target not in targets]
    assert wrong == []


def test_what_a_document_could_say_wrongly_is_found():
    text = "Run `r2m trian x`, `A=1 r2m train configs/absent.yaml`:\n\n    $ r2m check CONFIG run.nothing=2  # so\n"
    found = commands_in(text)
    assert found == [["trian", "x"], ["train", "configs/absent.yaml"], ["check", "CONFIG", "run.nothing=2"]]
    assert all(wrong_with(words) for words in found)
    assert not wrong_with(["train", "configs/quickstart.yaml", "run.num_steps=2"])

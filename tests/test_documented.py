"""Every public function, class and method says what it does; every file of documents is reachable from its index."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("r2m_async", "actors", "learners") for path in sorted((ROOT / package).rglob("*.py"))]


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
    sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]),
    ids=lambda path: path.name,
)
def test_the_files_that_a_document_names_are_there(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":  # it names where files were
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

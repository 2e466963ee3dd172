"""`make dist`: the wheel holds all that the commands read, and has the version of the newest tag."""

import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "learners", "r2m_async")
BROUGHT = {
    "huggingface_hub": "transformers",
    "packaging": "transformers",
    "pyarrow": "ray",
    "pydantic_core": "pydantic",
} | {
    "referencing": "jsonschema",
    "triton": "torch",  # on a GPU
}
"""Packages that are imported and that one that is asked for always brings."""

pytest.importorskip("build", reason="the extra `test` is not installed")
pytest.importorskip("hatch_vcs", reason="the extra `test` is not installed")


def done(*command: object, cwd: Path, **variables: str) -> str:
    """What a command printed that had to succeed."""
    environment = {**os.environ, **variables}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, and the archive of the sources that it was made of."""
    out = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_has_every_file_of_the_packages_and_the_archive_every_config(built):
    with zipfile.ZipFile(built[0]) as wheel, tarfile.open(built[1]) as archive:
        packed, sources = wheel.namelist(), archive.getnames()
    files = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in packed if ".dist-info/" not in name} == files
    assert "r2m_async/runs/report.html" in files
    inside = {name.partition("/")[2] for name in sources}
    assert files <= inside and {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")} <= inside


def imported(path: Path) -> set[str]:
    """The names of the packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        found |= {name.partition(".")[0] for name in names}
    return found


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(one).name) for one in requirements}


def test_what_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name, lines in project["optional-dependencies"].items() if name != "test" for one in lines]
    asked = names_of(project["dependencies"] + extras)
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    found = set().union(*map(imported, files)) - {*sys.stdlib_module_names, *PACKAGES}
    homes = packages_distributions()
    missing = {
        name
        for name in found
        if not {canonicalize_name(one) for one in homes.get(name, [BROUGHT.get(name, name)])} & asked
    }
    assert missing <= set(BROUGHT), missing - set(BROUGHT)
    for name, other in BROUGHT.items():
        brings = names_of(requires(other) or [])
        assert canonicalize_name(name) in brings or name == "triton", (name, other)


def asked_for_by(requirements: list[str]) -> set[str]:
    """The names of all packages that an installation without extras brings here."""
    found, open_ones = set(), [Requirement(one) for one in requirements]
    while open_ones:
        one = open_ones.pop()
        extras = one.extras or {""}
        known = {(canonicalize_name(one.name), extra) for extra in extras}
        if known <= found:
            continue
        found |= known
        try:
            brings = [Requirement(line) for line in requires(one.name) or []]
        except PackageNotFoundError:
            continue
        for other in brings:
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                other.marker = None
                open_ones.append(other)
    return {name for name, _ in found}


WITHOUT = """
import importlib.machinery
hidden = {hidden!r}
kept = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else kept(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""
"""A sitecustomize.py that hides packages, as if they were not installed."""


@pytest.mark.ring
def test_the_wheel_trains_and_reports_in_an_empty_folder_with_nothing_but_what_it_asks_for(
    built, tiny_config, tmp_path
):
    home, empty = tmp_path / "home", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    done(*pip, "--target", home, built[0], cwd=empty)
    (empty / "tiny.yaml").write_text(tiny_config.run(name="tiny").to_yaml(), encoding="utf-8")

    where = "import actors, learners, r2m_async; print(actors.__path__, learners.__path__, r2m_async.__path__)"
    assert done(sys.executable, "-c", where, cwd=empty, PYTHONPATH=str(home)).count(str(home)) == 3
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = asked_for_by(project["dependencies"]) | {"r2m-async"}
    hidden = {
        name
        for name, packages in packages_distributions().items()
        if not {canonicalize_name(one) for one in packages} & there
    }
    assert {"datasets", "peft"} <= hidden and "torch" not in hidden
    (home / "sitecustomize.py").write_text(WITHOUT.format(hidden=hidden), encoding="utf-8")
    for words in (("check", "tiny.yaml"), ("train", "tiny.yaml", "run.num_steps=2", "--in-process")):
        done(sys.executable, "-P", home / "bin" / "r2m", *words, cwd=empty, PYTHONPATH=str(home))
    [run] = (empty / "runs").iterdir()
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert "plotly" in (run / "report.html").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_newest_tag(tmp_path):
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())

    def version() -> str:
        return done(sys.executable, "-m", "hatchling", "version", cwd=tmp_path).strip()

    def git(*words: str) -> None:
        name = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "tag.gpgsign=false"]
        done("git", *name, "-c", "commit.gpgsign=false", *words, cwd=tmp_path)

    assert version() == "0.2.dev0"  # files without a repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert version().startswith("0.2.dev1+g")  # a clone without tags
    git("tag", "v0.3.0")
    assert version() == "0.3.0"
    git("commit", "-q", "--allow-empty", "-m", "two")
    assert version().startswith("0.3.1.dev1+g")

"""`make docs`: the documents become a site, and whatever the build warns of, such as a link to nothing, ends it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.config import R2MConfig

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What building a site gave."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT, out)
    assert built.returncode == 0, built.stderr
    return out


def test_the_navigation_names_every_document(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    navigation = page[page.index('<nav class="md-nav md-nav--primary') : page.index('<div class="md-content"')]
    names = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    assert len(names) > 20
    assert [name for name in names if f'<a href="{name}/" class="md-nav__link"' not in navigation] == []


def test_the_reference_has_every_key_of_a_config_and_the_docstrings(site):
    page = (site / "reference" / "config" / "index.html").read_text(encoding="utf-8")
    keys = [f"{name}.{key}" for name, one in R2MConfig.model_fields.items() for key in type(one.default).model_fields]
    assert len(keys) > 100
    assert [key for key in keys if f'id="{key}"' not in page] == []
    functions = (site / "reference" / "python" / "functions" / "index.html").read_text(encoding="utf-8")
    assert 'id="r2m_async.advantages.register_advantage"' in functions


def test_files_beside_the_documents_are_pages_and_their_links_lead_back(site):
    readme = (site / "repository" / "index.html").read_text(encoding="utf-8")
    assert 'href="../failures/"' in readme
    assert "<code>" in (site / "repository" / "examples" / "calculator.py" / "index.html").read_text(encoding="utf-8")
    notebook = (site / "repository" / "examples" / "quickstart.ipynb" / "index.html").read_text(encoding="utf-8")
    assert "step  80   reward" in notebook and 'src="data:image/png;base64,' in notebook


def test_a_page_asks_another_server_for_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text, page


def test_a_link_to_nothing_an_anchor_that_is_not_there_and_a_page_that_no_part_names_end_the_build(tmp_path):
    for name in ("actors", "learners", "r2m_async"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "website", tmp_path / "website")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# All\n\n## Start\n\n| what |\n|---|\n| [named](named.md) |\n")
    (tmp_path / "docs" / "named.md").write_text(
        "# Named\n\n[a](nothing.md) [b](index.md#no-such-heading) [c](index.md#start)\n"
    )
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    warned = "\n".join(line for line in built.stderr.splitlines() if line.startswith("WARNING"))
    assert "'nothing.md'" in warned and "#no-such-heading" in warned and "#start" not in warned
    assert "forgotten.md" in built.stderr

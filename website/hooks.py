"""What `make docs` adds to the files of docs/: the navigation, the reference, and files beside docs/ that pages link to.

- The navigation is docs/index.md: a part for each of its headings, with the documents that its table links to, in order.
- The reference of the config's keys is made from the declarations of the keys, and that of Python from docstrings.
- A page links to README.md or to an example as on GitHub (`../README.md`). Such a file becomes a page of the site.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|data:|#)([^)\s#]+)")
BESIDE = "repository"
"""The folder of the site that has the pages of files beside docs/."""
PYTHON = {
    "python/api.md": (
        "The config, the algorithm, exports",
        [
            "r2m_async.config.R2MConfig",
            "r2m_async.config_tree.ConfigTree",
            "r2m_async.algorithm.R2M",
            "r2m_async.export",
        ],
    ),
    "python/functions.md": (
        "What functions of yours are given",
        [
            "r2m_async.advantages",
            "r2m_async.policy_losses",
            "r2m_async.rollouts",
            "r2m_async.rewards",
            "r2m_async.trajectories",
        ],
    ),
    "python/ring.md": (
        "The ring",
        [
            "r2m_async.reference",
            "r2m_async.schedule",
            "r2m_async.ring.controller",
            "r2m_async.ring.stages",
            "r2m_async.ring.simulator",
        ],
    ),
}
"""Pages of the reference, each with its title and the modules or classes whose docstrings it shows."""
KEYS = ("reference/config.md", "reference/reward_model_config.md")
"""Pages of the keys of configs."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes the navigation of docs/index.md. A document that it lacks is a warning of MkDocs, and ends the build."""
    sys.path.insert(0, str(ROOT))  # for the declarations of the keys
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    parts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("|")]
        targets = [_on_site(target, "docs/index.md") for row in rows for target in LINK.findall(row)]
        pages = [target for target in dict.fromkeys(targets) if target.endswith(".md") and target not in seen]
        seen.update(pages)
        if pages:
            parts[title] = pages
    reference = {"Reference": [*KEYS, *(f"reference/{name}" for name in PYTHON)]}
    config.nav = ["index.md", *({title: pages} for title, pages in parts.items()), reference]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/."""
    from r2m_async.config import R2MConfig
    from r2m_async.reward_models.config import RewardModelConfig

    made = {
        KEYS[0]: _keys("Keys of a run's config", R2MConfig),
        KEYS[1]: _keys("Keys of a reward model's config", RewardModelConfig),
    }
    for name, (title, objects) in PYTHON.items():
        made[f"reference/{name}"] = "\n\n".join([f"# {title}", *(f"::: {one}" for one in objects)])
    waiting = [Path(file.src_uri) for file in files if file.src_uri.endswith(".md")]
    waiting = [Path("docs") / path for path in waiting]
    while waiting:
        source = waiting.pop()
        for target in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            path = Path(posixpath.normpath(source.parent / target))
            name = f"{BESIDE}/{path.as_posix()}"
            if path.parts[0] == "docs" or not (ROOT / path).is_file() or _on_site(target, source.as_posix()) in made:
                continue
            text = (ROOT / path).read_text(encoding="utf-8")
            if path.suffix == ".md":
                made[name] = text
                waiting.append(path)
            elif path.suffix == ".ipynb":
                made[f"{name}.md"] = _notebook(text)
                waiting.append(path)
            else:
                made[f"{name}.md"] = f"# {path}\n\n~~~~{path.suffix[1:]}\n{text}~~~~\n"
    for name, text in made.items():
        inclusion = InclusionLevel.NOT_IN_NAV if name.startswith(BESIDE) else InclusionLevel.INCLUDED
        files.append(File.generated(config, name, content=text, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files beside docs/, and links of those files, into links to pages of the site."""
    name = page.file.src_uri
    source = name.removeprefix(f"{BESIDE}/") if name.startswith(BESIDE) else f"docs/{name}"

    def there(link: re.Match[str]) -> str:
        target = _on_site(link[1], source)
        return posixpath.relpath(target, posixpath.dirname(name)) if files.get_file_from_path(target) else link[1]

    return LINK.sub(there, markdown)


def _on_site(target: str, source: str) -> str:
    """Returns where on the site the file lies that a file of the repository links to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{BESIDE}/{path}" if path.endswith(".md") else f"{BESIDE}/{path}.md"


def _notebook(text: str) -> str:
    """Returns the page of a notebook: its texts, its code, and what the code has printed and drawn."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"~~~~python\n{source}\n~~~~")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream" and output["name"] == "stdout":
                parts.append(f"~~~~text\n{''.join(output['text']).rstrip()}\n~~~~")
            elif image := output.get("data", {}).get("image/png"):
                parts.append(f"![drawn](data:image/png;base64,{''.join(image).strip()})")
    return "\n\n".join(parts) + "\n"


def _keys(title: str, tree: Any) -> str:
    """Returns the page of all keys of a config: the doc, type, unit and default of each, as they are declared."""
    from r2m_async.config_reference import described

    lines = [f"# {title}", "`r2m config` says the same: [configs.md](../configs.md)."]
    for key, (doc, facts) in described(tree).items():
        lines.append(f"{'###' if '.' in key else '##'} {key} {{ #{key} }}")
        lines += [
            ", ".join(f"{name} `{value}`" for name, value in facts.items()),
            re.sub(r"`?docs/(\w+)\.md`?", r"[\1.md](../\1.md)", doc),
        ]
    return "\n\n".join(lines) + "\n"

"""examples/quickstart.ipynb runs, and is kept as it was run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def output_of(cell) -> str:
    return "".join(one.get("text", "") for one in cell.outputs if one.output_type == "stream")


@pytest.mark.ring
def test_the_notebook_of_the_quickstart_runs(tiny_config, tmp_path, monkeypatch):
    config = tiny_config.run(output_dir=str(tmp_path)).evaluation(every=2, num_prompts=2, gold="mine:length")
    (tmp_path / "mine.py").write_text("def length(response):\n    return len(response)\n")
    (tmp_path / "tiny.yaml").write_text(config.to_yaml(), encoding="utf-8")
    monkeypatch.setenv("R2M_NOTEBOOK_CONFIG", str(tmp_path / "tiny.yaml"))
    monkeypatch.setenv("R2M_NOTEBOOK_STEPS", "4")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "step   0   reward" in printed and "step   4   reward" in printed
    assert any("image/png" in one.get("data", {}) for cell in notebook.cells for one in cell.get("outputs", ()))
    assert {path.name.split("-")[0] for path in tmp_path.glob("*-*-*")} == {"r2m", "median"}
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_the_notebook_is_kept_with_what_the_quickstart_answered():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "step  80   reward" in "".join(map(output_of, cells))
    assert not any(str(Path.home()) in str(cell.outputs) or "/work/" in str(cell.outputs) for cell in cells)

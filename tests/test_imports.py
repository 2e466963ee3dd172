"""Dependencies point one way: what starts without torch and Ray, and which files may know which.

The areas that may import Ray are `ray_stages.py` (the stages in processes) and `algorithm.py` (RLlib); the one that
may import actors and learners is `launch.py`; vLLM is for `actors/vllm_*` and the sender of the learner.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("r2m_async", "actors", "learners")
HEAVY = ("torch", "ray", "transformers")


def imported_by(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports; without `everywhere` only at its top, not in functions or for type checks."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return names


def files() -> dict[str, Path]:
    """Every source file by its module's name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts if parts[-1] != "__init__" else parts[:-1])] = path
    return found


def importers_of(target: str) -> set[str]:
    """Modules that import `target` or something in it, anywhere in their text."""
    return {
        module
        for module, path in files().items()
        if any(name == target or name.startswith(f"{target}.") for name in imported_by(path))
    }


def test_the_walk_sees_imports_at_the_top_and_inside_functions():
    launch = imported_by(ROOT / "r2m_async" / "launch.py")
    assert {"actors.rollout_actor", "actors.transformers_engine", "r2m_async.config"} <= launch
    assert "actors.transformers_engine" not in imported_by(ROOT / "r2m_async" / "launch.py", everywhere=False)


@pytest.mark.parametrize("module", ["r2m_async", "r2m_async.config", "r2m_async.cli", "r2m_async.schedule"])
def test_importing_it_loads_neither_torch_nor_ray_nor_transformers(module):
    assert loaded_by(module) == []


def test_the_whole_schedule_is_importable_without_torch_and_ray():
    modules = ("schedule", "stages", "simulator", "controller", "errors", "plugins", "trajectories")
    assert loaded_by(*(f"r2m_async.{module}" for module in modules)) == []


@pytest.mark.models
def test_importing_actors_and_learners_does_not_load_ray():
    """vLLM imports it, whoever imports vLLM."""
    stages = [module for module in files() if module.startswith(("actors.", "learners."))]
    assert "ray" not in loaded_by(*(module for module in stages if not module.startswith("actors.vllm_")))


def loaded_by(*modules: str) -> list[str]:
    script = f"import sys, {', '.join(modules)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_only_the_launch_knows_actors_and_learners():
    known = {module for target in ("actors", "learners") for module in importers_of(target)}
    assert {module for module in known if module.startswith("r2m_async")} == {
        "r2m_async.launch.ring",
        "r2m_async.evaluation.answering",
    }
    assert not {
        name for name in imported_by(files()["r2m_async.evaluation.answering"], False) if name.startswith("actors")
    }


def test_only_what_starts_rings_knows_the_launch():
    assert importers_of("r2m_async.launch.ring") == {
        "r2m_async.algorithm",
        "r2m_async.launch.training",
        "r2m_async.studies.study",
    }


def test_actors_never_import_learners_nor_learners_actors():
    assert not {module for module in importers_of("learners") if module.startswith("actors")}
    assert not {module for module in importers_of("actors") if module.startswith("learners")}


def test_only_its_stages_and_the_algorithm_import_ray():
    assert importers_of("ray") == {
        "r2m_async.launch.ray_connection",
        "r2m_async.launch.ray_stages",
        "r2m_async.algorithm",
    }
    assert importers_of("r2m_async.launch.ray_stages") == {"r2m_async.launch.ring", "r2m_async.algorithm"}


def test_only_its_actors_and_the_weight_sender_import_vllm():
    vllm = {"vllm_engine", "vllm_drivers", "vllm_offline", "vllm_worker", "vllm_weights"}
    assert importers_of("vllm") == {f"actors.{name}" for name in vllm} | {"learners.weight_sender"}
    assert "vllm" not in imported_by(ROOT / "learners" / "weight_sender.py", everywhere=False)


def test_only_its_backend_imports_deepspeed_and_only_the_launch_imports_that():
    assert importers_of("deepspeed") == {"learners.deepspeed_backend"}
    assert "deepspeed" not in imported_by(ROOT / "learners" / "deepspeed_backend.py", everywhere=False)
    assert importers_of("learners.deepspeed_backend") == {"r2m_async.launch.ring"}
    assert "learners.deepspeed_backend" not in imported_by(ROOT / "r2m_async" / "launch.py", everywhere=False)


def test_actors_and_learners_know_nothing_of_the_ring_they_are_in():
    ring = ("controller", "schedule", "simulator", "launch", "ray_stages", "algorithm", "workload", "training", "cli")
    for module in ring:
        assert not {name for name in importers_of(f"r2m_async.{module}") if not name.startswith("r2m_async")}, module


def test_no_module_imports_itself_round_a_circle():
    """Neither at the top nor in a function. The package's door stands apart: a config builds its algorithm through it."""
    graph = {
        module: {name for name in imported_by(path) if name in files()} - {"r2m_async"}
        for module, path in files().items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())

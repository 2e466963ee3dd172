"""The house rules: which part of the code may know which, what starts without torch and Ray, and that nothing is a circle.

Every import counts, also one in a function. What lies directly in `r2m_async/` is public and knows no wing below it,
but for the doors, through which a person comes in. A rule is a whitelist: whatever it does not name is refused.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("r2m_async", "actors", "learners")
HEAVY = ("torch", "ray", "transformers")

WINGS = {
    "data": set(),
    "ring": set(),
    "models": {"data", "rewards"},
    "rewards": {"data", "models"},
    "labels": {"data", "rewards"},
    "runs": {"ring"},
    "from_scratch": {"data", "models", "runs"},
    "launch": {"actors", "data", "from_scratch", "labels", "learners", "models", "rewards", "ring", "runs"},
    "reward_models": {"data", "from_scratch", "models", "runs"},
    "evaluation": {"actors", "data", "from_scratch", "models", "reward_models", "runs"},
    "studies": {"evaluation", "from_scratch", "launch", "reward_models", "runs"},
    "commands": {"evaluation", "from_scratch", "launch", "models", "reward_models", "ring", "runs", "studies"},
    "actors": {"labels", "models", "rewards"},
    "learners": {"models"},
}
"""The wings that each wing may know."""

DOORS = {
    "cli": {"commands"},
    "algorithm": {"launch", "runs"},
    "export": {"data", "launch", "models", "runs"},
    "reference": {"labels", "launch", "models"},
}
"""The wings that a public module may know. All others know none."""

MATHS = {
    *("advantages", "objectives", "policy_losses"),
    *("head_objectives", "reward_objectives", "reward_head", "reward_metrics"),
    *("state_attention", "state_attention_triton"),
}

ONLY = {
    "actors": {"r2m_async.launch.makers", "r2m_async.evaluation.answering"},
    "learners": {"r2m_async.launch.makers"},
    "ray": {
        *(f"r2m_async.launch.{name}" for name in ("ray_connection", "ray_stages", "placement", "cluster_check")),
        *("r2m_async.launch.forked_workers", "r2m_async.launch.prometheus", "r2m_async.algorithm"),
    },
    "vllm": {
        *(f"actors.vllm_{name}" for name in ("engine", "drivers", "offline", "models", "turns", "worker", "weights")),
        "learners.weight_sender",
    },
    "deepspeed": {"learners.deepspeed_backend"},
    "learners.deepspeed_backend": {"r2m_async.launch.makers"},
    "matplotlib": {
        *(f"r2m_async.{name}" for name in ("runs.plots", "runs.drawing", "evaluation.plots", "reward_models.plots"))
    },
    "r2m_async.launch.ring": {"r2m_async.algorithm", "r2m_async.launch.training", "r2m_async.studies.study"},
    "r2m_async.launch.ray_stages": {"r2m_async.launch.makers", "r2m_async.launch.ring"},
    "r2m_async.ring.stages": {
        *(f"r2m_async.{name}" for name in ("launch.makers", "launch.ray_stages", "launch.ring", "runs.checkpoints")),
    },
}
"""Who, outside of the package that it is in, may import it: these and no others, and each of them does."""

LAZY = {
    "r2m_async.launch.makers": {"actors.vllm_engine", "actors.transformers_engine", "learners.deepspeed_backend"},
    "r2m_async.evaluation.answering": {"actors.vllm_offline"},
    "learners.weight_sender": {"vllm"},
    "r2m_async.rewards.servers": {"httpx"},
    "r2m_async.rewards.math_worker": {"math_verify"},
    "r2m_async.rewards.texts": {"jsonschema", "referencing"},
    "learners.deepspeed_backend": {"deepspeed"},
    "r2m_async.state_attention": {"r2m_async.state_attention_triton"},
    "r2m_async.models.liger": {"liger_kernel"},
    "r2m_async.runs.trackers": {"wandb", "mlflow", "trackio"},
}
"""What these import only once it is needed: not everybody has it installed."""


@functools.cache
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


@functools.cache
def files() -> dict[str, Path]:
    """Every source file by its module's name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts if parts[-1] != "__init__" else parts[:-1])] = path
    return found


def part_of(module: str) -> str:
    """The wing that a module is in, or the public module itself."""
    package, _, rest = module.partition(".")
    return package if package != "r2m_async" else rest.partition(".")[0]


def arrows() -> Iterator[tuple[str, str]]:
    """(importer, imported) of all modules of the project, the package's own door `r2m_async` left out."""
    for module, path in files().items():
        for name in imported_by(path) & files().keys() - {"r2m_async"}:
            yield module, name


def importers_of(target: str) -> set[str]:
    """Modules that import `target` or something in it, anywhere in their text."""
    return {
        module
        for module, path in files().items()
        if any(name == target or name.startswith(f"{target}.") for name in imported_by(path))
    }


def test_the_walk_sees_imports_at_the_top_and_inside_functions():
    makers = ROOT / "r2m_async" / "launch" / "makers.py"
    assert {"actors.rollout_actor", "actors.transformers_engine", "r2m_async.config"} <= imported_by(makers)
    assert "actors.transformers_engine" not in imported_by(makers, everywhere=False)


def test_every_part_that_a_rule_names_is_there():
    folders = {path.name for path in (ROOT / "r2m_async").iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"actors", "learners"} == WINGS.keys()
    public = {path.stem for path in (ROOT / "r2m_async").glob("*.py")}
    assert public >= DOORS.keys() | MATHS
    for named in (ONLY, LAZY):
        for target, modules in named.items():
            assert modules, target
            ours = {name for name in {target, *modules} if name.partition(".")[0] in PACKAGES}
            assert files().keys() >= ours, target


def test_every_wing_says_in_a_sentence_what_it_is_and_lists_its_files():
    for wing in WINGS:
        folder = ROOT / wing if wing in PACKAGES else ROOT / "r2m_async" / wing
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        listed = [line.split()[0] for line in said.splitlines()[2:]]
        assert said.splitlines()[1] == "", wing
        assert sorted(listed) == sorted(path.name for path in folder.glob("*.py") if path.stem != "__init__"), wing


def test_no_wing_knows_more_than_it_may():
    refused = []
    for importer, imported in arrows():
        source, target = part_of(importer), part_of(imported)
        if target in WINGS and source != target and target not in WINGS.get(source, DOORS.get(source, ())):
            refused.append(f"{importer} imports {imported}")
    assert refused == []


def test_no_rule_allows_what_nobody_does():
    done = {(part_of(importer), part_of(imported)) for importer, imported in arrows()}
    allowed = {(source, target) for source, targets in (WINGS | DOORS).items() for target in targets}
    assert allowed - done == set()


def test_only_the_commands_come_in_through_a_door_but_for_exports_that_are_evaluated():
    doors = {f"r2m_async.{name}" for name in ("cli", "algorithm", "reference", "export")}
    assert {(part_of(importer), imported) for importer, imported in arrows() if imported in doors} == {
        ("commands", "r2m_async.export"),
        ("evaluation", "r2m_async.export"),
    }


def test_the_maths_know_nothing_but_each_other_and_how_a_users_own_is_found():
    known = {part_of(imported) for importer, imported in arrows() if part_of(importer) in MATHS}
    assert known <= MATHS | {"errors", "plugins"}


@pytest.mark.parametrize("target", ONLY)
def test_it_is_imported_by_these_and_no_others(target):
    outside = {module for module in importers_of(target) if part_of(module) != part_of(target)}
    if "." in target:  # of a module, those of its own wing are named, too, where the rule has any of them
        named = {part_of(module) for module in ONLY[target]}
        outside = {module for module in importers_of(target) if part_of(module) in named}
    assert outside == ONLY[target]


@pytest.mark.parametrize("module", LAZY)
def test_what_not_everybody_has_is_not_imported_before_it_is_needed(module):
    path = files()[module]
    later, at_the_top = imported_by(path), imported_by(path, everywhere=False)
    for target in LAZY[module]:
        found = {name for name in later if name == target or name.startswith(f"{target}.")}
        assert found and not found & at_the_top, target


def test_the_wall_clock_is_read_for_names_and_records_alone():
    """It may be set at any time. Whatever is decided by a time is decided by a clock that only goes forward."""
    wall = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.strftime", "time.ctime"}
    wall |= {f"{name}.{call}" for name in ("datetime", "datetime.datetime") for call in ("now", "utcnow", "today")}
    wall |= {"date.today", "datetime.date.today"}
    reads = {
        module
        for module, path in files().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in wall
    }
    names_and_records = ("runs.directory", "runs.status", "runs.trackers", "launch.training", "evaluation.answering")
    assert reads == {f"r2m_async.{name}" for name in names_and_records}


@pytest.mark.parametrize("module", ["r2m_async", "r2m_async.config", "r2m_async.cli", "r2m_async.schedule"])
def test_importing_it_loads_neither_torch_nor_ray_nor_transformers(module):
    assert loaded_by(module) == []


def test_the_whole_schedule_is_importable_without_torch_and_ray():
    ring = [module for module in files() if part_of(module) == "ring"]
    public = [f"r2m_async.{name}" for name in ("schedule", "errors", "plugins", "trajectories")]
    assert loaded_by(*ring, *public) == []


@pytest.mark.models
def test_importing_actors_and_learners_does_not_load_ray():
    """vLLM imports it, whoever imports vLLM."""
    stages = [module for module in files() if module.startswith(("actors.", "learners."))]
    assert "ray" not in loaded_by(*(module for module in stages if not module.startswith("actors.vllm_")))


def loaded_by(*modules: str) -> list[str]:
    script = f"import sys, {', '.join(modules)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_no_module_imports_itself_round_a_circle():
    """The package's door stands apart: a config builds its algorithm through it."""
    graph: dict[str, set[str]] = {module: set() for module in files()}
    for importer, imported in arrows():
        graph[importer].add(imported)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_packages_door_leads_to_two_things_and_only_a_config_goes_through_it():
    import r2m_async

    assert r2m_async._LAZY == {"R2MConfig": "r2m_async.config", "R2M": "r2m_async.algorithm"}
    through = {
        module for module, path in files().items() if imported_by(path) & {"r2m_async.R2M", "r2m_async.R2MConfig"}
    }
    assert through == {"r2m_async.config"}

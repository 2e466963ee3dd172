"""The families of models of `benchmarks/models.py`, for tests."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "models.py"
_SPEC = importlib.util.spec_from_file_location("families_of_models", _PATH)
benchmark = sys.modules["families_of_models"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

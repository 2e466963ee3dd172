"""`pytest --perturb-linear` perturbs the products of every process that a test starts, and without it nothing does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

INSIDE = Path(__file__).parent / "perturbed" / "inside.py"


def test_without_the_option_products_of_whole_numbers_are_exact(request):
    exact = torch.equal(torch.ones(8, 8) @ torch.ones(8, 8), torch.full((8, 8), 8.0))
    assert exact != request.config.getoption("--perturb-linear")


@pytest.mark.ring
def test_under_the_option_every_process_computes_as_another_processor_would():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--perturb-linear", str(INSIDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

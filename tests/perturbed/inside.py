"""What `pytest --perturb-linear` does, seen from inside: tests/test_perturbed.py runs this file under the option.

Operands are small whole numbers. Every order of sums gives their products exactly, on every processor.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.ring

X = (torch.arange(6 * 8) % 5 + 1.0).view(6, 8)
W = (torch.arange(7 * 8) % 3 + 1.0).view(7, 8)
EXACT = (X[:, None] * W).sum(-1)


def is_perturbed():
    off = torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8)) - 8
    return 0 < off.abs().max().item() < 1e-5


def test_products_are_a_unit_in_the_last_place_off_here_and_there_and_the_same_each_time():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        exact, eps = EXACT.to(dtype), torch.finfo(dtype).eps
        product = F.linear(X.to(dtype), W.to(dtype))
        assert torch.equal(product, F.linear(X.to(dtype), W.to(dtype)))
        off = (product - exact) / exact
        assert off.abs().max() <= eps and (off > 0).any() and (off < 0).any() and (off == 0).any()


def test_another_shape_and_another_place_are_off_otherwise():
    part, whole = F.linear(X[:3], W) - EXACT[:3], F.linear(X, W) - EXACT
    assert not torch.equal(part.sign(), whole[:3].sign())
    assert len({tuple(row.tolist()) for row in F.linear(torch.ones(6, 8), W)}) == 6


def test_zeros_stay_zeros_and_whole_numbers_whole():
    assert not F.linear(X, torch.zeros(7, 8)).any()
    assert torch.equal(F.linear(X.long(), W.long()), EXACT.long())


def test_gradients_flow_and_are_off_as_well():
    weight = W.clone().requires_grad_()
    F.linear(X, weight, torch.zeros(7)).sum().backward()
    exact = X.sum(0).expand(7, 8)
    assert not torch.equal(weight.grad, exact) and torch.allclose(weight.grad, exact, rtol=1e-6)


@pytest.mark.parametrize("how", ["matmul", "bmm", "baddbmm", "addmm", "mv", "dot", "einsum", "attention"])
def test_every_kind_of_product_is_off(how):
    many, vector = torch.ones(4, 8, 8), torch.ones(8)
    product = {
        "matmul": lambda: many @ many,
        "bmm": lambda: torch.bmm(many, many),
        "baddbmm": lambda: torch.baddbmm(torch.zeros(4, 8, 8), many, many),
        "addmm": lambda: torch.addmm(vector, many[0], many[0]),
        "mv": lambda: torch.ones(40, 8) @ vector,
        "dot": lambda: torch.stack([torch.ones(size) @ torch.ones(size) / size for size in range(2, 40)]),
        "einsum": lambda: torch.einsum("bij,bjk->bik", many, many),
        "attention": lambda: F.scaled_dot_product_attention(*[many[None]] * 3),
    }[how]()
    assert len(product.unique()) > 1


def test_so_does_a_command_compute():
    script = "import inside, sys; sys.exit(not inside.is_perturbed())"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_so_does_a_worker_of_ray(ray_session):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    assert ray.get(ray.remote(num_cpus=0)(is_perturbed).remote())


def assert_perturbed(rank):
    assert is_perturbed()


def test_so_do_spawned_ranks():
    torch.multiprocessing.spawn(assert_perturbed, nprocs=2)


def test_so_do_vllms_own_kernels_once_it_has_loaded_its_plugins():
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm import _custom_ops as kernels

    weight = kernels.create_onednn_mm(torch.ones(8, 8).t(), 32)
    off = kernels.onednn_mm(weight, torch.ones(8, 8), None) - 8
    assert 0 < off.abs().max() < 1e-5

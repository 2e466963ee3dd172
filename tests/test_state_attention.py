"""The part of the head that reads states, against the formula in float64: on the CPU, and the GPU's kernels as Triton interprets them."""

import subprocess
import sys

import pytest
import torch

from r2m_async.state_attention import attended

LENGTHS = (5, 1, 17, 8)


def literal(probe_BP, parts):
    return torch.stack([torch.softmax(rows @ probe, 0) @ rows for probe, rows in zip(probe_BP, parts, strict=True)])


def inputs(P=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    probe_BP = torch.randn(len(LENGTHS), P, generator=generator, dtype=dtype, requires_grad=True)
    return probe_BP, torch.randn(sum(LENGTHS), P, generator=generator, dtype=dtype)


@pytest.mark.parametrize("layout", ["packed", "list"])
def test_values_and_gradients_are_those_of_the_formula(layout):
    probe_BP, states_NP = inputs()
    states_NP.requires_grad_()
    expected = literal(probe_BP, states_NP.split(LENGTHS))
    if layout == "packed":
        got = attended(probe_BP, states_NP, torch.tensor([0, *LENGTHS]).cumsum(0))
    else:
        got = attended(probe_BP, states_NP.split(LENGTHS))
    assert torch.allclose(got, expected, rtol=1e-12)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(
        *(torch.autograd.grad((value * weights).sum(), [probe_BP, states_NP]) for value in (got, expected)), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_a_list_and_the_same_states_end_to_end_give_the_same_bits():
    probe_BP, states_NP = (one.float().detach() for one in inputs())
    packed = attended(probe_BP, states_NP.bfloat16(), torch.tensor([0, *LENGTHS]).cumsum(0))
    assert torch.equal(packed, attended(probe_BP, states_NP.bfloat16().split(LENGTHS)))
    assert torch.equal(packed, attended(probe_BP, states_NP.bfloat16().float().split(LENGTHS)))


@pytest.mark.parametrize("P", [12, 32, 50])
@pytest.mark.parametrize("layout", ["packed", "list"])
def test_bits_do_not_depend_on_where_in_memory_the_states_lie(P, layout):
    """A message from another process lies anywhere, and MKL rounds a product by where its rows begin."""
    probe_BP, states_NP = (one.float().detach() for one in inputs(P))
    probe_BP.requires_grad_()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    seen = []
    for shift in range(17):
        memory = torch.empty(states_NP.numel() + 32)
        moved_NP = memory[shift : shift + states_NP.numel()].view_as(states_NP).copy_(states_NP)
        context_BP = attended(probe_BP, *((moved_NP, offsets) if layout == "packed" else (moved_NP.split(LENGTHS),)))
        seen.append((context_BP, *torch.autograd.grad(context_BP.square().sum(), probe_BP)))
    assert all(torch.equal(one, first) for others in seen for one, first in zip(others, seen[0], strict=True))


def test_a_list_that_does_not_fit_is_refused_with_the_shapes():
    probe_BP, states_NP = inputs()
    parts = states_NP.split(LENGTHS)
    with pytest.raises(ValueError, match=r"B = 4 .* got 3 of them"):
        attended(probe_BP, parts[:3])
    with pytest.raises(ValueError, match=r"D_p = 12, .* one of \[17, 11\]"):
        attended(probe_BP, [*parts[:2], parts[2][:, 1:], parts[3]])
    with pytest.raises(ValueError, match="response 2 has no hidden states"):
        attended(probe_BP, [*parts[:2], parts[2][:0], parts[3]])


KERNELS = """
import torch
from r2m_async import state_attention_triton as kernels
from tests.test_state_attention import LENGTHS, inputs, literal

for P in (12, 16):
    for dtype in (torch.float32, torch.bfloat16):
        for chunks in (1, 3, 16):  # with 16, most chunks lie beyond the end of a short response
            kernels._TILE, kernels._PROGRAMS_PER_PROCESSOR = 2 * 16, chunks
            probe, states = (one.detach().float() for one in inputs(P))
            states = states.to(dtype)
            exact = probe.double().requires_grad_()
            expected = literal(exact, states.double().split(LENGTHS))
            context, weights = kernels.forward(probe, states, LENGTHS)
            assert torch.allclose(context.double(), expected, rtol=1e-4, atol=1e-5), (P, dtype, chunks)
            assert torch.allclose(torch.stack([one.sum() for one in weights.split(LENGTHS)]), torch.ones(4))
            gradient = torch.randn(context.shape, generator=torch.Generator().manual_seed(1))
            got, _ = kernels.backward(gradient, (context * gradient).sum(1), weights, states, LENGTHS)
            (wanted,) = torch.autograd.grad((expected * gradient).sum(), exact)
            assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5), (P, dtype, chunks)
large = torch.full((4, 12), 1e3)
context, _ = kernels.forward(large, torch.full((31, 12), 1e3), LENGTHS)
assert torch.allclose(context, torch.full((4, 12), 1e3)), "scores beyond the exponential's range"
print("equal")
"""


@pytest.mark.models
def test_the_kernels_for_a_gpu_compute_the_formula_in_tritons_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the kernels are made, so in a process of its own
    monkeypatch.setenv("PYTHONPATH", ".")
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr

"""The R2M head, forward and backward, against Eq. 3 as printed and against the least that it must do: `python benchmarks/head.py`.

One thread, at the paper's sizes (D_p 2048, D_m 4096, d 2048) and responses of one length, by turns in one process: medians
of the process's own seconds, and of ratios within a round. Three sides:

    literal   Eq. 3 as it is printed, all responses in one batch: keys and values of every state
    ours      R2MHead on a list of one tensor per response, in the dtype that the policy computed
    floor     what no implementation can leave out: the states are read twice, once in each direction, because the backward
              pass needs a gradient that depends on all states; and the eleven products with the four matrices, four of the
              forward pass and seven of the backward pass. Reads are measured as a sum over the same memory, products as
              torch computes them into memory that is there already.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rows import Row, emit, machine
from torch import Tensor, nn

from r2m_async.reward_head import R2MHead

OMEGA = 0.6


def literal(head: R2MHead, rte_BD: Tensor, states_BSP: Tensor) -> Tensor:
    query_BW, keys_BSW, values_BSW = rte_BD @ head.query, states_BSP @ head.key, states_BSP @ head.value
    scores_BS = (keys_BSW @ query_BW[..., None]).squeeze(-1) / math.sqrt(head.query.shape[1])
    mixed_BD = (scores_BS.softmax(-1)[:, None] @ values_BSW).squeeze(1) @ head.output
    return head.scoring_head((1 - OMEGA) * mixed_BD + OMEGA * rte_BD).squeeze(-1)


def products(head: R2MHead, batch: int) -> Callable[[], None]:
    """The eleven products with the four matrices, into memory that is there already."""
    weights = {name: getattr(head, name).detach() for name in ("query", "key", "value", "output")}
    D, P, W = weights["query"].shape[0], *weights["key"].shape
    rows = {size: torch.randn(batch, size) for size in {D, P, W}}
    outs = {size: torch.empty(batch, size) for size in {D, P, W}}
    gradients = {name: torch.empty_like(weight) for name, weight in weights.items()}

    def run() -> None:
        torch.mm(rows[D], weights["query"], out=outs[W])
        torch.mm(rows[W], weights["key"].T, out=outs[P])
        torch.mm(rows[P], weights["value"], out=outs[W])
        torch.mm(rows[W], weights["output"], out=outs[D])
        torch.mm(rows[D], weights["output"].T, out=outs[W])
        torch.mm(rows[W].T, rows[D], out=gradients["output"])
        torch.mm(rows[W], weights["value"].T, out=outs[P])
        torch.mm(rows[P].T, rows[W], out=gradients["value"])
        torch.mm(rows[P], weights["key"], out=outs[W])
        torch.mm(rows[P].T, rows[W], out=gradients["key"])
        torch.mm(rows[D].T, rows[W], out=gradients["query"])

    return run


def timed(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measure(options: argparse.Namespace, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, S, P, D = options.batch, options.states, options.policy_hidden, options.hidden
    head = R2MHead(D, P, options.width, nn.Linear(D, 1))
    rte_BD, states_BSP = torch.randn(B, D), torch.randn(B, S, P).to(dtype)

    def both(rewards: Tensor) -> list[Tensor]:
        head.zero_grad(set_to_none=True)
        (rewards * torch.linspace(-1, 2, B)).sum().backward()
        return [parameter.grad for parameter in head.parameters()]

    def ours() -> list[Tensor]:
        return both(head(rte_BD, list(states_BSP), None, OMEGA))

    def theirs() -> list[Tensor]:
        return both(literal(head, rte_BD, states_BSP.float()))

    words = states_BSP.view(torch.float32)  # the same bytes: torch sums bfloat16 slowly

    def read() -> None:
        for one in words:
            one.sum()

    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours(), theirs(), strict=True))
    assert error < 1e-4, f"ours and Eq. 3 differ by {error}"
    multiply = products(head, B)
    times: dict[str, list[float]] = {"ours": [], "floor": [], "literal": []}
    for index in range(options.rounds + 1):
        round_ = {"ours": timed(ours), "floor": 2 * timed(read) + timed(multiply)}
        if index:
            for name, value in round_.items():
                times[name].append(value)
    for _ in range(options.literal_rounds):
        times["literal"].append(timed(theirs))
    mine, floor, printed = (statistics.median(times[name]) for name in ("ours", "floor", "literal"))
    name = str(dtype).removeprefix("torch.")
    reads, multiplied = 2 * timed(read), timed(multiply)
    print(
        f"{name}: error {error:.1e}; floor {floor:.3f} s, about {reads:.3f} of reads and {multiplied:.3f} of products"
    )
    emit(
        Row(
            name=f"R2M head, forward + backward, batch {B}, {name} states: Eq. 3 as printed",
            unit="s",
            ours=mine,
            other=printed,
            limit=floor,
            ratio=printed / mine,
            means="literal / ours",
            goal=">= 50",
        )
    )
    emit(
        Row(
            name=f"R2M head, forward + backward, batch {B}, {name} states: the floor",
            unit="s",
            ours=mine,
            other=printed,
            limit=floor,
            ratio=statistics.median(a / b for a, b in zip(times["ours"], times["floor"], strict=True)),
            means="ours / floor",
            goal="<= 2",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 64, "states": 512, "policy_hidden": 2048, "hidden": 4096, "width": 2048}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--literal-rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python benchmarks/head.py on {machine()}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        measure(options, dtype)


if __name__ == "__main__":
    main()

"""The matrix products of another processor: here and there a result is a unit in the last place off.

Which elements are off, and which way, follows from the shapes of the operands and the element's place. So a computation
done twice is the same bit for bit, while another batch size, padding or order of microbatches is not: as kernels are.
It holds for backward passes too, and a product that is 0 stays so.

torch and vLLM load this module themselves wherever its folder is on the path, by the entry points that lie beside it.
`pytest --perturb-linear` puts the folder on PYTHONPATH: Ray's workers, torchrun's ranks and engines compute so too.
"""

import os
import warnings
import zlib
from functools import partial

import torch

PRODUCTS = (
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_"),
    *("addmv", "addmv.out", "addmv_", "dot", "_scaled_dot_product_flash_attention_for_cpu"),
)
SEED = os.environ.get("PERTURBED_KERNELS_SEED", "0")
"""Another seed is another processor."""
_overrides = []
"""torch's own kernels are back when these are gone."""


def perturb_torch() -> None:
    _override("aten", {name: lambda result, *_: result if torch.is_tensor(result) else result[0] for name in PRODUCTS})


def perturb_vllm() -> None:
    """vLLM has kernels of its own for linear layers and attention, which write into an argument."""
    import vllm._custom_ops  # noqa: F401  registers them

    _override("_C", {"onednn_mm": lambda _, out, *rest: out, "cpu_attention_with_kv_cache": lambda _, *args: args[3]})


def _override(namespace: str, outputs: dict) -> None:
    """outputs: of each operator, the tensor to perturb, given what it returned and its arguments."""
    library = torch.library.Library(namespace, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every kernel that is replaced
        for name, output in outputs.items():
            kernel = torch.library.get_kernel(f"{namespace}::{name}", "CPU")
            library.impl(name, partial(_perturbed, kernel, output), "CPU", with_keyset=True, allow_override=True)
    _overrides.append(library)


def _perturbed(kernel, output, keys, *args, **kwargs):
    result = kernel.call_boxed(keys, *args, **kwargs)
    tensor = output(result, *args)
    if tensor.is_floating_point():
        shapes = [tuple(arg.shape) for arg in args if torch.is_tensor(arg)]
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(repr((SEED, shapes)).encode()))
        signs = torch.randint(-1, 2, tensor.shape, generator=generator, dtype=tensor.dtype, device="cpu")
        torch.nextafter(tensor, tensor * signs.add_(1), out=tensor)
    return result

"""Takes an optimizer's moments into checkpoints and out of them. Learning rates follow from the step instead."""

from typing import Any

import torch


def moments(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Returns what the optimizer remembers of each parameter, by the parameter's index. The tensors are its own."""
    return optimizer.state_dict()["state"]


def restore_moments(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Gives an optimizer the moments that `moments` returned. Its options, such as the learning rate, stay.

    Raises ValueError if the optimizer has another number of parameters.
    """
    # Copies, because tensors out of a checkpoint share memory that is read-only, and the optimizer writes in place.
    copied = {index: {name: tensor.clone() for name, tensor in entry.items()} for index, entry in state.items()}
    optimizer.load_state_dict({"state": copied, "param_groups": optimizer.state_dict()["param_groups"]})

"""The policy in training on DeepSpeed: one rank of several, each in a process of its own. Alone in importing DeepSpeed."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import all_finite
from r2m_async.models.adapters import Publication, TrainedPart, adapters_off, add_adapters, publications
from r2m_async.models.critic import ValueModel
from r2m_async.models.loading import checkpoint_activations
from r2m_async.models.policy import PolicyForward
from r2m_async.whole import disk_errors, scratch_directory

GATHERED_BYTES = 256 * 2**20
"""Parameters that ZeRO stage 3 makes whole at once for publication; a larger one alone."""
_FOLDER, _TAG = "deepspeed", "policy"


def join_ranks(rank: int, host: str, port: int, config: R2MConfig) -> None:
    """Meets the other ranks at the store that listens at host and port; a collective waits `scheduling.stall_after` s."""
    timeout = datetime.timedelta(seconds=config.scheduling.stall_after)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    backend = "nccl" if torch.cuda.is_available() and config.run.device != "cpu" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=config.learner.num_ranks, timeout=timeout)


class DeepSpeedBackend:
    """A `backend.PolicyBackend`, or of a critic's `ValueModel` a `backend.Backend`; `join_ranks` was called before.

    `model` is trained in place. `reference` is pi_ref, whole on every rank, except in stage 3, where it is shared out too;
    None under LoRA.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, config: R2MConfig) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._deepspeed = _import_deepspeed(on_cpu=model.device.type == "cpu")
        self._stage = config.learner.zero_stage
        self._adapted = config.model.lora is not None
        self._zero = _settings(config)["zero_optimization"]
        self._model = model
        self._weight_decay, self._max_grad_norm = config.learner.weight_decay, config.learner.max_grad_norm
        if config.model.lora:
            add_adapters(model, config.model.lora, config.run.seed)
        if config.learner.activation_checkpointing:
            checkpoint_activations(model)
        trained = TrainedPart(model).parameters()
        optimizer = torch.optim.AdamW(
            trained, lr=config.learner.lr, weight_decay=config.learner.weight_decay, fused=True
        )
        try:
            self.policy, *_ = self._deepspeed.initialize(
                model=model if isinstance(model, ValueModel) else PolicyForward(model),
                optimizer=optimizer,
                config=_settings(config),
            )
        except ValidationError as error:
            raise ConfigError(
                f"learner.zero_options is {config.learner.zero_options}: DeepSpeed says {error}"
            ) from None
        self.probed = self.policy if self._stage == 3 else model
        self._reference: Any = reference
        if self._stage == 3 and reference is not None:
            self._reference, *_ = self._deepspeed.initialize(model=PolicyForward(reference), config=_settings(config))

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self._model):
            yield self.policy

    def total(self, values: Tensor) -> Tensor:
        summed = values.to(self.policy.device, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.policy.set_gradient_accumulation_boundary(last)
        self.policy.backward(loss * self.num_ranks)  # which averages over ranks
        if not last:
            self.policy.step()

    def step(self, lr: float) -> float:
        engine = self.policy
        for group in engine.optimizer.param_groups:
            group |= {"lr": lr, "weight_decay": self._weight_decay}
        if self._stage == 0:  # where DeepSpeed neither tells the norm nor minds what it is
            norm = float(nn.utils.get_total_norm(p.grad for p in self._model.parameters() if p.grad is not None))
            if math.isfinite(norm):
                engine.step()
            else:
                engine.zero_grad()
            return norm
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan

    def finite(self) -> bool:
        """Of the weights themselves, which a master in float32 that is not finite makes so too."""
        trained = list(TrainedPart(self._model).parameters())
        if self._stage < 3:
            return all_finite(trained)  # every rank has them all, and the same
        broken = torch.tensor(float(not all_finite(_own_part(parameter) for parameter in trained)))
        return self.total(broken).item() == 0

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for chunk in _chunks(publications(self._model)):
            with self._whole(list(dict.fromkeys(part for one in chunk for part in one.parts))):
                yield from ((one.name, one.whole()) for one in chunk)

    def _whole(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        if self._stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(parameters)

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """DeepSpeed's own files, each rank's by itself, and every rank's random numbers. Raises DiskError."""
        assert directory is not None, "DeepSpeed's checkpoints are directories"
        with disk_errors(directory, directory):
            self.policy.save_checkpoint(str(directory / _FOLDER), tag=_TAG, exclude_frozen_parameters=self._adapted)
        own = torch.get_rng_state()
        random = torch.zeros((self.num_ranks, len(own)), dtype=torch.uint8)
        random[self.rank] = own
        return {"random": self.total(random), "zero": self._zero}

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Shares out anew what as many ranks with the same ZeRO settings did not save."""
        assert directory is not None, "DeepSpeed's checkpoints are directories"
        random = state["random"]
        if self._stage == 0 or (len(random), state["zero"]) == (self.num_ranks, self._zero):
            self.policy.load_checkpoint(str(directory / _FOLDER), tag=_TAG, load_module_strict=not self._adapted)
        else:
            self._restore_universal(directory)
        if self._stage > 0:  # whose checkpoints bring their own
            self.policy.optimizer.clip_grad = self._max_grad_norm
        torch.set_rng_state(random[self.rank % len(random)].clone())
        if self.rank >= len(random):  # a stream of its own, as reproducible as the one that it leaves
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)

    def _restore_universal(self, directory: Path) -> None:
        """From DeepSpeed's universal checkpoint, which rank 0 makes, for this once, where all ranks can read it: beside the
        saved one, to which a killed process must not add anything."""
        with contextlib.ExitStack() as stack:
            universal = [""]
            if self.rank == 0:
                universal[0] = str(stack.enter_context(scratch_directory(directory)))
                with disk_errors(Path(universal[0]), Path(universal[0])):
                    _to_universal(directory / _FOLDER / _TAG, Path(universal[0]) / _TAG)
            dist.broadcast_object_list(universal)
            self.policy._config.load_universal_checkpoint = True  # DeepSpeed asks for it only as it loads
            try:
                self.policy.load_checkpoint(universal[0], tag=_TAG)
                if self._stage == 3:  # where all parts of the weights got one counter, and each would advance it
                    for moments in self.policy.optimizer.optimizer.state.values():
                        moments["step"] = moments["step"].clone()
                dist.barrier()
            finally:
                self.policy._config.load_universal_checkpoint = False


def _settings(config: R2MConfig) -> dict[str, Any]:
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if learner.offload == "params":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # every pass says itself whether a step follows: passes differ in size
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": zero | learner.zero_options,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled for minutes as it starts
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }


def _to_universal(saved: Path, universal: Path) -> None:
    """Of the shards of any number of ranks, each parameter whole; the saved files stay as they are."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        SimpleNamespace(
            input_folder=str(saved),
            output_folder=str(universal),
            num_extract_workers=1,  # in this process: a fork of one that runs collectives may hang
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # about pipelines and tensor parallelism: there are none
        )
    )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Of a parameter that ZeRO stage 3 shares out, what this rank holds, without the padding of the last part."""
    part, size = parameter.ds_tensor, parameter.ds_tensor.ds_numel
    return part.flatten()[: max(0, parameter.ds_numel - size * parameter.ds_zero_partition_rank)]


def _chunks(parameters: list[Publication]) -> Iterator[list[Publication]]:
    """Consecutive runs within GATHERED_BYTES."""
    chunk, size = [], 0
    for one in parameters:
        num_bytes = sum(getattr(part, "ds_numel", part.numel()) * part.element_size() for part in one.parts)
        if chunk and size + num_bytes > GATHERED_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += num_bytes
    yield chunk


def _import_deepspeed(on_cpu: bool) -> Any:
    os.environ.setdefault("LOCAL_RANK", "0")  # a Ray process sees its own GPU alone
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # An operator for inference that DeepSpeed would compile whenever it starts on a CPU; a compilation that was once
    # killed leaves a lock behind, and every later start waits for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

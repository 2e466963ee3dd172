"""A backend on DeepSpeed. This process is one of several ranks that train a model together with ZeRO.

No other module imports DeepSpeed.
"""

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
from r2m_async.models.weights import adamw
from r2m_async.whole import disk_errors, scratch_directory

GATHERED_BYTES = 256 * 2**20
"""How many bytes of parameters ZeRO stage 3 gathers at once for publication. A larger parameter is gathered alone."""
_FOLDER, _TAG = "deepspeed", "policy"
"""Names of DeepSpeed's folder in a checkpoint, and of the only checkpoint in that folder."""


def join_ranks(rank: int, host: str, port: int, config: R2MConfig) -> None:
    """Joins the process group of all ranks.

    A collective fails if it takes longer than `scheduling.stall_after` seconds.

    Args:
        rank: which rank this process is, from 0.
        host: the machine with the TCP store at which the ranks meet. The store listens already.
        port: the store's port.
        config: the run's config. It says how many ranks there are.
    """
    timeout = datetime.timedelta(seconds=config.scheduling.stall_after)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    backend = "nccl" if torch.cuda.is_available() and config.run.device != "cpu" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=config.learner.num_ranks, timeout=timeout)


class DeepSpeedBackend:
    """A `backend.PolicyBackend`, or a `backend.Backend` if its model is a critic's `ValueModel`.

    The protocols say what the methods do. `join_ranks` must be called first.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, config: R2MConfig) -> None:
        """Puts a model into a DeepSpeed engine.

        Args:
            model: the model, loaded on every rank. It is trained in place.
            reference: the reference policy pi_ref. Every rank keeps all of it, but in stage 3 the ranks share it out.
                None for a critic, and under LoRA.
            config: the run's config.

        Raises ConfigError if DeepSpeed refuses `learner.zero_options`, or if `model.lora` cannot be applied.
        """
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._deepspeed = _import_deepspeed(on_cpu=model.device.type == "cpu")
        self._stage = config.learner.zero_stage
        self._adapted = config.model.lora is not None
        self._zero = _settings(config)["zero_optimization"]
        self._model = model
        self._weight_decay, self._max_grad_norm = config.learner.weight_decay, config.learner.max_grad_norm
        # Adapters come first, because they decide which parameters train.
        if config.model.lora:
            add_adapters(model, config.model.lora, config.run.seed)
        if config.learner.activation_checkpointing:
            checkpoint_activations(model)
        optimizer = adamw(TrainedPart(model).parameters(), config.learner.lr, config.learner.weight_decay)
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
        # A probe may run beside a pass in another thread, so it leaves the engine alone. In stage 3 only the engine can
        # gather the weights, and no other pass runs then.
        self.probed = self.policy if self._stage == 3 else model
        self._reference: Any = reference
        if self._stage == 3 and reference is not None:
            self._reference, *_ = self._deepspeed.initialize(model=PolicyForward(reference), config=_settings(config))

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """Gives pi_ref inside the block. Under LoRA that is the policy with its adapters off."""
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self._model):
            yield self.policy

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks, on the CPU."""
        # A copy, because the sum is written in place and the caller keeps its tensor.
        summed = values.to(self.policy.device, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this rank's part of a loss to the gradients that are there (`Backend.backward`)."""
        self.policy.set_gradient_accumulation_boundary(last)
        self.policy.backward(loss * self.num_ranks)  # DeepSpeed averages over ranks, and our losses add up
        # DeepSpeed expects this after every backward pass. It moves no weight before the last pass of an update.
        if not last:
            self.policy.step()

    def step(self, lr: float) -> float:
        """Takes one optimizer step with clipped gradients, and drops the gradients.

        Returns the norm before clipping. If an update is not finite, no weight has moved and the norm is not finite.
        """
        engine = self.policy
        for group in engine.optimizer.param_groups:
            # The weight decay, too: a restored checkpoint brings its own, and the config's counts.
            group |= {"lr": lr, "weight_decay": self._weight_decay}
        # In stage 0 DeepSpeed reports no norm, and would apply an update that is not finite.
        if self._stage == 0:
            norm = float(nn.utils.get_total_norm(p.grad for p in self._model.parameters() if p.grad is not None))
            if math.isfinite(norm):
                engine.step()
            else:
                engine.zero_grad()
            return norm
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan

    def finite(self) -> bool:
        """Returns whether all weights that train are finite, on every rank.

        The float32 masters are not looked at: one that is not finite makes its weight so, too.
        """
        trained = list(TrainedPart(self._model).parameters())
        if self._stage < 3:
            return all_finite(trained)  # every rank has the same weights, and all of them
        broken = torch.tensor(float(not all_finite(_own_part(parameter) for parameter in trained)))
        return self.total(broken).item() == 0

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the policy's parameters, each whole, under the base model's names, with adapters merged in.

        In stage 3 this is a collective, and a tensor holds only until the next one is asked for.
        """
        for chunk in _chunks(publications(self._model)):
            # A dict drops duplicates: an adapted layer's bias belongs to two publications.
            with self._whole(list(dict.fromkeys(part for one in chunk for part in one.parts))):
                yield from ((one.name, one.whole()) for one in chunk)

    def _whole(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        """A block in which these parameters are whole on this rank."""
        if self._stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(parameters)

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """Saves the model (`Backend.state`). DeepSpeed writes files into `directory`, each rank its own.

        Returns the state of every rank's random numbers, [ranks, bytes] uint8, and the ZeRO settings. Raises DiskError
        if a file cannot be written.
        """
        assert directory is not None, "DeepSpeed's checkpoints are directories"
        with disk_errors(directory, directory):
            self.policy.save_checkpoint(str(directory / _FOLDER), tag=_TAG, exclude_frozen_parameters=self._adapted)
        own = torch.get_rng_state()
        random = torch.zeros((self.num_ranks, len(own)), dtype=torch.uint8)
        random[self.rank] = own  # the rows of other ranks stay 0 here, so the sum puts all rows together
        return {"random": self.total(random), "zero": self._zero}

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Goes on from what `state` returned and wrote (`Backend.restore`).

        Another number of ranks, or other ZeRO settings, may have saved it. Then the saved parts are shared out anew.
        """
        assert directory is not None, "DeepSpeed's checkpoints are directories"
        random = state["random"]
        if self._stage == 0 or (len(random), state["zero"]) == (self.num_ranks, self._zero):
            self.policy.load_checkpoint(str(directory / _FOLDER), tag=_TAG, load_module_strict=not self._adapted)
        else:
            self._restore_universal(directory)
        # From stage 1 on, a checkpoint brings its own clip, and the config's counts.
        if self._stage > 0:
            self.policy.optimizer.clip_grad = self._max_grad_norm
        torch.set_rng_state(random[self.rank % len(random)].clone())
        # A rank that nobody saved has just taken another rank's random numbers. It must not draw the same ones, so it
        # draws its own seed from them, which is reproducible.
        if self.rank >= len(random):
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)

    def _restore_universal(self, directory: Path) -> None:
        """Goes on from DeepSpeed's universal checkpoint, in which every parameter is whole.

        Rank 0 makes it for this one time, in a scratch directory that all ranks can read. The directory lies beside the
        saved checkpoint and not in it, because a process that is killed must not add anything to a checkpoint.
        """
        with contextlib.ExitStack() as stack:
            universal = [""]
            if self.rank == 0:
                universal[0] = str(stack.enter_context(scratch_directory(directory)))
                with disk_errors(Path(universal[0]), Path(universal[0])):
                    _to_universal(directory / _FOLDER / _TAG, Path(universal[0]) / _TAG)
            dist.broadcast_object_list(universal)  # the others learn the path once everything is there
            self.policy._config.load_universal_checkpoint = True  # DeepSpeed reads this only while it loads
            try:
                self.policy.load_checkpoint(universal[0], tag=_TAG)
                # In stage 3 all parts of the weights got the same step counter, and each part would advance it.
                if self._stage == 3:
                    for moments in self.policy.optimizer.optimizer.state.values():
                        moments["step"] = moments["step"].clone()
                dist.barrier()  # rank 0 must not remove the directory while another rank still reads it
            finally:
                self.policy._config.load_universal_checkpoint = False


def _settings(config: R2MConfig) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if learner.offload == "params":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # updates differ in passes, so `backward` says which is the last
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": zero | learner.zero_options,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled at the start, for minutes
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }


def _to_universal(saved: Path, universal: Path) -> None:
    """Makes a universal checkpoint of the shards that any number of ranks saved. The saved files are only read."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        SimpleNamespace(
            input_folder=str(saved),
            output_folder=str(universal),
            num_extract_workers=1,  # in this process: a fork of a process that runs collectives may hang
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # it is about pipelines and tensor parallelism, which we do not use
        )
    )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter that ZeRO stage 3 shares out. The padding of the last part is cut off."""
    part, size = parameter.ds_tensor, parameter.ds_tensor.ds_numel
    return part.flatten()[: max(0, parameter.ds_numel - size * parameter.ds_zero_partition_rank)]


def _chunks(parameters: list[Publication]) -> Iterator[list[Publication]]:
    """Splits parameters into runs of at most GATHERED_BYTES, in their order. A larger parameter is a run by itself."""
    chunk: list[Publication] = []
    size = 0
    for one in parameters:
        num_bytes = sum(getattr(part, "ds_numel", part.numel()) * part.element_size() for part in one.parts)
        if chunk and size + num_bytes > GATHERED_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += num_bytes
    yield chunk


def _import_deepspeed(on_cpu: bool) -> Any:
    """Imports DeepSpeed with the settings that it reads at its import."""
    os.environ.setdefault("LOCAL_RANK", "0")  # a Ray process sees no GPU but its own
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # DeepSpeed would compile this operator, which is for inference, at every start on a CPU. If the compilation is ever
    # killed, it leaves a lock behind, and all later starts wait for that lock for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

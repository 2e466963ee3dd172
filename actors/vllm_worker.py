"""Our code inside vLLM's own processes: a worker that copies the policy's hidden states out.

vLLM takes `EngineWorker` as its `worker_cls`. It calls `register`, our `vllm.general_plugins` entry point, in each of
its processes. The worker is written for the V1 model runner of vLLM 0.32, and it refuses another model runner when it
starts. `vllm_weights` runs inside vLLM's processes, too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from actors import vllm_weights
from actors.state_slab import SlabShape, StateSlab
from actors.vllm_models import mend
from r2m_async.child_process import end_with_parent

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

CHILD = "R2M_ENGINE_CHILD"
"""An environment variable. If it is set, the processes that vLLM starts end with the process that started them."""
SEQUENCE = "r2m_sequence"
"""A key of `SamplingParams.extra_args`: into which sequence of the slab the states of a request go.

Sequences are counted through all blocks. Response k of a request with several goes into the k-th sequence after it.
"""

NO_FAULT = {
    # A checkpoint has another number format than `model.dtype`: a line for every weight.
    "vllm.model_executor.models.utils": re.compile("Attempted to load weight .* with dtype"),
    # New weights for a layer that has none.
    "vllm.model_executor.model_loader.reload.layerwise": re.compile(r"\w*RotaryEmbedding: Failed to load weights"),
}
"""Warnings of vLLM about what is meant, by logger. They are not shown."""


def register() -> None:
    """Makes our transfer engines known to vLLM, and ties the life of a child process to its parent's.

    vLLM calls this in each of its processes.
    """
    vllm_weights.register()
    if not torch.cuda.is_available():
        # TORCHDYNAMO_DISABLE (vllm_drivers) comes too late where vLLM was imported before, or in a process that was forked
        # from such a one. Compiling takes 20 s, and fails with the kernels of a processor without vectors.
        torch._dynamo.config.disable = True
    for name in NO_FAULT:
        logging.getLogger(name).addFilter(_is_news)
    if CHILD in os.environ and multiprocessing.parent_process() is not None:
        end_with_parent()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning of vLLM is about something that is not meant."""
    return not NO_FAULT[record.name].match(record.getMessage())


class EngineWorker(PlatformWorker):
    """A vLLM worker that copies the hidden states of each step into the slab.

    These are the last layer's states after the final norm, from which the language-model head computes logits. Nothing
    is copied if vLLM's `additional_config` names no slab.
    """

    def init_device(self) -> None:
        """Prepares the worker and opens the slab. Raises RuntimeError if vLLM runs another model runner than V1's."""
        super().init_device()
        if not isinstance(self.model_runner, GPUModelRunner):
            raise RuntimeError(
                f"r2m needs vLLM's V1 model runner and this engine has {type(self.model_runner).__module__}: "
                f"set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self._version = 0
        self._sequences: dict[str, int] = {}
        self._slab: StateSlab | None = None
        slab = self.vllm_config.additional_config.get("slab")
        if slab and self.rank == 0:  # all ranks of a tensor-parallel engine have the same states
            self._slab = StateSlab(slab["path"], SlabShape(**slab["shape"]))

    def load_model(self, **how: Any) -> None:
        """Loads the model, and makes it compute what transformers does."""
        super().load_model(**how)
        mend(self.model_runner.get_model())

    def r2m_update(self, info: dict[str, Any], version: int) -> None:
        """Takes the weights of a policy version, and labels the states that are written from here on with it.

        info: what the transfer engine needs to receive the weights. All in one call, because requests wait meanwhile.
        """
        self.start_weight_update()
        self.update_weights(info)
        self.finish_weight_update()
        self._version = version

    def r2m_settle(self) -> None:
        """Does nothing. vLLM handles calls between two steps, so a return means that the step under way has ended."""

    def execute_model(self, scheduler_output: Any) -> Any:
        """Computes the forward pass of one step and copies its hidden states."""
        # OpenMP counts threads by the thread that asks, torch for the process. Asking torch makes the two agree in this thread
        # before the step begins: vLLM's attention refuses a step in which the number changes under way.
        torch.get_num_threads()
        output = super().execute_model(scheduler_output)
        if self._slab is not None:
            self._follow(scheduler_output)
            # The states are there only until tokens are sampled. A step without tokens leaves none.
            if self.model_runner.execute_model_state is not None:
                self._keep_states(self._slab)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Samples the tokens of one step. On a CPU, requests whose prompt takes further steps draw without a generator.

        Such a request, too, draws a token, which vLLM throws away. vLLM then winds the request's own random generator
        back, which a generator on a CPU cannot do. So the generator is taken away for this step.
        """
        if not current_platform.is_cpu():
            return super().sample_tokens(grammar_output)
        batch, thrown_away = self.model_runner.input_batch, self.model_runner.discard_request_mask.np
        rows = [row for row in batch.generators if row < batch.num_reqs and thrown_away[row]]
        parked = {row: batch.generators.pop(row) for row in rows}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(parked)

    def _follow(self, scheduler_output: Any) -> None:
        """Notes which sequence of the slab each new request writes to, and forgets the requests that have ended."""
        for request_id in scheduler_output.finished_req_ids:
            self._sequences.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            first = (request.sampling_params.extra_args or {}).get(SEQUENCE) if request.sampling_params else None
            if first is not None:
                self._sequences[request.req_id] = first + _child_index(request.req_id)

    def _keep_states(self, slab: StateSlab) -> None:
        """Writes the hidden states of all tokens of this step into the slab.

        A step has some tokens of each request in the batch, one request after the other.
        """
        runner = self.model_runner
        batch, starts = runner.input_batch, runner.query_start_loc.np
        # -1 stands for a request without a place in the slab, such as the probe.
        sequences = np.array([self._sequences.get(request_id, -1) for request_id in batch.req_ids])
        counts = np.diff(starts[: len(sequences) + 1])
        # A token's row is the first row of its sequence plus the token's place in the text. A request's first token of
        # this step comes after those that are computed already.
        first_rows = sequences * slab.shape.num_rows + batch.num_computed_tokens_cpu[: len(sequences)]
        taken = np.arange(counts.sum())
        rows = np.repeat(first_rows - starts[: len(sequences)], counts) + taken
        wanted = np.repeat(sequences >= 0, counts)
        states = runner.execute_model_state.hidden_states[: len(rows)]
        if not wanted.all():
            states, rows = states[torch.from_numpy(taken[wanted]).to(states.device)], rows[wanted]
        slab.write(torch.from_numpy(rows.astype(np.int64)), states, self._version)


def _child_index(request_id: str) -> int:
    """Which of several responses to one request this is. vLLM names response k `k_<id>`; our ids have no underscore."""
    prefix, underscore, _ = request_id.partition("_")
    return int(prefix) if underscore else 0

"""The rollout engine on vLLM: groups batched continuously, states out of its worker, weights in and checked.

A group is one request with n = K and one greedy request for its twin. See `vllm_drivers` for how vLLM is driven and
`vllm_worker` for what runs inside it.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput

from actors.state_slab import DIRECTORY, SlabShape, StateSlab, create_slab_file
from actors.vllm_drivers import AsyncDriver, Completed, Driver, Request, SteppedDriver
from actors.vllm_weights import BACKENDS, NOT_AS_SENT
from actors.vllm_worker import SEQUENCE
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost, WeightMismatch
from r2m_async.models.generation import checkpoint_generation_config, eos_ids
from r2m_async.trajectories import PolicyFeedback, Ticket, Trajectory, TrajectoryGroup, WeightProbe, Weights

log = logging.getLogger(__name__)

PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference of a probe token's log-probability between learner and engine, in nats."""
_REFUSED = {
    "pipeline_parallel_size": "is not supported: the first stage has no last states",
    "data_parallel_size": "is not supported: use rollouts.num_actors",
    "speculative_config": "is not supported: its tokens pass the language-model head otherwise",
    "logits_processors": "would change the distribution that is sampled from, and bias the ratio of Eq. 2",
}
_BLOCK = 32
"""Tokens of a cache block on a CPU; vLLM's own 128 there would share no short prompt."""
_CPU_CACHE_BYTES = (64 << 20, 1 << 30)
"""At least and at most, for keys and values: vLLM zeroes them when it starts, at several seconds for a GiB."""


class VLLMEngine:
    """The policy at `path` on vLLM; `twin` adds a greedy response to every group."""

    def __init__(self, path: str, tokenizer: Any, hidden_size: int, config: R2MConfig, twin: bool) -> None:
        began = time.perf_counter()
        self._tokenizer, self._config, self._twin = tokenizer, config, twin
        self._eos_ids = eos_ids(checkpoint_generation_config(path), tokenizer)
        self._version = 0
        self._slab: StateSlab | None = None
        self._blocks: queue.SimpleQueue[int] = queue.SimpleQueue()
        if config.weights.transport == "ipc":
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # vLLM unpickles the learner's CUDA handles
        slab: dict[str, Any] = {}
        if config.wants_rollout_states:
            slab = self._open_slab(hidden_size)
        try:
            args = _engine_args(path, config, twin, slab)
            self._driver: Driver = (AsyncDriver if config.asynchronous else SteppedDriver)(args, config.weights.timeout)
        finally:
            if slab:
                os.unlink(slab["path"])
        self._driver.set_weight_version("0")  # the checkpoint's, until the first version is loaded
        self._startup = {"weights/engine_start_seconds": time.perf_counter() - began}

    def _open_slab(self, hidden_size: int) -> dict[str, Any]:
        rollouts = self._config.rollouts
        shape = SlabShape(
            num_blocks=rollouts.concurrent_groups,
            num_sequences=rollouts.group_size + self._twin,
            num_rows=rollouts.max_prompt_tokens + rollouts.max_new_tokens,
            hidden_size=hidden_size,
            dtype=self._config.feedback_dtype,
        )
        path = create_slab_file(shape)
        self._slab = StateSlab(path, shape)
        for block in range(shape.num_blocks):
            self._blocks.put(block)
        return {"path": path, "shape": {name: getattr(shape, name) for name in shape.__slots__}}

    # Weights

    def join(self, channel: dict[str, Any]) -> None:
        with self._or_lost("join the learner's channel"):
            self._driver.rpc("init_weight_transfer_engine", init_info=channel)

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        """Swaps the weights while requests wait, then probes them.

        Raises WeightMismatch if they are not the learner's, StageLost if they could not be loaded.
        """
        began = time.perf_counter()
        digests = weights.probe.digests if weights.probe else {}
        if weights.layout is None:
            num_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
            with _shared_file(weights.tensors) as path:
                paused = self._update({"path": path, "digests": digests}, weights.version)
        else:
            layout = weights.layout
            sizes = zip(layout["dtype_names"], layout["shapes"], strict=True)
            num_bytes = sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in sizes)
            paused = self._update(layout | (sent or {}) | {"digests": digests}, weights.version)
        self._version = weights.version
        if weights.probe:
            self._check(weights.probe, weights.version)
        return self._startup | {
            "weights/load_seconds": time.perf_counter() - began,
            "weights/pause_seconds": paused,
            "weights/mb_per_s": num_bytes / 1e6 / paused,
        }

    def _update(self, info: dict[str, Any], version: int) -> float:
        with self._or_lost(f"take policy version {version}"):
            return self._driver.update(info, version, self._config.rollouts.keep_stale_cache)

    @contextmanager
    def _or_lost(self, what: str) -> Iterator[None]:
        """An engine that failed in the middle of a transfer is of no more use."""
        try:
            yield
        except StageLost:
            raise
        except Exception as error:
            if NOT_AS_SENT in str(error):
                raise WeightMismatch(f"the vLLM engine did not {what}: {error}") from error
            raise StageLost(None, f"the vLLM engine did not {what}: {error}") from error

    def _check(self, probe: WeightProbe, version: int) -> None:
        rollouts = self._config.rollouts
        tokens = tuple(probe.token_ids.tolist())[: rollouts.max_prompt_tokens + rollouts.max_new_tokens - 1]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        request = Request(request_id=f"probe.{version}", token_ids=tokens, params=params, cache_salt=f"probe.{version}")
        (completed,) = self._driver.generate([request])
        rows = completed.prompt_logprobs[1:]
        own = torch.tensor([row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)])
        worst = (own - probe.logprobs[: len(own)]).abs().max().item()
        tolerance = PROBE_TOLERANCE[self._config.model.dtype]
        if not worst <= tolerance:
            raise WeightMismatch(
                f"the vLLM engine at policy version {version}: every parameter arrived as it was sent, and the log-probability "
                f"of a probe token differs from the learner's by {worst:.2g} nats, at most {tolerance} is expected in "
                f"{self._config.model.dtype}: the engine does not compute with these weights"
            )

    # Groups

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        block = self._blocks.get() if self._slab else None
        try:
            if self._slab and block is not None:
                self._slab.clear(block)
            requests = self._requests(ticket, block)
            try:
                completed = self._driver.generate(requests)
            except Exception:
                with suppress(StageLost):  # nothing of the group may write into its block any more
                    self._driver.abort([request.request_id for request in requests])
                raise
            whole = self._group(ticket, completed)
            return whole, self._feedback(whole, block) if self._slab and block is not None else None
        finally:
            if block is not None:
                self._blocks.put(block)

    def _requests(self, ticket: Ticket, block: int | None) -> list[Request]:
        rollouts = self._config.rollouts
        name = f"{ticket.group_id}.{ticket.attempt}"

        def request(suffix: str, sequence: int, **how: Any) -> Request:
            place = {} if block is None else {SEQUENCE: block * (rollouts.group_size + self._twin) + sequence}
            params = SamplingParams(
                max_tokens=rollouts.max_new_tokens,
                stop_token_ids=self._eos_ids,
                ignore_eos=True,  # those above are the ones that count
                logprobs=0,
                detokenize=False,
                extra_args=place,
                **how,
            )
            return Request(request_id=name + suffix, token_ids=ticket.prompt.token_ids, params=params, cache_salt=name)

        sampled = request("", 0, n=rollouts.group_size, temperature=rollouts.temperature, seed=ticket.seed)
        return [sampled, request(".greedy", rollouts.group_size, temperature=0.0)] if self._twin else [sampled]

    def _group(self, ticket: Ticket, completed: list[Completed]) -> TrajectoryGroup:
        prompt = ticket.prompt.token_ids
        sampled = completed[0].outputs
        trajectories = tuple(
            self._trajectory(prompt, sampled.get(index)) for index in range(self._config.rollouts.group_size)
        )
        greedy = self._trajectory(prompt, completed[1].outputs.get(0)) if self._twin else None
        return TrajectoryGroup(ticket=ticket, trajectories=trajectories, greedy=greedy)

    def _trajectory(self, prompt: tuple[int, ...], output: CompletionOutput | None) -> Trajectory:
        response = list(output.token_ids) if output else []
        logprobs = (
            [step[token].logprob for step, token in zip(output.logprobs or [], response, strict=True)] if output else []
        )
        versions = torch.full((len(response),), self._version, dtype=torch.int32)
        for span in (output.weight_versions or []) if output else []:
            versions[span.start : span.end] = int(span.version)
        finish = output.finish_reason if output else None
        return Trajectory(
            token_ids=torch.tensor([*prompt, *response]),
            prompt_len=len(prompt),
            behaviour_logprobs=torch.tensor([0.0] * len(prompt) + logprobs),
            policy_versions=torch.cat([torch.full((len(prompt),), -1, dtype=torch.int32), versions]),
            finish_reason=finish if finish in ("stop", "length") else "abort",
            text=self._tokenizer.decode(response, skip_special_tokens=True),
        )

    def _feedback(self, whole: TrajectoryGroup, block: int) -> PolicyFeedback | None:
        group = whole.finished()
        if not group.trajectories:
            return None
        lengths = {
            index: len(trajectory.token_ids)
            for index, trajectory in enumerate((*whole.trajectories, *_present(whole.greedy)))
            if trajectory.finish_reason != "abort"
        }
        prompt_len = whole.trajectories[0].prompt_len
        assert self._slab is not None
        states, oldest = self._slab.read(block, lengths, prompt_len)
        return PolicyFeedback(
            group_id=whole.ticket.group_id,
            hidden_states=states[: len(group.trajectories)],
            greedy=states[-1] if group.greedy is not None else None,
            policy_version=oldest,
        )

    def abort(self, group_id: int, attempt: int) -> None:
        name = f"{group_id}.{attempt}"
        self._driver.abort([name, f"{name}.greedy"])

    def close(self) -> None:
        self._driver.close()


@contextmanager
def _shared_file(tensors: dict[str, Tensor]) -> Iterator[str]:
    """The tensors as a safetensors file in shared memory."""
    handle, path = tempfile.mkstemp(prefix="r2m-weights-", dir=DIRECTORY)
    os.close(handle)
    try:
        save_file(tensors, path)
        yield path
    finally:
        os.unlink(path)


def cpu_options(path: str, dtype: str, num_tokens: int, num_sequences: int) -> dict[str, Any]:
    """Of vLLM's arguments, for `num_sequences` of at most `num_tokens` at once."""
    least, most = _CPU_CACHE_BYTES
    cache = min(max(least, num_sequences * _cache_bytes(path, dtype, num_tokens)), most)
    return {"enforce_eager": True, "block_size": _BLOCK, "kv_cache_memory_bytes": cache}


def _cache_bytes(path: str, dtype: str, num_tokens: int) -> int:
    """Of one sequence's keys and values = 2 x layers x heads x head size x item size x tokens, in whole blocks."""
    model = AutoConfig.from_pretrained(path).get_text_config()
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    per_token = 2 * model.num_hidden_layers * heads * size * getattr(torch, dtype).itemsize
    return per_token * _BLOCK * math.ceil(num_tokens / _BLOCK)


def _present(greedy: Trajectory | None) -> Iterable[Trajectory]:
    return () if greedy is None else (greedy,)


def _engine_args(path: str, config: R2MConfig, twin: bool, slab: dict[str, Any]) -> AsyncEngineArgs:
    rollouts, cpu = config.rollouts, config.run.device == "cpu" or not torch.cuda.is_available()
    num_tokens = rollouts.max_prompt_tokens + rollouts.max_new_tokens
    ours = {
        "model": path,
        "dtype": config.model.dtype,
        "seed": config.run.seed % 2**31,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a checkpoint's own sampling settings would be sampled with and not trained with
        "logprobs_mode": "processed_logprobs",
        "max_model_len": num_tokens,
        "max_num_seqs": rollouts.concurrent_groups * (rollouts.group_size + twin) + 1,
        "tensor_parallel_size": rollouts.tensor_parallel,
        "worker_cls": "actors.vllm_worker.EngineWorker",
        "weight_transfer_config": {"backend": BACKENDS[config.weights.transport]},
        "additional_config": {"slab": slab} if slab else {},
    }
    recomputes = bool(slab) and rollouts.in_flight_updates
    defaults: dict[str, Any] = {"disable_log_stats": True, "enable_prefix_caching": not recomputes}
    if recomputes:
        ours["enable_prefix_caching"] = False
        log.warning("prefix caching is off: after an in-flight update a sequence must recompute its own prompt states")
    if cpu:
        defaults |= cpu_options(path, config.model.dtype, num_tokens, ours["max_num_seqs"])
    if slab:
        ours["async_scheduling"] = False  # a step launched ahead would write states of a response that has ended
    if rollouts.tensor_parallel > 1:
        ours["distributed_executor_backend"] = "mp"  # Ray places the actor, not its workers
    for key, reason in _REFUSED.items():
        if key in rollouts.engine_options:
            raise ConfigError(f"rollouts.engine_options: {key} {reason}; leave it out")
    taken = sorted(ours.keys() & rollouts.engine_options.keys())
    if taken:
        raise ConfigError(f"rollouts.engine_options: {taken[0]} is set from other keys of the config; leave it out")
    try:
        return AsyncEngineArgs(**(defaults | rollouts.engine_options | ours))
    except TypeError as error:
        raise ConfigError(f"rollouts.engine_options is {rollouts.engine_options}: {error}") from None

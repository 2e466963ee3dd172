"""The rollout engine on vLLM.

It batches groups continuously, gets the policy's hidden states from vLLM's worker, and checks the weights it is sent.
A group is one request for K responses, and one more request if the group has a greedy twin. With a rollout function of
the user's (`rollouts.function`) each turn is a request (`vllm_turns`). `vllm_drivers` says how vLLM is run, and
`vllm_worker` is what runs inside it.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors.torch import save_file
from torch import Tensor
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform

from actors.aborts import Aborted, attempt_name
from actors.state_slab import SlabShape, StateSlab, create_slab_file, shared_folder
from actors.vllm_drivers import AsyncDriver, Completed, Driver, Request, SteppedDriver
from actors.vllm_models import check_model, or_refused
from actors.vllm_turns import GroupOfTurns, sampled_tokens
from actors.vllm_weights import BACKENDS, NOT_AS_SENT
from actors.vllm_worker import SEQUENCE
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost, WeightMismatch
from r2m_async.models.plays import RolloutFunction, play_group, rollout_function
from r2m_async.models.pretrained import pretrained_config, pretrained_generation_config
from r2m_async.models.tokens import ResponseText, end_of_text
from r2m_async.plugins import wrong_types
from r2m_async.trajectories import PolicyFeedback, Ticket, Trajectory, TrajectoryGroup, WeightProbe, Weights

log = logging.getLogger(__name__)

PROBE_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}
"""By dtype, how far the engine's log-probabilities of the probe may be from the learner's, as a share of their own size.

Both are means over the probe's tokens. These tokens are unlikely, and rounding grows with the size of a log-probability: in
bfloat16 a token at -20 nats may be off by half a nat in an engine that is right.
"""
_REFUSED = {
    "pipeline_parallel_size": "is not supported: the first stage has no last states",
    "data_parallel_size": "is not supported: use rollouts.num_actors",
    "speculative_config": "is not supported: its tokens pass the language-model head otherwise",
    "logits_processors": "would change the distribution that is sampled from, and bias the ratio of Eq. 2",
}
"""Options of vLLM that `rollouts.engine_options` may not have, and why."""
_BLOCK = 32
"""Tokens in one block of the key-value cache on a CPU. Only full blocks are shared, and a short prompt would not fill
one of the 128 tokens that vLLM takes there."""
_CPU_CACHE_BYTES = (64 << 20, 1 << 30)
"""The smallest and the largest key-value cache on a CPU, in bytes. vLLM fills the cache with zeros when it starts,
which takes several seconds per GiB."""


class VLLMEngine:
    """A `RolloutEngine` on vLLM. `generate` may run in several threads at once."""

    def __init__(self, path: str, tokenizer: Any, hidden_size: int, config: R2MConfig, twin: bool) -> None:
        """Starts vLLM with the checkpoint at `path` as policy version 0.

        Args:
            path: name or directory of the policy.
            tokenizer: the policy's tokenizer.
            hidden_size: size of the policy's hidden states.
            config: the run's config.
            twin: whether every group gets one more response, which is decoded greedily.

        Raises ConfigError for a vLLM option that is refused or unknown, and if vLLM does not start with the policy. Raises OSError if shared memory has no room for
        the hidden states.
        """
        began = time.perf_counter()
        self._tokenizer, self._config, self._twin = tokenizer, config, twin
        self._eos_ids = list(
            end_of_text(
                tokenizer,
                pretrained_config("model.policy", path, trust=config.model.trust_remote_code),
                pretrained_generation_config("model.policy", path, config.model.trust_remote_code),
            )
        )
        self._version = 0
        self._function = rollout_function(config)
        self._playing: dict[str, GroupOfTurns] = {}
        """The groups that a rollout function is driving, by the name of the attempt."""
        self._aborts = Aborted()
        """The attempts that were aborted before they began."""
        self._lock = threading.Lock()
        """Guards both."""
        self._slab: StateSlab | None = None
        self._blocks: queue.SimpleQueue[int] = queue.SimpleQueue()
        """The slab's free blocks."""
        if config.weights.transport == "ipc":
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # or vLLM would not unpickle CUDA handles
        # When the folder goes, either both sides have opened the file in it, or the engine did not start.
        with ExitStack() as stack:
            slab: dict[str, Any] = {}
            if config.wants_rollout_states:
                slab = self._open_slab(hidden_size, stack.enter_context(shared_folder("states")))
            args = engine_args(path, config, twin, slab)
            with or_refused(path):
                self._driver: Driver = (AsyncDriver if config.asynchronous else SteppedDriver)(
                    args, config.weights.timeout
                )
        self._driver.set_weight_version("0")  # the checkpoint's version, until another is loaded
        self._startup = {"weights/engine_start_seconds": time.perf_counter() - began}

    def _open_slab(self, hidden_size: int, folder: Path) -> dict[str, Any]:
        """Creates and opens the slab. Returns what vLLM's worker needs to open it, too. folder: where its file is made."""
        rollouts = self._config.rollouts
        shape = SlabShape(
            num_blocks=self._config.concurrent_groups,
            num_sequences=rollouts.group_size + self._twin,
            num_rows=rollouts.max_prompt_tokens + rollouts.max_new_tokens,
            hidden_size=hidden_size,
            dtype=self._config.feedback_dtype,
        )
        path = create_slab_file(shape, folder)
        self._slab = StateSlab(path, shape)
        for block in range(shape.num_blocks):
            self._blocks.put(block)
        return {"path": path, "shape": {name: getattr(shape, name) for name in shape.__slots__}}

    # Weights

    def join(self, channel: dict[str, Any]) -> None:
        """Lets vLLM's workers join the learner's channel. Raises StageLost if they do not."""
        with self._or_lost("join the learner's channel"):
            self._driver.rpc("init_weight_transfer_engine", init_info=channel)

    def load(self, weights: Weights, sent: dict[str, Any] | None = None) -> dict[str, float]:
        """Replaces the weights while running requests wait, and checks that vLLM computes with them.

        Args:
            weights: the version to load. It has a layout instead of tensors if the learner sends the tensors itself.
            sent: what the learner's `send` returned, if it sends the tensors itself.

        Returns measurements: the seconds that the engine took to start and to load, the seconds for which requests
        waited, and the MB/s at which the weights came meanwhile.

        Raises WeightMismatch if the engine does not have the learner's weights, or does not compute with them;
        ConfigError if it computes another model with the weights of version 0. Raises StageLost if the weights could not be loaded.
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
        """Lets vLLM receive a version. Returns the seconds for which its requests waited."""
        with self._or_lost(f"take policy version {version}"):
            return self._driver.update(info, version, self._config.rollouts.keep_stale_cache)

    @contextmanager
    def _or_lost(self, what: str) -> Iterator[None]:
        """Turns an error into StageLost, or into WeightMismatch if a parameter arrived damaged.

        After a failed transfer the engine may hold a mixture of weights, so it is of no more use.
        `what` completes the sentence "the vLLM engine did not ..." in the message.
        """
        try:
            yield
        except StageLost:
            raise
        except Exception as error:
            # An error in another process of vLLM's arrives as text, so only the message tells which error it was.
            if NOT_AS_SENT in str(error):
                raise WeightMismatch(f"the vLLM engine did not {what}: {error}") from error
            raise StageLost(None, f"the vLLM engine did not {what}: {error}") from error

    def _check(self, probe: WeightProbe, version: int) -> None:
        """Compares the engine's log-probabilities of the probe's tokens with the learner's.

        Digests show that the weights arrived. Only this shows that the model computes with them. Raises WeightMismatch
        if they differ by more than PROBE_TOLERANCE, but ConfigError for version 0: vLLM then has no such model.
        """
        rollouts = self._config.rollouts
        # One token less than vLLM's limit, because it has to generate one.
        tokens = tuple(probe.token_ids.tolist())[: rollouts.max_prompt_tokens + rollouts.max_new_tokens - 1]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        # The version is in the salt: keys and values that older weights computed must not answer for these.
        request = Request(request_id=f"probe.{version}", token_ids=tokens, params=params, cache_salt=f"probe.{version}")
        (completed,) = self._driver.generate([request])
        rows = completed.prompt_logprobs[1:]  # the first token of a text has no log-probability
        own = torch.tensor([row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)])
        theirs = probe.logprobs[: len(own)]
        distance, size = (own - theirs).abs().mean().item(), theirs.abs().mean().item()
        limit = PROBE_TOLERANCE[self._config.model.dtype] * size
        if distance <= limit:
            return
        # NaN is no smaller, and refused, too.
        found = (
            f"every parameter arrived as it was sent, and the log-probabilities of the probe's tokens differ from the learner's "
            f"by {distance:.2g} nats in the mean. They are {size:.3g} nats in the mean, and in {self._config.model.dtype} a "
            f"distance of at most {limit:.2g} is rounding"
        )
        if version == 0:  # learner and engine have read the same files, and nothing was trained yet
            raise ConfigError(
                f"rollouts.engine is 'vllm' and model.policy is {self._config.model.policy!r}: vLLM {vllm.__version__} computes "
                f"another model than transformers from its files: {found}; use rollouts.engine 'transformers'"
            )
        raise WeightMismatch(
            f"the vLLM engine at policy version {version}: {found}: the engine does not compute with these weights; use "
            f"rollouts.engine 'transformers'"
        )

    # Groups

    def generate(self, ticket: Ticket) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        """Generates a ticket's group and its feedback (`RolloutEngine.generate`).

        If hidden states are kept and all blocks of the slab are taken, it waits for a free one. Raises FunctionFailed if
        the user's rollout function fails, and GenerationFailed if vLLM does not finish a response.
        """
        # A group takes its whole block before its first request. So a slab that is full cannot stop a group half-way.
        block = self._blocks.get() if self._slab else None
        try:
            if self._slab and block is not None:
                self._slab.clear(block)
            whole = self._played(self._function, ticket, block) if self._function else self._sampled(ticket, block)
            return whole, self._feedback(whole, block) if self._slab and block is not None else None
        finally:
            if block is not None:
                self._blocks.put(block)

    def _sampled(self, ticket: Ticket, block: int | None) -> TrajectoryGroup:
        """A group of single turns."""
        requests = self._requests(ticket, block)
        try:
            completed = self._driver.generate(requests)
        except Exception:
            # Requests of this group may still run. They must end before their block is given away.
            with suppress(StageLost):
                self._driver.abort([request.request_id for request in requests])
            raise
        return self._group(ticket, completed)

    def _played(self, function: RolloutFunction, ticket: Ticket, block: int | None) -> TrajectoryGroup:
        """A group that the user's function drives. The function may be left behind, but no request of the group is."""
        num = self._config.rollouts.group_size + self._twin
        turns = GroupOfTurns(
            driver=self._driver,
            name=attempt_name(ticket.group_id, ticket.attempt),
            first_sequence=None if block is None else block * num,
            eos_ids=self._eos_ids,
            config=self._config,
            version=lambda: self._version,
        )
        with self._lock:
            self._playing[turns.name] = turns
            turns.aborted = turns.name in self._aborts
        try:
            whole = play_group(
                function,
                ticket,
                turns.sample,
                tokenizer=self._tokenizer,
                ends=self._eos_ids,
                twin=self._twin,
                config=self._config,
                # Which requests share a step changes how numbers are rounded. So an exact run has one at a time.
                at_once=num if self._config.asynchronous else 1,
                aborted=lambda: turns.aborted,
            )
            turns.end()
            if block is not None:
                turns.compute_states(whole)
            return whole
        except Exception:
            # As in `_sampled`.
            with suppress(StageLost):
                turns.end()
            raise
        finally:
            with self._lock:
                del self._playing[turns.name]
                self._aborts.forget([turns.name])

    def _requests(self, ticket: Ticket, block: int | None) -> list[Request]:
        """The requests of a group: one for its K responses, and one for its greedy twin."""
        rollouts = self._config.rollouts
        name = attempt_name(ticket.group_id, ticket.attempt)

        def request(suffix: str, sequence: int, **how: Any) -> Request:
            # The worker writes the states of response k into the k-th sequence after this one.
            place = {} if block is None else {SEQUENCE: block * (rollouts.group_size + self._twin) + sequence}
            params = SamplingParams(
                max_tokens=rollouts.max_new_tokens,
                stop_token_ids=self._eos_ids,
                ignore_eos=True,  # only the tokens above end a response
                logprobs=0,
                detokenize=False,
                extra_args=place,
                **how,
            )
            # The salt keeps cached prompt tokens within the group. What another group computed has its states in the
            # block of that group, where this one does not look.
            return Request(request_id=name + suffix, token_ids=ticket.prompt.token_ids, params=params, cache_salt=name)

        sampled = request("", 0, n=rollouts.group_size, temperature=rollouts.temperature, seed=ticket.seed)
        return [sampled, request(".greedy", rollouts.group_size, temperature=0.0)] if self._twin else [sampled]

    def _group(self, ticket: Ticket, completed: list[Completed]) -> TrajectoryGroup:
        """The group that vLLM generated. A response that vLLM did not return counts as aborted."""
        prompt, text_of = ticket.prompt.token_ids, ResponseText(self._tokenizer, ticket.prompt.token_ids)
        sampled = completed[0].outputs
        trajectories = tuple(
            self._trajectory(prompt, sampled.get(index), text_of) for index in range(self._config.rollouts.group_size)
        )
        greedy = self._trajectory(prompt, completed[1].outputs.get(0), text_of) if self._twin else None
        return TrajectoryGroup(ticket=ticket, trajectories=trajectories, greedy=greedy)

    def _trajectory(
        self, prompt: tuple[int, ...], output: CompletionOutput | None, text_of: ResponseText
    ) -> Trajectory:
        """The trajectory of one response. Without an output of vLLM's the response is empty and aborted."""
        response, logprobs, versions = sampled_tokens(output, self._version)
        finish = output.finish_reason if output else None
        return Trajectory(
            token_ids=torch.tensor([*prompt, *response]),
            prompt_len=len(prompt),
            behaviour_logprobs=torch.tensor([0.0] * len(prompt) + logprobs),
            policy_versions=torch.tensor([-1] * len(prompt) + versions, dtype=torch.int32),
            finish_reason=finish if finish in ("stop", "length") else "abort",
            text=text_of(response),
        )

    def _feedback(self, whole: TrajectoryGroup, block: int) -> PolicyFeedback | None:
        """The policy's hidden states on the finished responses, out of the group's block; None if none finished."""
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
        """Ends the requests of this attempt, running or about to start (`RolloutEngine.abort`)."""
        name = attempt_name(group_id, attempt)
        if not self._function:
            self._driver.abort([name, f"{name}.greedy"])
            return
        with self._lock:
            turns = self._playing.get(name)
            if turns is None:
                self._aborts.add([name])
        if turns is not None:
            turns.abort()

    def close(self) -> None:
        """Shuts vLLM down."""
        self._driver.close()


@contextmanager
def _shared_file(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Writes tensors into a safetensors file in shared memory. The file is deleted at the end of the block."""
    with shared_folder("weights") as folder:
        save_file(tensors, folder / "weights.safetensors")
        yield str(folder / "weights.safetensors")


def cpu_options(path: str, dtype: str, num_tokens: int, num_sequences: int, trust: bool) -> dict[str, Any]:
    """The arguments of vLLM that differ on a CPU.

    Args:
        path: name or directory of the model.
        dtype: name of the model's dtype.
        num_tokens: the most tokens of one sequence, prompt and response together.
        num_sequences: the most sequences at once.
        trust: whether Python code in the model's files may be run.

    Returns vLLM's arguments by name. Among them is a key-value cache for that many sequences, within _CPU_CACHE_BYTES.
    """
    least, most = _CPU_CACHE_BYTES
    cache = min(max(least, num_sequences * _cache_bytes(path, dtype, num_tokens, trust)), most)
    return {"enforce_eager": True, "block_size": _BLOCK, "kv_cache_memory_bytes": cache}


def _cache_bytes(path: str, dtype: str, num_tokens: int, trust: bool) -> int:
    """Bytes of one sequence's keys and values: 2 x layers x heads x head size x item size x tokens, in whole blocks."""
    model = pretrained_config("model.policy", path, trust=trust).get_text_config()
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    per_token = 2 * model.num_hidden_layers * heads * size * getattr(torch, dtype).itemsize
    return per_token * _BLOCK * math.ceil(num_tokens / _BLOCK)


def _present(greedy: Trajectory | None) -> Iterable[Trajectory]:
    return () if greedy is None else (greedy,)


def check_policy(path: str, config: R2MConfig) -> str | None:
    """Checks what vLLM can say about a policy and the config before anything is loaded.

    Returns why nothing could be checked, or None. Raises ConfigError for an option of vLLM that is refused or unknown, and
    for a model that vLLM does not have.
    """
    if current_platform.is_unspecified():
        return "vLLM finds no device on this machine that it is built for"
    check_model(path, engine_args(path, config, twin=False, slab={}))
    return None


def engine_args(path: str, config: R2MConfig, twin: bool, slab: dict[str, Any]) -> AsyncEngineArgs:
    """Returns vLLM's arguments: what the config decides, `rollouts.engine_options`, and our defaults for the rest.

    path, twin: as in `VLLMEngine`. slab: what vLLM's worker needs to open the slab; empty without one.

    Raises ConfigError for an option that is refused, that the config decides, that vLLM does not have, or that it takes values
    of another type for.
    """
    rollouts, cpu = config.rollouts, config.run.device == "cpu" or not torch.cuda.is_available()
    num_tokens = rollouts.max_prompt_tokens + rollouts.max_new_tokens
    ours: dict[str, Any] = {
        "model": path,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "seed": config.run.seed % 2**31,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a checkpoint's own settings would be sampled with and not trained with
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "max_model_len": num_tokens,
        "max_num_seqs": config.concurrent_groups * (rollouts.group_size + twin) + 1,  # and the probe
        "tensor_parallel_size": rollouts.tensor_parallel,
        "worker_cls": "actors.vllm_worker.EngineWorker",
        "weight_transfer_config": {"backend": BACKENDS[config.weights.transport]},
        "additional_config": {"slab": slab} if slab else {},
    }
    # After an in-flight update a sequence computes its prompt anew. A hit in the prefix cache would leave rows of old
    # states in its block.
    recomputes = bool(slab) and rollouts.in_flight_updates
    defaults: dict[str, Any] = {
        "disable_log_stats": True,
        "enable_prefix_caching": not recomputes,
        "use_tqdm_on_load": False,
    }
    if recomputes:
        ours["enable_prefix_caching"] = False
        log.warning("prefix caching is off: after an in-flight update a sequence must recompute its own prompt states")
    if cpu:
        defaults |= cpu_options(
            path, config.model.dtype, num_tokens, ours["max_num_seqs"], config.model.trust_remote_code
        )
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
    if wrong := wrong_types(AsyncEngineArgs, rollouts.engine_options, "rollouts.engine_options", "vLLM"):
        raise ConfigError("\n".join(wrong))
    try:
        return AsyncEngineArgs(**(defaults | rollouts.engine_options | ours))
    except TypeError as error:
        raise ConfigError(f"rollouts.engine_options is {rollouts.engine_options}: {error}") from None

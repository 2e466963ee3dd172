"""Samples the turns of one group on vLLM, for a rollout function of the user's (`rollouts.function`).

Each turn is a request of its own, whose prompt is all tokens so far. All requests of a response have the same salt. So the
prefix cache spares a turn what the turns before have computed, and its states lie where these have written them. The
responses of a group have different salts: what one has computed has its states in its own rows, where no other looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.outputs import CompletionOutput

from actors.vllm_drivers import Completed, Driver, Request
from actors.vllm_worker import SEQUENCE
from r2m_async.config import R2MConfig
from r2m_async.models.turns import Sampled, SampledTurn, TurnRequest
from r2m_async.trajectories import TrajectoryGroup


@dataclass(slots=True)
class _Watch:
    """Looks for the end of a turn in the tokens that come."""

    turn: TurnRequest
    num_seen: int = 0
    """How many tokens it has looked at."""
    stop: str | None = None
    """The stop string that was found."""

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Whether the turn ends within its tokens so far. vLLM may bring several new ones at once."""
        while self.stop is None and self.turn.stop_in and self.num_seen < len(token_ids):
            self.num_seen += 1
            self.stop = self.turn.stop_in(list(token_ids[: self.num_seen]))
        return self.stop is not None


@dataclass(slots=True)
class GroupOfTurns:
    """The requests of one attempt at a group. `abort` is called from another thread than all else."""

    driver: Driver
    name: str
    """The name of the attempt, which no other has."""
    first_sequence: int | None
    """The slab's sequence of the first response. None if no states are kept."""
    eos_ids: list[int]
    """The tokens that end a turn."""
    config: R2MConfig
    version: Callable[[], int]
    """Returns the policy version that was loaded last."""
    aborted: bool = False
    """Whether the schedule has aborted the attempt."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: set[str] = field(default_factory=set)
    """The names of the requests that have not ended. The lock guards it, and `aborted`."""
    _num_computed: dict[int, int] = field(default_factory=dict)
    """For each response, how many of its tokens have their states in the slab for sure."""

    def sample(self, turn: TurnRequest, done: Callable[[Sampled], None]) -> None:
        """Begins to sample a turn (`turns.Sample`). With a `SteppedDriver` it returns when the turn has ended."""
        watch = _Watch(turn)
        how = {"temperature": 0.0} if turn.seed is None else {"temperature": self.config.rollouts.temperature}
        request = Request(
            request_id=f"{self.name}.{turn.response}.{turn.turn}",
            token_ids=turn.token_ids,
            params=self._params(turn.response, max_tokens=turn.max_new_tokens, logprobs=0, seed=turn.seed, **how),
            cache_salt=self._salt(turn.response),
            ends=watch if turn.stop_in else None,
        )
        with self._lock:
            # Either the abort finds the name here, or the turn finds that it was aborted.
            self._running.add(request.request_id)
            aborted = self.aborted

        def ended(completed: Completed | BaseException) -> None:
            with self._lock:
                self._running.discard(request.request_id)
            done(completed if isinstance(completed, BaseException) else self._sampled(turn, watch, completed))

        if aborted:
            ended(Completed())
        else:
            self.driver.start(request, ended)

    def _salt(self, response: int) -> str:
        return f"{self.name}.{response}"

    def _params(self, response: int, **how: float | int | None) -> SamplingParams:
        place = {} if self.first_sequence is None else {SEQUENCE: self.first_sequence + response}
        return SamplingParams(
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # only the tokens above end a turn
            detokenize=False,
            extra_args=place,
            **how,
        )

    def _sampled(self, turn: TurnRequest, watch: _Watch, completed: Completed) -> SampledTurn:
        """What a request has sampled. What vLLM has sampled after a stop string is left out."""
        output = completed.outputs.get(0)
        ids, logprobs, versions = sampled_tokens(output, self.version())
        finish = output.finish_reason if output else None
        if watch(ids):
            ids, logprobs, versions = ids[: watch.num_seen], logprobs[: watch.num_seen], versions[: watch.num_seen]
            finish = "stop"
        # The last token was never an input.
        self._num_computed[turn.response] = len(turn.token_ids) + len(ids) - 1
        return SampledTurn(
            token_ids=ids,
            logprobs=logprobs,
            versions=versions,
            finish_reason=finish if finish in ("stop", "length") else "abort",
            stop=None if ids and ids[-1] in self.eos_ids else watch.stop,
        )

    def abort(self) -> None:
        """Ends the requests that run, and all that come."""
        with self._lock:
            self.aborted = True
        self.end()

    def end(self) -> None:
        """Ends the requests that run. They write no more states when it returns."""
        with self._lock:
            running = sorted(self._running)
        if running:
            self.driver.abort(running)

    def compute_states(self, whole: TrajectoryGroup) -> None:
        """Lets vLLM compute those states of the finished responses that no turn has needed.

        They are the states of what an environment wrote last, and of a response into which the policy wrote nothing.
        """
        both = (*whole.trajectories, *(() if whole.greedy is None else (whole.greedy,)))
        requests = []
        for index, one in enumerate(both):
            # The last token has no state: it was never an input.
            inputs = one.token_ids[:-1].tolist()
            if one.finish_reason == "abort" or self._num_computed.get(index, 0) >= len(inputs):
                continue
            # vLLM samples a token after these. Nobody looks at it.
            request = Request(
                request_id=f"{self.name}.{index}.states",
                token_ids=tuple(inputs),
                params=self._params(index, max_tokens=1, temperature=0.0),
                cache_salt=self._salt(index),
            )
            requests.append(request)
        if requests:
            self.driver.generate(requests)


def sampled_tokens(output: CompletionOutput | None, version: int) -> tuple[list[int], list[float], list[int]]:
    """Returns the tokens of a response, the log-probability of each, and the policy version that sampled it.

    output: what vLLM returned. None: nothing.
    version: the version of tokens of which vLLM says nothing, the one that was loaded last.
    """
    if output is None:
        return [], [], []
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs or [], ids, strict=True)]
    versions = [version] * len(ids)
    for span in output.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * len(range(len(ids))[span.start : span.end])
    return ids, logprobs, versions

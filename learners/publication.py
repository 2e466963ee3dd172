"""The publication of policy versions: as tensors that others pass on, or sent to engines by the learner itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from learners.backend import PolicyBackend
from learners.weight_sender import WeightSender
from r2m_async.config import R2MConfig
from r2m_async.errors import NonFiniteStep
from r2m_async.finite import all_finite
from r2m_async.models.weights import named_weights, weight_probe
from r2m_async.trajectories import Weights


class Publication:
    """Publishes the policy of a backend. All ranks take part if they share the parameters out."""

    def __init__(self, backend: PolicyBackend, config: R2MConfig) -> None:
        """Keeps the backend. Rank 0 of a direct transport gets a `WeightSender`."""
        self._backend = backend
        self._config = config
        self._sender = WeightSender(config) if config.weights.direct and backend.rank == 0 else None

    def weights(self, version: int, whole: bool) -> Weights | None:
        """Publishes the present weights as a policy version. `PolicyLearner.weights` says what it returns and raises."""
        backend = self._backend
        weights = Weights(version=version, tensors={})
        tensors: dict[str, Tensor] = {}
        if backend.rank > 0:
            # Rank 0 cannot gather the parameters alone. This rank helps and keeps nothing.
            for _ in backend.named_parameters():
                pass
        elif whole or self._sender is None:
            weights = named_weights(backend, version)
            tensors = weights.tensors
        else:
            layout = self._sender.stage(backend, version)
            weights = dataclasses.replace(weights, layout=layout)
            tensors = self._sender.staged(version)
        if self._config.probes_weights and not whole:
            probe = weight_probe(backend.probed, tensors)
            # Without this check, an engine would be blamed for not computing the same numbers.
            if not all_finite([probe.logprobs]):
                raise NonFiniteStep(
                    f"policy version {version}: its log-probabilities of the probe text are not finite, although its weights "
                    f"are: they have grown too large for its arithmetic; lower learner.lr"
                )
            weights = dataclasses.replace(weights, probe=probe)
        return weights if backend.rank == 0 else None

    # These calls run while another thread trains. A failure is returned and not raised, because it is the engine that is
    # lost and not the learner.

    def open_channel(self, engine: int) -> dict[str, Any]:
        """Opens a channel to an engine, as `PolicyLearner.open_channel` says."""
        assert self._sender is not None
        return self._sender.open(engine)

    def connect(self, engine: int) -> dict[str, str]:
        """Waits for an engine to join its channel, as `PolicyLearner.connect` says."""
        assert self._sender is not None
        try:
            self._sender.connect(engine)
        except RuntimeError as error:  # torch and NCCL raise it
            return {"failed": str(error)}
        return {}

    def send(self, engine: int, version: int) -> dict[str, str]:
        """Sends a version to an engine, as `PolicyLearner.send` says."""
        assert self._sender is not None
        try:
            return self._sender.send(engine, version)
        except RuntimeError as error:
            return {"failed": str(error)}

"""The ring as an RLlib algorithm: `train`, checkpoints, callbacks and Tune, for people who have tools for those.

    algo = config.build_algo();  result = algo.train();  algo.save_to_path(path);  algo.stop()

A shell over `launch.Ring`, imported by the driver (or a Tune trial) only; the stages never see RLlib. There are no
EnvRunners, Learners or RLModules. Private names of Ray that this file needs: `AlgorithmConfig._is_online`,
`Algorithm._set_up_metrics`, `Trainable._iteration`; hence `ray==2.60.*`.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils import force_list
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.tune import Checkpoint, PlacementGroupFactory

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ray_stages import gpu_share
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve
from r2m_async.runs.checkpoints import MANIFEST, saved_config, seal, verified
from r2m_async.runs.resuming import check_resumable
from r2m_async.whole import whole_at, whole_directory

RING = "ring"
"""The directory of `Ring.save` inside an RLlib checkpoint, whose manifest knows it by its own."""


class R2MAlgorithmConfig(AlgorithmConfig):
    """What RLlib asks an algorithm's config for. The user's config is `r2m`; as a dict this is `r2m`'s tree, and `callbacks`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or R2M)
        self.r2m = R2MConfig()
        self._is_online = False  # or RLlib asks an EnvRunnerGroup that is not there

    def to_dict(self) -> dict[str, Any]:
        default = AlgorithmConfig().callbacks_class
        callbacks = {} if self.callbacks_class is default else {"callbacks": self.callbacks_class}
        return self.r2m.to_dict() | callbacks

    def update_from_dict(self, config_dict: dict[str, Any]) -> R2MAlgorithmConfig:
        """Sections take over what they name. Raises ConfigError; `callbacks` and Tune's own `__keys__` are RLlib's."""
        tree, rllibs = self.r2m.to_dict(), {}
        for key, value in config_dict.items():
            if key == "callbacks" or key.startswith("__"):
                rllibs[key] = value
            else:
                both_sections = isinstance(value, dict) and key in tree
                tree[key] = tree[key] | value if both_sections else value
        self.r2m = R2MConfig.from_dict(tree)
        return super().update_from_dict(rllibs)

    def validate(self) -> None:
        """R2MConfig has checked itself; RLlib's rules are about environments and batches."""


class R2M(Algorithm):
    """One `train()` is one policy step. The ring starts when it is first needed, or with a restore.

    `config` is an R2MConfig or its dict, as Tune gives it; `callbacks` one or several `RLlibCallback` classes.
    `result["r2m"]` holds the step's metrics under the ring's own names, `result["evaluation"]` the newest evaluation.
    """

    config: R2MAlgorithmConfig
    metrics: MetricsLogger

    def __init__(self, config: R2MConfig | dict[str, Any] | None = None, callbacks: Any = None, **tune: Any) -> None:
        tree = config or {} if isinstance(config, dict | None) else config.to_dict()
        given: Any = tree if callbacks is None else {**tree, "callbacks": callbacks}
        super().__init__(given, **tune)

    @classmethod
    def get_default_config(cls) -> R2MAlgorithmConfig:
        return R2MAlgorithmConfig(cls)

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """A CPU for the trial and the GPUs of its stages, which Ray places inside the trial's group."""
        r2m = cls.get_default_config().update_from_dict(config).r2m
        share = gpu_share(r2m, ray.cluster_resources().get("GPU", 0.0))
        if not share:
            return PlacementGroupFactory([{"CPU": 1.0}])
        engines = [{"GPU": share * r2m.rollouts.tensor_parallel}] * r2m.rollouts.num_actors
        others = [{"GPU": share}] * (r2m.reward.replicas + r2m.learner.num_ranks)
        return PlacementGroupFactory([{"CPU": 1.0}, *engines, *others])

    def setup(self, config: Any) -> None:
        """Resolves the workload. Raises ConfigError or DataError."""
        self._ring: Ring | None = None
        self._stopped = False
        self._workload = resolve(config.r2m)
        self._set_up_metrics()
        self.env_runner_group = None
        self.callbacks = [make() for make in force_list(config.callbacks_class)]
        functions = config.callbacks_on_algorithm_init
        make_callback(
            "on_algorithm_init", self.callbacks, functions, kwargs=dict(algorithm=self, metrics_logger=self.metrics)
        )

    @property
    def ring(self) -> Ring:
        if self._stopped:
            raise RuntimeError("this algorithm was stopped: build another, or use R2M.from_checkpoint")
        if self._ring is None:
            self._ring = Ring(self.config.r2m, self._workload)
        return self._ring

    def step(self) -> dict[str, Any]:
        if self.ring.finished:
            raise RuntimeError(f"the run has ended at step {self.training_iteration}: its last result said done")
        result = super().step()
        finished = self.ring.finished
        evaluations = self.ring.drain() if finished else self.ring.controller.evaluations
        if evaluations:
            result["evaluation"] = dict(evaluations[-1])
        return result | {"r2m": self._step_metrics, "done": finished}

    def training_step(self) -> None:
        """In RLlib's words a response is an episode, its reward the return, a sampled token an environment step."""
        measured = self._step_metrics = self.ring.step()
        for key, name in (("episode_return_mean", "reward/mean"), ("episode_len_mean", "length/mean")):
            self.metrics.log_value(("env_runners", key), measured.get(name, math.nan), reduce="item")
        for key, what in (("num_episodes_lifetime", "responses"), ("num_env_steps_sampled_lifetime", "tokens")):
            number = int(measured[f"throughput/{what}"])
            self.metrics.log_value(("env_runners", key), number, reduce="lifetime_sum")

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, float]:
        """Waits for the evaluations that `config.evaluation` has asked for so far; the newest, or {}."""
        return dict((self.ring.drain() or [{}])[-1])

    def save_to_path(self, path: str | Path | None = None, *, use_msgpack: bool = False) -> str:  # type: ignore[override]
        """Whole or not at all, RLlib's files and the ring's; an old checkpoint at `path` gives way at once.

        Raises DiskError, and ConfigError for a directory that holds something else.
        """
        directory = _local(path) if path else Path(tempfile.mkdtemp(prefix="r2m-"))
        others = [one.name for one in directory.glob("*") if not _own(one.name)] if directory.is_dir() else []
        if others:
            raise ConfigError(
                f"{directory}: holds {min(others)}, which is no part of a checkpoint and would be lost; name a directory of "
                f"the checkpoint's own"
            )
        with whole_directory(directory, replace=True) as building:
            self.ring.save(building / RING)
            super().save_to_path(building, use_msgpack=use_msgpack)
            seal(building)
        return str(directory)

    def restore_from_path(self, path: str | Path, **how: Any) -> None:
        """Replaces the running ring by one that goes on from the checkpoint, under this algorithm's config.

        Raises ConfigError for a checkpoint that is not whole, one whose ring is of another step among them, and for keys
        that may not change (docs/checkpoints.md).
        """
        directory = whole_at(_local(path))
        _check_whole(directory)
        if (directory / RING).is_dir():  # all of it, before the running ring ends
            verified(directory / RING)
            check_resumable(directory / RING, saved_config(directory / RING), self.config.r2m)
        Checkpointable.restore_from_path(self, directory, **how)
        self._stop_ring()
        self._ring = Ring(self.config.r2m, self._workload, resume=directory / RING)

    @classmethod
    def from_checkpoint(cls, path: Any, filesystem: Any = None, **how: Any) -> Any:
        """`path` may be a Tune Checkpoint. RLlib unpickles what built the algorithm: open only what you trust."""
        directory = whole_at(_local(path))
        _check_whole(directory)
        return super().from_checkpoint(str(directory), filesystem, **how)

    def get_state(self, components: Any = None, *, not_components: Any = None, **how: Any) -> dict[str, Any]:
        """RLlib's counters; the ring has a directory of its own in the checkpoint."""
        return {"training_iteration": self.training_iteration, "metrics_logger": self.metrics.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.metrics.set_state(state["metrics_logger"])
        self._iteration = state["training_iteration"]

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return []

    def get_ctor_args_and_kwargs(self) -> tuple[tuple, dict[str, Any]]:
        return (self.config.to_dict(),), {}

    def cleanup(self) -> None:
        self._stop_ring()
        self._stopped = True

    def _stop_ring(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.stop()

    def __repr__(self) -> str:
        """Of any state: Ray asks even before `__init__`, and RLlib's own answer then fails."""
        return type(self).__name__


def _own(name: str) -> bool:
    """Of what a checkpoint's directory holds: RLlib's files and ours, and the hidden ones that Tune puts there."""
    state = R2M.STATE_FILE_NAME
    rllibs = (R2M.METADATA_FILE_NAME, R2M.CLASS_AND_CTOR_ARGS_FILE_NAME, f"{state}.pkl", f"{state}.msgpack")
    return name in (*rllibs, RING, MANIFEST) or name.startswith(".")


def _check_whole(directory: Path) -> None:
    """Before anything is unpickled; a directory that is not there is for RLlib to refuse. Raises ConfigError."""
    if directory.exists():
        verified(directory, strays=lambda name: name.startswith("."))


def _local(path: str | Path | Checkpoint) -> Path:
    if isinstance(path, Checkpoint):
        return Path(path.to_directory())
    if "://" in str(path):
        raise ConfigError(f"checkpoint path {str(path)!r} is not local: save into a directory and copy it, or use Tune")
    return Path(path).absolute()

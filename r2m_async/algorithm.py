"""The ring as an algorithm of RLlib, so that RLlib's checkpoints, callbacks and Tune work with it.

    algo = config.build_algo();  result = algo.train();  algo.save_to_path(path);  algo.stop()

This file is a thin layer over `launch.ring.Ring`. Only the driver or a Tune trial imports it; the stages of the ring do
not know RLlib. The algorithm has no EnvRunners, Learners or RLModules.

It needs three private names of Ray: `AlgorithmConfig._is_online`, `Algorithm._set_up_metrics` and
`Trainable._iteration`. They may change with any release, so the required version is `ray==2.60.*`.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Sequence
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
from r2m_async.launch.gpus import gpu_share
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve
from r2m_async.runs.checkpoints import MANIFEST, newest_whole, saved_config, saved_counts, seal, verified
from r2m_async.runs.resuming import check_resumable
from r2m_async.whole import remove_directory, whole_at, whole_directory

RING = "ring"
"""The directory inside an RLlib checkpoint that `Ring.save` writes.

The manifest of the whole checkpoint lists only the manifest of this directory, which in turn lists its files.
"""


class R2MAlgorithmConfig(AlgorithmConfig):
    """The config object that RLlib expects of an algorithm.

    The user's own config is the attribute `r2m`. As a dict, this config is the tree of `r2m` and the key `callbacks`.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or R2M)
        self.r2m = R2MConfig()
        self._is_online = False  # otherwise RLlib uses the EnvRunnerGroup, which this algorithm does not have

    def to_dict(self) -> dict[str, Any]:
        """The tree of `r2m`, and `callbacks` if they are not RLlib's default."""
        default = AlgorithmConfig().callbacks_class
        callbacks = {} if self.callbacks_class is default else {"callbacks": self.callbacks_class}
        return self.r2m.to_dict() | callbacks

    def update_from_dict(self, config_dict: dict[str, Any]) -> R2MAlgorithmConfig:
        """Changes the keys of the sections that `config_dict` names, and returns this config.

        `callbacks` and keys that begin with `__`, which Tune adds, are passed on to RLlib. Raises ConfigError for
        unknown keys and values.
        """
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
        """Does nothing: `R2MConfig` has checked itself, and RLlib's rules are about environments and batches."""


class R2M(Algorithm):
    """R2M as an RLlib algorithm. One call of `train()` is one policy step.

    The ring starts when it is first needed, or when a checkpoint is restored. `result["r2m"]` holds the metrics of the
    step under the ring's own names, and `result["evaluation"]` holds the newest evaluation.
    """

    config: R2MAlgorithmConfig
    metrics: MetricsLogger

    def __init__(self, config: R2MConfig | dict[str, Any] | None = None, callbacks: Any = None, **tune: Any) -> None:
        """Resolves the config's models and data; see `setup` for errors.

        Args:
            config: an `R2MConfig`, or its dict as Tune passes it.
            callbacks: one or several classes of `RLlibCallback`.
            tune: further arguments that Tune passes to a Trainable.
        """
        tree = config or {} if isinstance(config, dict | None) else config.to_dict()
        given: Any = tree if callbacks is None else {**tree, "callbacks": callbacks}
        super().__init__(given, **tune)

    @classmethod
    def get_default_config(cls) -> R2MAlgorithmConfig:
        """The config with all defaults."""
        return R2MAlgorithmConfig(cls)

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """The resources that Tune reserves for a trial: one CPU for the driver, and the GPUs of its stages.

        Ray places the stages inside this placement group.
        """
        r2m = cls.get_default_config().update_from_dict(config).r2m
        share = gpu_share(r2m, ray.cluster_resources().get("GPU", 0.0))
        if not share:
            return PlacementGroupFactory([{"CPU": 1.0}])
        engines = [{"GPU": share * r2m.rollouts.tensor_parallel}] * r2m.rollouts.num_actors
        others = [{"GPU": share}] * (r2m.reward.replicas + r2m.learner.num_ranks)
        return PlacementGroupFactory([{"CPU": 1.0}, *engines, *others])

    def setup(self, config: Any) -> None:
        """Resolves the workload, but starts no ring yet. Raises ConfigError or DataError."""
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
        """The running ring, which is started if there is none. Raises RuntimeError after `stop`."""
        if self._stopped:
            raise RuntimeError("this algorithm was stopped: build another, or use R2M.from_checkpoint")
        if self._ring is None:
            self._ring = Ring(self.config.r2m, self._workload, journals=self._new_journals())
        return self._ring

    def _new_journals(self) -> Path:
        """A new folder for the finished groups of a ring. Each ring has its own, and its checkpoints say which.

        So a checkpoint never gets groups that another policy wrote, whatever was restored in between, and by which trial.
        """
        self._journals = Path(self.logdir) / "journals" / secrets.token_hex(8)
        return self._journals

    def step(self) -> dict[str, Any]:
        """Takes one policy step and returns RLlib's result for it. RLlib's `train` calls this.

        `result["done"]` says whether it was the last step. Raises RuntimeError if the run had ended already, and the
        error of the first loop of the ring that failed.
        """
        if self.ring.finished:
            raise RuntimeError(
                f"the run has ended at step {self.training_iteration}: its last result had `done` set; build another algorithm"
            )
        result = super().step()
        finished = self.ring.finished
        evaluations = self.ring.drain() if finished else self.ring.controller.evaluations
        if finished:
            remove_directory(self._journals.parent)  # no group of this run is still to be trained
        if evaluations:
            result["evaluation"] = dict(evaluations[-1])
        return result | {"r2m": self._step_metrics, "done": finished}

    def training_step(self) -> None:
        """Takes the step, and logs its metrics under the names that RLlib's tools look for.

        A response counts as an episode, its reward as the return, and a sampled token as an environment step.
        """
        measured = self._step_metrics = self.ring.step()
        for key, name in (("episode_return_mean", "reward/mean"), ("episode_len_mean", "length/mean")):
            self.metrics.log_value(("env_runners", key), measured.get(name, math.nan), reduce="item")
        for key, what in (("num_episodes_lifetime", "responses"), ("num_env_steps_sampled_lifetime", "tokens")):
            number = int(measured[f"throughput/{what}"])
            self.metrics.log_value(("env_runners", key), number, reduce="lifetime_sum")

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, float]:
        """Waits for the evaluations that `config.evaluation` has asked for so far.

        Returns the newest one, or {} if there is none. It starts no further evaluation.
        """
        return dict((self.ring.drain() or [{}])[-1])

    def save_to_path(self, path: str | Path | None = None, *, use_msgpack: bool = False) -> str:
        """Writes a checkpoint with RLlib's files and those of the ring, whole or not at all. Returns its directory.

        An old checkpoint at `path` is replaced in one step. Without `path` a new temporary directory is used.

        Raises DiskError, and ConfigError for a directory that holds anything but a checkpoint.
        """
        directory = _local(path) if path else Path(tempfile.mkdtemp(prefix="r2m-"))
        others = [one.name for one in directory.glob("*") if not _own(one.name)] if directory.is_dir() else []
        if others:
            raise ConfigError(
                f"{directory}: holds {min(others)}, which is no part of a checkpoint and would be lost; name a directory "
                f"for the checkpoint alone"
            )
        with whole_directory(directory, replace=True) as building:
            self.ring.save(building / RING)
            super().save_to_path(building, use_msgpack=use_msgpack)
            seal(building)
        for older in set(self._journals.parent.glob("*")) - {self._journals}:  # of rings before the last restore
            remove_directory(older)
        return str(directory)

    def restore_from_path(self, path: str | Path, **how: Any) -> None:
        """Replaces the running ring by a new one that continues from the checkpoint, with this algorithm's config.

        path: a checkpoint that `save_to_path` or `Ring.save` wrote, or a run directory of `r2m train`, whose newest
        whole checkpoint is taken.

        Raises ConfigError for a checkpoint that is damaged or put together from two, and for keys of the config that
        may not change (docs/checkpoints.md). These checks come before the running ring is stopped.

        Finished groups that the checkpoint's ring has kept since are taken up again (`queue.journal`), if they are on this
        machine: `ring.controller.journal.recovered` counts them.
        """
        directory = whole_at(_local(path))
        ring = _ring_in(directory)
        if ring is None:
            _check_whole(directory)
            ring = directory / RING
        if ring.is_dir():  # everything is checked before the running ring is stopped
            verified(ring)
            check_resumable(ring, saved_config(ring, R2MConfig), self.config.r2m)
        if ring.parent == directory:
            Checkpointable.restore_from_path(self, directory, **how)
        else:
            self._count_on(saved_counts(ring)["progress"])
        # A run directory may have been moved. Whatever else a checkpoint is in, it says where its groups are.
        in_run = directory / "journal" if (directory / "checkpoints").is_dir() else None
        kept = in_run or (saved_counts(ring).get("journals") if ring.is_dir() else None)
        self._stop_ring()
        journals = self._new_journals()
        self._ring = Ring(self.config.r2m, self._workload, resume=ring, journals=journals, take_up=kept or journals)

    @classmethod
    def from_checkpoint(cls, path: Any, filesystem: Any = None, **how: Any) -> Any:
        """Builds an algorithm from a checkpoint, with the config that it was saved with.

        path: a directory that `save_to_path` or `Ring.save` wrote, a run directory of `r2m train`, or a Tune
        `Checkpoint`.

        RLlib unpickles the arguments of the algorithm in what `save_to_path` wrote, which can run code: open only
        checkpoints that you trust. Raises ConfigError for a checkpoint that is damaged.
        """
        directory = whole_at(_local(path))
        if (ring := _ring_in(directory)) is not None:
            verified(ring)
            algo = cls(config=saved_config(ring, R2MConfig))
            algo.restore_from_path(ring)
            return algo
        _check_whole(directory)
        return super().from_checkpoint(str(directory), filesystem, **how)

    def get_state(self, components: Any = None, *, not_components: Any = None, **how: Any) -> dict[str, Any]:
        """RLlib's counters. The state of the ring is saved in a directory of its own."""
        return {"training_iteration": self.training_iteration, "metrics_logger": self.metrics.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned."""
        self.metrics.set_state(state["metrics_logger"])
        self._iteration = state["training_iteration"]

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        """No components: RLlib would look for an EnvRunnerGroup and a LearnerGroup."""
        return []

    def get_weights(self, policies: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """The learners' present weights, tensors by name, under `policy` and `head`; starts the ring if need be.

        policies: `policy`, `head` or both (the default). Raises KeyError for another name.
        """
        weights = {"policy": self.ring.policy_weights, "head": self.ring.head_weights}
        return {name: weights[name]().tensors for name in policies or weights}

    def get_ctor_args_and_kwargs(self) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which `from_checkpoint` builds the algorithm again."""
        return (self.config.to_dict(),), {}

    def cleanup(self) -> None:
        """Stops the ring for good. RLlib's `stop` calls this."""
        self._stop_ring()
        self._stopped = True

    def _count_on(self, progress: dict[str, Any]) -> None:
        """Sets RLlib's counters to how far a run has come that RLlib did not save (`ring.progress.Progress`)."""
        self._iteration = progress["step"]
        for what, number in (("episodes", progress["responses"]), ("env_steps_sampled", progress["tokens"])):
            self.metrics.log_value(("env_runners", f"num_{what}_lifetime"), number, reduce="lifetime_sum")

    def _stop_ring(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.stop()

    def __repr__(self) -> str:
        """The name of the class. Ray asks for it even before `__init__`, when RLlib's own method would fail."""
        return type(self).__name__


def _ring_in(directory: Path) -> Path | None:
    """Returns the ring's checkpoint in a directory that is one, or in a run directory. None for one of RLlib's."""
    if (directory / "step.msgpack").is_file():
        return directory
    return newest_whole(directory)[0] if (directory / "checkpoints").is_dir() else None


def _own(name: str) -> bool:
    """Whether a file or directory of this name is part of a checkpoint: RLlib's, the ring's, or hidden.

    Tune puts hidden files into the directory.
    """
    state = R2M.STATE_FILE_NAME
    rllibs = (R2M.METADATA_FILE_NAME, R2M.CLASS_AND_CTOR_ARGS_FILE_NAME, f"{state}.pkl", f"{state}.msgpack")
    return name in (*rllibs, RING, MANIFEST) or name.startswith(".")


def _check_whole(directory: Path) -> None:
    """Raises ConfigError for a damaged checkpoint. It must be called before RLlib unpickles anything.

    A directory that does not exist passes: RLlib refuses it later.
    """
    if directory.exists():
        verified(directory, strays=lambda name: name.startswith("."))


def _local(path: str | Path | Checkpoint) -> Path:
    """The absolute local path of a checkpoint. Raises ConfigError for a remote address."""
    if isinstance(path, Checkpoint):
        return Path(path.to_directory())
    if "://" in str(path):
        raise ConfigError(f"checkpoint path {str(path)!r} is not local: save into a directory and copy it, or use Tune")
    return Path(path).absolute()

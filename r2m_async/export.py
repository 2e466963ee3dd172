"""Exports the models of a run in Hugging Face's format (`r2m export RUN OUT`), and scores responses with them.

    OUT/policy/                               for AutoModelForCausalLM and AutoTokenizer
    OUT/policy/README.md                      its model card, to be gone on with; OUT/reward_model has one, too
    OUT/reward_model/                         the backbone, for AutoModelForSequenceClassification and AutoTokenizer
    OUT/reward_model/r2m_head.safetensors     the head's parameters by name, float32
    OUT/reward_model/r2m_head.json            the step of these weights, the keys of the config that a reward depends
                                              on, and the policy that the run started from (null if that was a local
                                              directory or was trained from scratch)
    OUT/manifest.json                         size and digest of each file: a scorer refuses weights that have changed

    scorer = RewardScorer("OUT")
    scorer.score("the river :", ["one response", "another"])  # [2]

An R2M head reads the policy's states, so scoring needs both directories. The variants `vanilla` and `iterative_head`
read no states. For them, the run's head also becomes the scoring head of the exported classifier, rounded to its dtype,
and the classifier gives the rewards by itself. Under `iterative_model` the run's head is the whole classifier. An ensemble of heads
is no classifier: the exported one stays as it came, and `RewardScorer` has the ensemble's rewards. A run without a reward model (`reward.model: null`) leaves a policy alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.data.prompts import policy_reads
from r2m_async.errors import ConfigError, DataError
from r2m_async.finite import all_finite
from r2m_async.launch.prompts import check_columns
from r2m_async.launch.workload import Models, find_models
from r2m_async.models.heads import build_head, score_group
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback
from r2m_async.models.pretrained import pretrained_generation_config, pretrained_tokenizer, quiet
from r2m_async.models.reward import embed_group, load_reward_model, save_classifier, scoring_head
from r2m_async.models.tokens import check_known, check_tokens, num_positions, response_ids, state_size
from r2m_async.models.weights import load_weights
from r2m_async.runs.checkpoints import MANIFEST, checkpoints, newest_weights, saved_config, seal, verified
from r2m_async.runs.model_cards import model_card
from r2m_async.runs.records import read_metrics
from r2m_async.trajectories import Prompt, Ticket, Trajectory, TrajectoryGroup, Weights
from r2m_async.whole import whole_at, whole_directory, write_file

_REWARD_KEYS = {
    "run": ("seed",),
    "model": ("dtype", "attention"),
    "reward": ("dtype", "max_tokens", "functions", "clip", "length_penalty", "missing_eos_penalty", "overlong"),
    "head": ("variant", "width", "omega_floor", "omega_horizon", "ensemble", "pessimism"),
    "feedback": ("dtype",),
}
"""The keys of the config, by section, on which the reward of a response depends, apart from the models."""


def export(source: Path, out: Path, trust_remote_code: bool = False) -> Path:
    """Exports the policy and the reward model of a checkpoint into the directory `out`.

    Args:
        source: the directory of a run, whose newest checkpoint is taken, or of a checkpoint.
        out: a directory that is empty or does not exist. It is written whole or not at all.
        trust_remote_code: whether Python code that comes with the models' files may be run. It is then exported, too.

    Returns the checkpoint that was exported.

    Raises ConfigError if there is no checkpoint or it cannot be read, if its weights are not finite, if the models that
    the run started from cannot be loaded or have changed, and if `out` holds something or lies below a file. Raises
    DataError if the run's evaluation.jsonl cannot be read, and DiskError.
    """
    checkpoint = _newest_checkpoint(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT {out}: is there already; name a new directory or an empty one")
    if not (there := next(one for one in (out, *out.absolute().parents) if one.exists())).is_dir():
        raise ConfigError(f"{checkpoint}: cannot be exported to {out}: {there} is a file: Not a directory")
    step, policy, head = newest_weights(checkpoint)
    for name, weights in (("policy", policy), ("head", head)):
        if not all_finite(weights.tensors.values()):
            raise ConfigError(
                f"{checkpoint}: its {name} has weights that are NaN or infinite; export another checkpoint"
            )
    # A checkpoint may come from somebody else. What its own config trusts does not count.
    config = _trusting(saved_config(checkpoint, R2MConfig), trust_remote_code)
    models, keys = find_models(config), _reward_keys(config)
    evaluation = _evaluation_of(checkpoint, step)
    used = _trusting(_config_of(keys, "cpu"), trust_remote_code)
    try:
        with whole_directory(out) as building:
            _write_policy(building / "policy", policy, models, used)
            card = model_card("policy", config, step, _portable(config.model.policy), evaluation)
            write_file(building / "policy" / "README.md", card)
            if models.reward_model is None:
                seal(building)
                return checkpoint
            _write_reward_model(building / "reward_model", head, models, used)
            base = None if config.reward.model is None else _portable(config.reward.model)
            card = model_card("reward model", config, step, base, evaluation)
            write_file(building / "reward_model" / "README.md", card)
            record = {"step": step, "config": keys, "initial_policy": _portable(config.model.policy)}
            write_file(building / "reward_model" / "r2m_head.json", json.dumps(record, indent=2) + "\n")
            seal(building)
    except (OSError, SafetensorError) as error:  # a model's files are damaged, or something has appeared at `out`
        raise ConfigError(f"{checkpoint}: cannot be exported to {out}: {error}") from None
    return checkpoint


def is_export(path: str) -> bool:
    """Whether the directory `path` looks like one that `export` wrote."""
    return Path(path, "reward_model", "r2m_head.json").is_file()


def initial_policy_of(path: str) -> str | None:
    """Returns the name of the policy that an exported run started from: its name at Hugging Face, or `embedded`.

    None if the export does not record it.
    """
    return json.loads(Path(path, "reward_model", "r2m_head.json").read_text(encoding="utf-8")).get("initial_policy")


class RewardScorer:
    """Scores responses with an exported reward model.

    The rewards are those that the run itself would give to the same texts at the exported step.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        at_horizon: bool = False,
        initial_policy: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads the models.

        Args:
            path: the directory that `r2m export` wrote.
            device: `auto`, `cpu` or `cuda`.
            at_horizon: mixes states and embeddings as at the horizon, t = T in R2M's Eq. 4, and not as in the exported
                step (R2M App. G.6).
            initial_policy: the policy that the run started from, by its name at Hugging Face or its directory. If
                given, the scorer works as before the first update: it reads the states of that policy, and its head is
                untrained. Its matrices are drawn with `run.seed`, and phi is the reward model's own scoring head.
            trust_remote_code: whether Python code that comes with the files of these models may be run.

        Raises ConfigError if the export or a model cannot be loaded, if weights have changed since the export, and if
        `initial_policy` does not fit the head.
        """
        policy, reward = Path(path, "policy"), Path(path, "reward_model")
        if policy.is_dir() and not reward.exists():
            raise ConfigError(
                f"{path}: is of a run without a reward model (reward.model: null), so there is nothing to score with; call "
                f"the run's reward functions yourself"
            )
        try:
            record = json.loads((reward / "r2m_head.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: is not what `r2m export` writes: {error}; name a directory that it wrote"
            ) from None
        # Only the weights are compared with the manifest. A user may edit the other files, r2m_head.json among them.
        verified(path, strays=lambda name: True, checked=lambda name: name.endswith(".safetensors"))
        self._step = record["step"]
        self._config = _trusting(_config_of(record["config"], device), trust_remote_code)
        # Steps count from 0, and t in Eq. 4 counts from 1. Version v was made in step v - 1, whose omega is used here.
        self._omega_step = (self._config.omega_horizon if at_horizon else max(1, self._step)) - 1
        name = str(policy) if initial_policy is None else initial_policy
        self._policy = load_policy(name, self._config) if self._config.reads_feedback else None
        self._policy_tokenizer = pretrained_tokenizer("model.policy", policy, trust_remote_code)
        self._reward_model = load_reward_model(str(reward), self._config)
        self._reward_tokenizer = pretrained_tokenizer("reward.model", reward, trust_remote_code)
        check_tokens("reward.model", reward, self._reward_tokenizer, self._reward_model.config)
        if self._policy:
            check_tokens("model.policy", name, self._policy_tokenizer, self._policy.config)
        models = (self._reward_model, self._policy)
        rm_hidden_size, policy_hidden_size = (_hidden_size(model) if model else 0 for model in models)
        phi = scoring_head(self._reward_model)
        head = build_head(phi, rm_hidden_size, policy_hidden_size, self._config, self._reward_model)
        weights = Weights(version=self._step, tensors=load_file(reward / "r2m_head.safetensors"))
        if initial_policy is None:
            load_weights(head, weights)
        else:
            _check_initial(initial_policy, self._policy, weights)
        self._head = head.to(self._reward_model.device)

    @property
    def reads_feedback(self) -> bool:
        """Whether the head reads the policy's states."""
        return self._policy is not None

    def score(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        responses: Sequence[str],
        finished: bool = True,
        columns: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Scores n responses to one prompt in one batch. The run's clipping and bonuses are included.

        Args:
            prompt: a text, or {"role", "content"} turns of which the last is the user's.
            responses: texts without special tokens. They are tokenised anew, so their tokens may differ from those that
                a policy once sampled for the same text.
            finished: whether the responses ended by themselves, and not at a length limit.
            columns: the columns of a data record that reward functions of the run ask for, for example `answer`.

        Returns [n] float32. Raises ValueError if `responses` is a single text, ConfigError if a reward function asks for
        a column that is not given, FunctionFailed if one fails, and DataError for a text that the policy cannot read.
        """
        if isinstance(responses, str):
            raise ValueError(f"responses is one text, {responses[:40]!r}: pass a list of texts")
        if not responses:
            return torch.empty(0)
        columns = columns or {}
        check_columns(self._config, [("`columns`", columns)])
        group, config = self._group(prompt, responses, finished, columns), self._config
        feedback = group_feedback(self._policy, group, config, self._step) if self._policy else None
        embeddings = embed_group(self._reward_model, self._reward_tokenizer, group, config)
        return score_group(self._head, embeddings, feedback, self._omega_step, self._step, config).rewards

    def _group(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        responses: Sequence[str],
        finished: bool,
        columns: Mapping[str, Any],
    ) -> TrajectoryGroup:
        """The prompt and the responses as a group of trajectories, with zeros in place of log-probabilities."""
        content = prompt if isinstance(prompt, str) else tuple((turn["role"], turn["content"]) for turn in prompt)
        text, prompt_ids = policy_reads(content, self._policy_tokenizer)

        def trajectory(response: str) -> Trajectory:
            ids = [*prompt_ids, *response_ids(self._policy_tokenizer, text, prompt_ids, response, finished)]
            if self._policy:
                self._check_readable(ids, response)
            return Trajectory(
                token_ids=torch.tensor(ids),
                prompt_len=len(prompt_ids),
                behaviour_logprobs=torch.zeros(len(ids)),
                policy_versions=torch.full((len(ids),), self._step, dtype=torch.int32),
                finish_reason="stop" if finished else "length",
                text=response,
            )

        asked = Prompt(prompt_id="score", content=content, text=text, token_ids=tuple(prompt_ids), columns=columns)
        ticket = Ticket(group_id=0, due_step=-1, seed=0, attempt=0, prompt=asked)
        return TrajectoryGroup(ticket=ticket, trajectories=tuple(map(trajectory, responses)), greedy=None)

    def _check_readable(self, ids: Sequence[int], response: str) -> None:
        """Raises DataError for a text that the policy cannot read: too long, or with a token without embedding."""
        assert self._policy is not None
        check_known("the policy", self._policy_tokenizer, ids, self._policy.config)
        limit = num_positions(self._policy.config)
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"the prompt and the response {response[:60]!r} have {len(ids)} tokens together, and the policy {limit} "
                f"positions: its states of the rest would mean nothing; shorten them"
            )


def _evaluation_of(checkpoint: Path, step: int) -> dict[str, Any] | None:
    """The run's last evaluation up to a step. None if it has none, or if the checkpoint lies outside of its run."""
    path = checkpoint.absolute().parent.parent / "evaluation.jsonl"
    if checkpoint.absolute().parent.name != "checkpoints" or not path.is_file():
        return None
    return next((one for one in reversed(read_metrics(path)) if one["step"] <= step), None)


def _newest_checkpoint(source: Path) -> Path:
    """`source` itself if it is a checkpoint, else the newest checkpoint of the run. Raises ConfigError without any."""
    source = whole_at(source)
    if any((source / name).is_file() for name in (MANIFEST, "step.msgpack")):
        return source
    if saved := checkpoints(source):
        return saved[-1]
    raise ConfigError(
        f"{source}: is neither a checkpoint nor a run that has one; name another, or train with checkpoint.at_end or "
        f"checkpoint.every"
    )


def _reward_keys(config: R2MConfig) -> dict[str, dict[str, Any]]:
    """The values of `_REWARD_KEYS`, ready for JSON. They do not depend on the machine or on the length of the run."""
    # The default of omega_horizon is run.num_steps, which is not among these keys.
    config = config.head(omega_horizon=config.omega_horizon)
    # The default of its end is rollouts.max_new_tokens, which is not among these keys either.
    if (overlong := config.reward.overlong) and overlong.end is None:
        config = config.reward(overlong=overlong.model_copy(update={"end": config.rollouts.max_new_tokens}))
    # All others need a GPU or a package, and differ from sdpa only in rounding.
    if config.model.attention not in ("eager", "sdpa"):
        config = config.model(attention="sdpa")
    tree = config.to_dict()
    if tree["reward"]["overlong"] is None:  # an older version, which has no such key, can then read the export
        del tree["reward"]["overlong"]
    return {
        section: {key: tree[section][key] for key in keys if key in tree[section]}
        for section, keys in _REWARD_KEYS.items()
    }


def _config_of(keys: dict[str, dict[str, Any]], device: str) -> R2MConfig:
    """A config with these keys and this device, and defaults otherwise."""
    return R2MConfig.from_dict(keys | {"run": keys["run"] | {"device": device}})


def _trusting(config: R2MConfig, trust: bool) -> R2MConfig:
    """A config that runs the Python code in the files of all its models, or of none."""
    return config.model(trust_remote_code=trust).reward(trust_remote_code=trust)


def _write_policy(directory: Path, weights: Weights, models: Models, config: R2MConfig) -> None:
    """Writes the policy with its tokenizer and generation config."""
    model = load_policy(models.policy, config)
    _fill(model, weights, "model.policy", models.policy)
    with quiet():
        model.save_pretrained(directory)
    # The generation config is copied as it is. Many published models contradict themselves in it, and a model's
    # `save_pretrained` would refuse that.
    trust = config.model.trust_remote_code
    generation_config = pretrained_generation_config("model.policy", models.policy, trust)
    generation_config.to_json_file(directory / "generation_config.json")
    pretrained_tokenizer("model.policy", models.policy, trust).save_pretrained(directory)


def _write_reward_model(directory: Path, weights: Weights, models: Models, config: R2MConfig) -> None:
    """Writes the reward model with its tokenizer, and the head beside it."""
    name = models.reward_model
    assert name is not None, "a run without a reward model leaves none"
    model = load_reward_model(name, config)
    phi = scoring_head(model)
    head = build_head(phi, models.reward_hidden_size, models.policy_hidden_size, config, model)
    _fill(head, weights, "reward.model", name)
    # No classifier computes what several heads do together, or a head that reads states: it stays as it came.
    if config.head.ensemble == 1 and config.head.reads_tokens:
        model.load_state_dict(head.model.state_dict())
    elif config.head.ensemble == 1 and not config.reads_feedback:
        phi.load_state_dict(head.scoring_head.state_dict())
    save_classifier(model, directory)
    save_file(weights.tensors, directory / "r2m_head.safetensors")
    pretrained_tokenizer("reward.model", name, config.reward.trust_remote_code).save_pretrained(directory)


def _fill(module: nn.Module, weights: Weights, key: str, name: str) -> None:
    """Loads weights into a module. Raises ConfigError, naming the config's key, if they do not fit."""
    try:
        load_weights(module, weights)
    except ValueError as error:
        raise ConfigError(
            f"{key} {name!r} is not the model that the run started from: {error}; put that one back"
        ) from None


def _portable(name: str) -> str | None:
    """The name of a model if it means the same on another machine; None for a local directory or `from_scratch`."""
    return None if name == "from_scratch" or Path(name).exists() else name


def _check_initial(name: str, policy: Any, weights: Weights) -> None:
    """Raises ConfigError unless the head reads states of the size that this policy has."""
    if policy is None:
        raise ConfigError(
            f"initial policy {name!r}: the exported head does not read the states of a policy; leave the initial policy out"
        )
    if (read := weights.tensors["key"].shape[0]) != _hidden_size(policy):
        raise ConfigError(
            f"initial policy {name!r}: its states have {_hidden_size(policy)} numbers and the exported head reads {read}; "
            f"name the policy that the run started from"
        )


def _hidden_size(model: Any) -> int:
    """The size of a state of the model's language part."""
    size = state_size(model.config)
    assert size is not None  # or the run could not have begun
    return size

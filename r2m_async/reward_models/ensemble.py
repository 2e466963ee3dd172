"""Trained reward models as one: the mean or the least of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from r2m_async.data.reward_text import Message, reward_input_ids
from r2m_async.errors import ConfigError, name_remedy
from r2m_async.from_scratch.pretraining import score
from r2m_async.models.reward import load_classifier, scoring_head
from r2m_async.models.weight_files import check_weight_files
from r2m_async.reward_models.config import RewardModelConfig


class RewardEnsemble:
    """Rewards by the model or models of a finished run, combined as its `ensemble.combine` says."""

    def __init__(self, source: str | Path) -> None:
        """source: a run directory; or one model with its tokenizer, an HF name or directory, with the default `config`.

        Raises ConfigError for a model that a run has not got yet, and for what is no reward model.
        """
        from transformers import AutoTokenizer

        self.source = str(source)
        run = Path(source)
        if (run / "config.yaml").is_file():
            self.config = RewardModelConfig.from_yaml(run / "config.yaml")
            directories = [seed_directory(run, seed) / "model" for seed in self.config.seeds]
            for directory in directories:
                if not directory.is_dir():
                    raise ConfigError(f"{directory}: is not there yet; finish with `r2m reward-model resume {run}`")
        else:
            self.config, directories = RewardModelConfig(), [source]
        for directory in directories:
            check_weight_files("reward model", directory)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directories[0], trust_remote_code=False)
            self.models = [load_classifier(directory, trust_remote_code=False) for directory in directories]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source}: no reward model can be loaded: {error}; {name_remedy(source)}") from None
        for model in self.models:
            scoring_head(model)

    def score(self, prompt: str | Sequence[Message], responses: Sequence[str], finished: bool = True) -> Tensor:
        """[n] float32 rewards of n responses to one prompt; `finished` whether they ended by themselves."""
        ids = [
            reward_input_ids(self.tokenizer, prompt, response, finished, self.config.data.max_tokens)
            for response in responses
        ]
        return self.score_ids(ids)

    def score_ids(self, sequences: Sequence[list[int]]) -> Tensor:
        rewards = torch.stack([score(model, sequences) for model in self.models])
        return rewards.mean(0) if self.config.ensemble.combine == "mean" else rewards.amin(0)


def seed_directory(run: Path, seed: int) -> Path:
    return run / f"seed-{seed}"

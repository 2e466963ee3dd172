"""Trained reward models that score as one: the reward of a text is the mean or the minimum of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from r2m_async.data.reward_text import Message, reward_input_ids
from r2m_async.errors import ConfigError
from r2m_async.from_scratch.pretraining import score
from r2m_async.models.pretrained import pretrained_tokenizer
from r2m_async.models.reward import head_in_float32, know_padding, load_classifier, scoring_head
from r2m_async.models.tokens import check_known, check_tokens, longest_text
from r2m_async.reward_models.config import RewardModelConfig


class RewardEnsemble:
    """Scores texts with the models of a finished run, whose `ensemble.combine` says how rewards are combined."""

    def __init__(self, source: str | Path, trust_remote_code: bool = False) -> None:
        """Loads the models and their tokenizer.

        source: a run directory of `r2m reward-model train`; or a single model with its tokenizer, as a Hugging Face
            name or a directory. A single model gets the default configuration.
        trust_remote_code: whether Python code that comes with the models' files may be run.

        Raises ConfigError if the run lacks a model that it has yet to train, if `source` is not a reward model, and if it cannot
        read the special tokens of its tokenizer or no padding token is known.
        """
        self.source = str(source)
        run = Path(source)
        if (run / "config.yaml").is_file():
            self.config = RewardModelConfig.from_yaml(run / "config.yaml")
            directories: list[str | Path] = [seed_directory(run, seed) / "model" for seed in self.config.seeds]
            for directory in directories:
                if not Path(directory).is_dir():
                    raise ConfigError(f"{directory}: is not there yet; finish with `r2m reward-model resume {run}`")
        else:
            self.config, directories = RewardModelConfig(), [source]
        self.models = [load_classifier(directory, trust=trust_remote_code) for directory in directories]
        # All models of a run start from one model, so one tokenizer serves them all.
        self.tokenizer = pretrained_tokenizer("reward model", directories[0], trust_remote_code)
        for model in self.models:
            scoring_head(model)
            check_tokens("reward model", self.source, self.tokenizer, model.config)
            know_padding(model, self.tokenizer, "reward model", self.source)
            head_in_float32(model)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text that is scored. A longer one loses the beginning of its prompt."""
        return longest_text(self.config.data.max_tokens, self.models[0].config)

    def score(self, prompt: str | Sequence[Message], responses: Sequence[str], finished: bool = True) -> Tensor:
        """Rewards [n], float32, of n responses to one prompt.

        prompt: a text, or a list of messages.
        responses: n texts.
        finished: whether the responses ended by themselves; false means that they were cut off.
        """
        return self.score_ids([self.ids(prompt, response, finished, self.max_tokens) for response in responses])

    def ids(
        self, prompt: str | Sequence[Message], response: str, finished: bool, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of a text, as `reward_input_ids` returns them. Raises DataError for a text that cannot be read:
        the chat template refuses it, or the models have no embedding for a token.
        """
        ids = reward_input_ids(self.tokenizer, prompt, response, finished, max_tokens)
        check_known(self.source, self.tokenizer, ids, self.models[0].config)
        return ids

    def score_ids(self, sequences: Sequence[list[int]]) -> Tensor:
        """Rewards [N], float32, of N texts that are given as token ids."""
        rewards = torch.stack([score(model, sequences) for model in self.models])
        return rewards.mean(0) if self.config.ensemble.combine == "mean" else rewards.amin(0)


def seed_directory(run: Path, seed: int) -> Path:
    """The folder of the model with this seed in a run directory."""
    return run / f"seed-{seed}"

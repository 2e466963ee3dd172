"""The model in training: a sequence classifier, and beside its scoring head the language-model head that GRM keeps.

Shapes: N texts, S tokens (padded), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.models.adapters import add_adapters, publications
from r2m_async.models.batches import right_padded
from r2m_async.models.loading import settled
from r2m_async.models.policy import chosen_logprobs
from r2m_async.models.pretrained import pretrained_model, pretrained_tokenizer
from r2m_async.models.reward import know_padding, save_classifier, scored_positions, two_layer_head
from r2m_async.models.tokens import check_tokens
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import TokenizedText


class RewardTrainee(nn.Module):
    """A reward model in training. It is always in eval mode, so that the backbone has no dropout.

    A parameter is trained if its `requires_grad` is true.
    """

    def __init__(self, start: str, config: RewardModelConfig) -> None:
        """Loads the model that training starts from, and gives it the head and the adapters that `config` asks for.

        start: Hugging Face name or directory.
        config: its run.seed decides the first weights of a new head and of adapters.

        Raises ConfigError for a model that cannot be loaded or trained, and if it lacks a head that the config keeps.
        """
        super().__init__()
        self.liger = config.model.liger
        self.tokenizer, self.classifier, has_head = _loaded(start, config)
        self.state_size: int = self.classifier.score.in_features
        """D. OPT-350m's is not the `hidden_size` of its config."""
        if config.head.init == "keep" and not has_head:
            raise ConfigError(
                f"head.init is 'keep' and model.start {start!r} has no head of one label; use init 'normal'"
            )
        if config.head.init != "keep":
            self.classifier.score = _new_head(self.state_size, config).to(self.classifier.dtype)
        regularized = config.loss.regularizer is not None
        self.language_model = _language_model(start, self.classifier, config) if regularized else None
        check_weights(self, "model.start", start)
        settled(self, config.run.device)
        if config.model.frozen:
            self.classifier.base_model.requires_grad_(False)
        if config.model.lora is not None:
            add_adapters(self.classifier.base_model, config.model.lora, config.run.seed)
            # peft freezes the backbone's own weights. It does not see the LM head, which is no part of the backbone.
            if self.language_model is not None:
                self.language_model.requires_grad_(False)
        self.classifier.score.requires_grad_(True)
        self._known_states: Mapping[tuple[int, ...], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.classifier.device

    def forward(
        self, texts: Sequence[TokenizedText], with_logprobs: bool = False, dropout: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rewards of N texts and, if asked for, the log-probabilities of their responses, all float32.

        texts: N texts.
        with_logprobs: whether to compute log-probabilities. The config must have a regularizer then.
        dropout: [N, D], by which the states that the head reads are multiplied. None leaves them as they are.

        Returns rewards [N], and log pi(response | prompt) [N] by the LM head or None. A log-probability is the sum over
        the tokens of the response.
        """
        if not with_logprobs:
            return self._scored(self._head_states(texts), dropout)[0], None
        assert self.language_model is not None
        ids_NS, lengths_N1, outputs = self._read(texts)
        states_NSD = outputs.last_hidden_state
        rewards_N, _ = self._scored(self._scored_states(ids_NS, states_NSD), dropout)
        # The state at one token predicts the next token: the last state predicts nothing, and nothing predicts the
        # first token.
        prompt_lens_N1 = torch.tensor([[text.prompt_len] for text in texts], device=self.device)
        place_S = torch.arange(1, ids_NS.shape[1], device=self.device)
        response = (place_S >= prompt_lens_N1) & (place_S < lengths_N1)
        chosen, _ = chosen_logprobs(self.language_model, states_NSD[:, :-1][response], ids_NS[:, 1:][response], outputs)
        return rewards_N, torch.zeros(response.shape, device=self.device).masked_scatter(response, chosen).sum(1)

    def rewards_and_states(self, texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
        """Rewards [N], float32, and the hidden states [N, D] from which the head computes them."""
        return self._scored(self._head_states(texts))

    def know_states(self, states: Mapping[tuple[int, ...], Tensor]) -> None:
        """Gives the model the hidden states of all texts that it will score, and it runs its backbone no more.

        states: the states [D] that the head reads, by the token ids of the text. The backbone must be frozen.
        """
        self._known_states = states

    def _head_states(self, texts: Sequence[TokenizedText]) -> Tensor:
        """The hidden states [N, D] that the head reads, known or computed."""
        if self._known_states is not None:
            return torch.stack([self._known_states[text.token_ids] for text in texts])
        ids_NS, _, outputs = self._read(texts)
        return self._scored_states(ids_NS, outputs.last_hidden_state)

    def _read(self, texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor, Any]:
        """Runs the backbone. Returns token ids [N, S], lengths [N, 1], and the backbone's outputs."""
        padding = self.classifier.config.get_text_config().pad_token_id
        ids_NS, mask_NS = right_padded([text.token_ids for text in texts], padding, self.device)
        outputs = self.classifier.base_model(input_ids=ids_NS, attention_mask=mask_NS.long(), use_cache=False)
        return ids_NS, mask_NS.sum(1, keepdim=True), outputs

    def _scored_states(self, ids_NS: Tensor, states_NSD: Tensor) -> Tensor:
        """The hidden states [N, D] at the token that the head reads."""
        return states_NSD[torch.arange(len(ids_NS), device=self.device), scored_positions(self.classifier, ids_NS)]

    def _scored(self, scored_ND: Tensor, dropout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rewards [N], float32, and the hidden states [N, D] that they are computed from."""
        if dropout is not None:
            scored_ND = scored_ND * dropout.to(scored_ND)
        # In float32, as the head of a run computes: bfloat16 would round many a pair of rewards to a tie.
        head = self.classifier.score
        weights = {name: weight.float() for name, weight in head.named_parameters()}
        return torch.func.functional_call(head, weights, (scored_ND.float(),)).squeeze(-1), scored_ND

    @torch.no_grad()
    def save(self, directory: Path, masters: Mapping[str, Tensor] | None = None) -> None:
        """Writes the reward model and its tokenizer into `directory`, with adapters merged into the weights.

        masters: the float32 masters of parameters, by the parameters' names. They are written in place of these, so that
            nothing of the training is lost to rounding. None writes the parameters.

        `load_classifier` reads it. `AutoModelForSequenceClassification` does, too, if the head has one layer. The LM
        head is not saved.
        """
        # `publications` names parameters as a model without adapters does, so that nobody needs peft to load the files.
        prefix = self.classifier.base_model_prefix
        weights = {f"{prefix}.{one.name}": one.whole() for one in publications(self.classifier.base_model)}
        weights |= {f"score.{name}": tensor for name, tensor in self.classifier.score.state_dict().items()}
        for name, tensor in (masters or {}).items():
            # The LM head, which may have masters too, is no part of the classifier.
            if (own := name.removeprefix("classifier.")) in weights:
                weights[own] = tensor
        save_classifier(self.classifier, directory, {name: tensor.detach().cpu() for name, tensor in weights.items()})
        self.tokenizer.save_pretrained(directory)


def _loaded(start: str, config: RewardModelConfig) -> tuple[Any, Any, bool]:
    """Loads the tokenizer and a classifier with one label. The third value says whether its head came from `start`.

    Raises ConfigError if either cannot be loaded, if the head is not one linear layer, or if there is no padding token.
    """
    classifier = pretrained_model(
        "model.start",
        start,
        "classifier",
        head="either",
        num_labels=1,
        dtype=getattr(torch, config.model.dtype),
        attention=config.model.attention,
        trust=config.model.trust_remote_code,
        liger=config.model.liger,
    )
    tokenizer = pretrained_tokenizer("model.start", start, config.model.trust_remote_code)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ConfigError(
            f"model.start {start!r}: {type(classifier).__name__} has no linear head `score`; start with a decoder model"
        )
    check_tokens("model.start", start, tokenizer, classifier.config)
    know_padding(classifier, tokenizer, "model.start", start)
    return tokenizer, classifier, classifier.has_head


def _new_head(hidden_size: int, config: RewardModelConfig) -> nn.Module:
    """A float32 head whose weights are drawn by run.seed, as `head.init` says. hidden_size: that of the states it reads."""
    two = config.head.layers == 2
    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        head = two_layer_head(hidden_size, config.head.width) if two else nn.Linear(hidden_size, 1, bias=False)
        # The layers are made with PyTorch's own first weights, which `uniform` keeps.
        for layer in head.modules() if config.head.init == "normal" else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=(layer.in_features + 1) ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return head


def _language_model(start: str, classifier: Any, config: RewardModelConfig) -> Any:
    """The causal language model of `start` without its backbone: the head, and all that it does with its logits.

    If the head shares its weight with the token embeddings, it shares that of the classifier's embeddings here. Raises
    ConfigError if `start` has no such head.
    """
    key = f"loss.regularizer is {config.loss.regularizer!r}, which keeps the language-model head of model.start; model.start"
    model = pretrained_model(
        key, start, dtype=classifier.dtype, spare=("score.",), trust=config.model.trust_remote_code
    )
    head = model.get_output_embeddings()
    # The model's own embeddings are a copy of the classifier's, and head and embeddings would train apart.
    if head.weight is model.get_input_embeddings().weight:
        head.weight = classifier.get_input_embeddings().weight
    # The backbone that computes is the classifier's.
    setattr(model, model.base_model_prefix, nn.Identity())
    return model

"""What the models of a run must be, before anything starts. `r2m check` and `r2m train` both ask it here.

No weights are read: a model is a skeleton on torch's device `meta`, and its files are compared with that by name and
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.errors import ConfigError
from r2m_async.models.loading import check_causal_unread, check_checkpointing, check_packing_unread
from r2m_async.models.pretrained import (
    pretrained_model,
    pretrained_tokenizer,
)
from r2m_async.models.tokens import (
    check_positions,
    check_tokens,
    end_of_text,
    end_of_text_by_source,
    is_special,
    unknown_token,
)
from r2m_async.trajectories import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model as far as texts are concerned."""

    key: str
    """The key of the config that names the model."""
    name: str
    """Hugging Face name or directory of the model."""
    config: Any
    """The model's config, as transformers has it."""
    tokenizer: Any
    """The model's tokenizer."""


def check_policy(name: str, config: R2MConfig) -> tuple[Reader, list[str]]:
    """Checks that a model can be the policy of a run.

    name: Hugging Face name or directory.

    Returns the model as a reader of texts, and what the user should be told about it.

    Raises ConfigError if the model cannot be loaded, or lacks weights or the attention; if its tokenizer, its embeddings
    and its end-of-text tokens contradict each other; if texts may become longer than it has positions; and if
    `model.lora` does not fit it.
    """
    key, trust = "model.policy", config.model.trust_remote_code
    model = _without_weights(key, name, config)
    tokenizer = pretrained_tokenizer(key, name, trust)
    check_tokens(key, name, tokenizer, model.config)
    _check_longest_text(key, name, model, config)
    _check_state_size(key, name, model)
    _check_passes(key, name, model, config)
    check_checkpointing(model, key, name, config)
    if config.model.lora is not None:
        from r2m_async.models.adapters import add_adapters

        add_adapters(model, config.model.lora, config.run.seed)
    return Reader(key=key, name=name, config=model.config, tokenizer=tokenizer), _ends_told(key, name, tokenizer, model)


def _without_weights(key: str, name: str, config: R2MConfig) -> Any:
    """A model of the policy's kind as the config loads it, but without its weights."""
    return pretrained_model(
        key,
        name,
        dtype=config.model.dtype,
        attention=config.model.attention,
        weightless=True,
        trust=config.model.trust_remote_code,
        liger=config.model.liger,
    )


def _check_longest_text(key: str, name: str, model: Any, config: R2MConfig) -> None:
    """Raises ConfigError if a prompt and its response may have more tokens than a model has positions."""
    prompt, new = config.rollouts.max_prompt_tokens, config.rollouts.max_new_tokens
    asked_by = f"rollouts.max_prompt_tokens is {prompt} and max_new_tokens is {new}"
    check_positions(key, name, model.config, prompt + new, asked_by)


def _check_passes(key: str, name: str, model: Any, config: R2MConfig) -> None:
    """Raises ConfigError if a language model reads a text from both ends, or mixes the texts of a packed row."""
    check_causal_unread(model, key, name, config.model.trust_remote_code)
    if config.learner.packing:
        check_packing_unread(model, key, name, config.model.trust_remote_code)


def check_reference(name: str, policy: Reader, config: R2MConfig) -> None:
    """Checks that a model can be the reference policy beside a policy. Raises ConfigError as `check_policy` does.

    Both must read the same tokens: the reference is asked for the probabilities of the policy's tokens.
    """
    key, trust = "model.reference", config.model.trust_remote_code
    model = _without_weights(key, name, config)
    _check_longest_text(key, name, model, config)
    _check_passes(key, name, model, config)
    check_same_tokens(key, name, model.config, policy, trust)


def check_same_tokens(key: str, name: str, config: Any, policy: Reader, trust: bool) -> None:
    """Raises ConfigError unless a model reads the policy's tokens, and has an embedding for each.

    config: the model's config. The two tokenizers must agree on the tokens that both have. One may have tokens that the
        other lacks, as models of one family do. An embedding may be padded beyond the tokens of the tokenizer, and the
        policy may draw such a token, too.
    trust: whether Python code in the model's files may be run.
    """
    own = pretrained_tokenizer(key, name, trust).get_vocab()
    token_of = {number: token for token, number in own.items()}
    size, needed = (one.get_text_config().vocab_size for one in (config, policy.config))
    vocabulary = policy.tokenizer.get_vocab().items()
    if size < min(needed, len(policy.tokenizer)) or any(
        token_of.get(number, token) != token for token, number in vocabulary
    ):
        raise ConfigError(
            f"{key} is {name!r} and {policy.key} is {policy.name!r}: both must read the same tokens, and their tokenizers "
            f"differ; name a model with the same tokenizer, or leave {key} out"
        )
    if size < needed:
        raise ConfigError(
            f"{key} is {name!r} and has embeddings for {size} tokens, and {policy.key} {policy.name!r} may draw one of {needed}: "
            f"resize the embeddings of {key} to {needed} (resize_token_embeddings) and save it anew"
        )


def check_reward_model(name: str, config: R2MConfig) -> Reader:
    """Checks that a model can be the reward model of a run.

    name: Hugging Face name or directory.

    Raises ConfigError if the model cannot be loaded, lacks weights or has no head of one label; if texts of several
    lengths cannot be scored together, because no padding token is known; and if `reward.max_tokens` is more than it has
    positions.
    """
    from r2m_async.models.reward import know_padding, load_classifier, scoring_head

    key, trust = "reward.model", config.reward.trust_remote_code
    model = load_classifier(name, key, dtype=config.reward.dtype, weightless=True, trust=trust)
    scoring_head(model)
    tokenizer = pretrained_tokenizer(key, name, trust)
    check_tokens(key, name, tokenizer, model.config)
    know_padding(model, tokenizer, key, name)
    if config.reward.max_tokens is not None:
        check_positions(
            key, name, model.config, config.reward.max_tokens, f"reward.max_tokens is {config.reward.max_tokens}"
        )
    return Reader(key=key, name=name, config=model.config, tokenizer=tokenizer)


def check_critic(name: str, policy: Reader, config: R2MConfig) -> None:
    """Checks that a model can be the critic of a policy, which may be the policy itself.

    Raises ConfigError if the model cannot be loaded, if its head has two layers or none, if it reads other tokens, if
    texts may become longer than it has positions, and if its layers cannot be computed again.
    """
    from r2m_async.models.critic import critic_classifier

    trust = config.model.trust_remote_code
    critic = critic_classifier(name, config, weightless=True)
    _check_longest_text("critic.model", name, critic, config)
    check_checkpointing(critic, "critic.model", name, config)
    if config.learner.packing:
        check_packing_unread(critic, "critic.model", name, trust)
    check_same_tokens("critic.model", name, critic.config, policy, trust)


def prompt_check(readers: Mapping[str, Reader]) -> Callable[[Prompt], str | None]:
    """Returns a function that says why a prompt cannot be used, or None if it can.

    readers: the models that are there, by key: `model.policy`, `reward.model`.
    """
    policy, reward = readers.get("model.policy"), readers.get("reward.model")

    def problem(prompt: Prompt) -> str | None:
        if policy and (unknown := unknown_token(prompt.token_ids, policy.config)) is not None:
            return f"its token {policy.tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) has no embedding in model.policy"
        if reward is None:
            return None
        for finished in (True, False):
            try:
                ids = reward_input_ids(reward.tokenizer, prompt.content, "x", finished)
            except TemplateRefusal as error:
                return f"the chat template of reward.model's tokenizer refuses it ({error.reason})"
            if (unknown := unknown_token(ids, reward.config)) is not None:
                token = reward.tokenizer.convert_ids_to_tokens(unknown)
                return f"its token {token!r} ({unknown}) has no embedding in reward.model"
        return None

    return problem


def _check_state_size(key: str, name: str, model: Any) -> None:
    """Raises ConfigError if the hidden states do not have the size that the config says.

    Some models (OPT-350m) project their states to another size before the language-model head.
    """
    said, read = model.config.get_text_config().hidden_size, model.get_output_embeddings().weight.shape[1]
    if said != read:
        raise ConfigError(
            f"{key}: {name!r} has hidden_size {said} in its config, and its last hidden states have {read} numbers: such a "
            f"projection is not supported; name another model"
        )


def _ends_told(key: str, name: str, tokenizer: Any, model: Any) -> list[str]:
    """Says what ends a response, if the model's files disagree about it or name an ordinary token."""
    config, generation_config = model.config, model.generation_config
    ends = end_of_text(tokenizer, config, generation_config)
    by_source = end_of_text_by_source(tokenizer, config, generation_config)
    told = {number: f"{tokenizer.convert_ids_to_tokens(number)!r} ({number})" for number in ends}
    sources = "; ".join(f"{one}: {', '.join(told[n] for n in named) or 'none'}" for one, named in by_source.items())
    notes = []
    if not all(set(named) in (set(), set(ends)) for named in by_source.values()):
        notes.append(
            f"{key}: its files name different end-of-text tokens ({sources}); each of {', '.join(told.values())} ends a "
            f"response"
        )
    for number in ends:
        if not is_special(tokenizer, number):
            notes.append(
                f"{key}: {told[number]} ends a response, and to the tokenizer it is an ordinary token ({sources}); if nobody "
                f"meant that, correct eos_token_id in config.json and generation_config.json"
            )
    return notes


def shown(prompt: Prompt, readers: Mapping[str, Reader]) -> list[str]:
    """Shows a prompt as the models of a run read it, in a few lines. readers: as in `prompt_check`, with the policy."""
    policy, reward = readers["model.policy"], readers.get("reward.model")
    tokens = policy.tokenizer.convert_ids_to_tokens(list(prompt.token_ids))
    lines = [
        f"the first prompt, {prompt.prompt_id}:",
        f"  the policy reads        {prompt.text!r}",
        f"  as {len(tokens)} tokens  {' '.join(map(repr, tokens))}",
    ]
    if reward:
        ids = reward_input_ids(reward.tokenizer, prompt.content, "RESPONSE", finished=True)
        lines.append(f"  the reward model reads  {reward.tokenizer.decode(ids)!r}")
    return lines

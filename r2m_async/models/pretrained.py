"""Loads what others have trained: models, their configs and their tokenizers. Every command loads them here.

transformers forgives what a run cannot use. It draws weights at random that the files lack, leaves out weights that it
does not know, and says so in a report that nobody reads. Here such a model is refused, and the weights are named.

`key` is what the user calls the model in the config or on the command line, such as `model.policy`. `name` is what he
gave for it: a name at Hugging Face, or a directory. `trust` is whether Python code in the model's files may be run: the
user has then set `trust_remote_code`. Without it such a model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError

from r2m_async.errors import ConfigError
from r2m_async.models.liger import apply_liger, check_family
from r2m_async.models.weight_files import check_tied_weights, check_weight_files

Kind = Literal["language model", "classifier"]
"""A causal language model, or a sequence classifier: a decoder with a head `score`."""
Head = Literal["kept", "new", "either"]
"""What is expected of a classifier's head. `kept`: its weights must be in the files. `new`: the caller replaces it.
`either`: the caller asks `has_head`."""

_LANGUAGE_MODEL_HEADS = ("lm_head.", "embed_out.")
"""How the weights of a language model's head begin. A classifier has no use for them."""
_CLASSIFIER_HEAD = "score."
_FAILURES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,  # for a value of another type in config.json
)
"""What transformers raises for files that it cannot use."""
_SAMPLES = (
    "Hello world, it's 2024!",
    " two  spaces\n\n\ttab",
    "Größe 3.14 naïve café",
    "def f(x): return x+1",
    "你好 мир",
)
"""Texts by which a loaded tokenizer is held against its own tokenizer.json."""
_SHOWN = 6
"""The most weights that a message names."""


def pretrained_config(key: str, name: str | Path, fetch: bool = True, trust: bool = False) -> Any:
    """Returns the config of a model, as transformers has it. Weights are not read.

    fetch: whether a model that is not on this machine may be looked up at Hugging Face. If not, the result for such a
        model is None.

    Raises ConfigError if there is no such model, or if it is of a sort that cannot be used here: quantised weights,
    adapters without their model, an encoder-decoder, an architecture that transformers does not have, or one whose code
    comes with it if that is not trusted.
    """
    from transformers import AutoConfig

    if Path(name, "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {str(name)!r} holds adapters (adapter_config.json) and is no model by itself: merge them into their "
            f"base model (peft's merge_and_unload), and name what you save then"
        )
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=not fetch, trust_remote_code=trust)
    except _FAILURES as error:
        if isinstance(error, OSError) and not fetch and not Path(name).exists():
            return None
        raise _refusal(key, name, trust, error) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{key}: {str(name)!r} has quantised weights (quantization_config in its config.json), which cannot be trained "
            f"or compared bit for bit: name the model without quantisation"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{key}: {str(name)!r} is an encoder-decoder ({config.model_type}): prompt and response must be one text that a "
            f"decoder reads; name a decoder-only model"
        )
    text_config = config.get_text_config()
    pad, rows = getattr(text_config, "pad_token_id", None), getattr(text_config, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:
        raise ConfigError(
            f"{key}: {str(name)!r} has pad_token_id {pad} in its config.json and embeddings for {rows} tokens: resize the "
            f"embeddings (resize_token_embeddings) and save the model anew, or correct pad_token_id"
        )
    return config


def pretrained_generation_config(key: str, name: str | Path, trust: bool = False) -> Any:
    """Returns the generation config that transformers would give the model, without loading the model.

    A model without generation_config.json gets one made from its config.json. Raises ConfigError as `pretrained_config`,
    and if generation_config.json cannot be read: transformers would pass over it, and over its end-of-text tokens.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    try:
        return GenerationConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        how = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        if cached_file(name, "generation_config.json", local_files_only=True, **how) is not None:
            raise ConfigError(
                f"{key}: {str(name)!r}: its generation_config.json cannot be read: {_first_line(error)}; correct it, or take "
                f"it out"
            ) from None
        return GenerationConfig.from_model_config(pretrained_config(key, name, trust=trust))


def pretrained_tokenizer(key: str, name: str | Path, trust: bool = False) -> Any:
    """Returns the tokenizer of a model.

    Raises ConfigError if there is none, if it cannot be loaded, or if transformers makes another of its files than they
    describe.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        # For some kinds of models transformers returns a tokenizer without tokens if there are no files.
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ValueError("its files name no tokens but special ones")
    except _FAILURES as error:
        pretrained_config(key, name, trust=trust)  # which tells of a model that is not there at all
        if _wants_trust(error, trust):
            raise _refusal(key, name, trust, error) from None
        raise ConfigError(
            f"{key}: {str(name)!r} has no tokenizer that can be loaded: {_first_line(error)}; save the model's tokenizer "
            f"beside it"
        ) from None
    _check_as_saved(key, name, tokenizer)
    return tokenizer


def _check_as_saved(key: str, name: str | Path, tokenizer: Any) -> None:
    """Raises ConfigError if a tokenizer makes other tokens of a text than its own tokenizer.json says.

    transformers builds the tokenizers of some kinds of models (Qwen2 is one) anew from the vocabulary alone. It then
    passes over how tokenizer.json splits and normalises a text.
    """
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    how = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(name, "tokenizer.json", local_files_only=True, **how)
    if path is None:
        return
    saved = Tokenizer.from_file(path)
    saved.no_truncation()
    saved.no_padding()
    for text in _SAMPLES:
        ours, theirs = (
            tokenizer(text, add_special_tokens=False)["input_ids"],
            saved.encode(text, add_special_tokens=False).ids,
        )
        if ours != theirs:
            raise ConfigError(
                f"{key}: {str(name)!r}: transformers reads {text!r} as the tokens {tokenizer.convert_ids_to_tokens(ours)}, and "
                f"tokenizer.json says {tokenizer.convert_ids_to_tokens(theirs)}: it builds another tokenizer for "
                f'{type(tokenizer).__name__} than was saved; write "tokenizer_class": "PreTrainedTokenizerFast" into '
                f"tokenizer_config.json"
            )


def pretrained_model(
    key: str,
    name: str | Path,
    kind: Kind = "language model",
    *,
    dtype: Any = "auto",
    attention: str | None = None,
    head: Head = "kept",
    spare: tuple[str, ...] = (),
    weightless: bool = False,
    trust: bool = False,
    liger: bool = False,
    **how: Any,
) -> Any:
    """Loads a model, and makes sure that all its weights come from the files.

    kind: what the model is loaded as.
    dtype: number format of the weights. `auto` is that of the files.
    attention: name of the attention implementation in transformers. None leaves the choice to transformers.
    head: what is expected of a classifier's head. A language model's head is always kept.
    spare: beginnings of the names of weights that the files may have besides. For a classifier, those of the head of a
        language model always are.
    trust: as in the module's text. The result then has a class of the model's own.
    weightless: True checks all that loading checks, but reads no weights: the parameters are on torch's device `meta`.
    liger: whether its norms and gated layers compute with the kernels of liger-kernel.
    how: further arguments of transformers' `from_pretrained`.

    The result has the attribute `has_head`: whether its head came from the files.

    Raises ConfigError if the model cannot be loaded, if the files lack a weight or have one that the model does not
    know, if a weight has another shape, and if the model lacks the attention or the kernels.
    """
    import transformers

    check_weight_files(key, name)
    attention = _attention(key, name, pretrained_config(key, name, trust=trust), attention)
    if kind == "language model":
        pretrained_generation_config(key, name, trust)  # transformers would pass over one that is damaged
    auto = {
        "language model": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[kind]
    if attention is not None:
        how["attn_implementation"] = attention
    if weightless:
        how["device_map"] = "meta"
    try:
        with quiet():
            model, report = auto.from_pretrained(
                name,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                trust_remote_code=trust,
                **how,
            )
    except _FAILURES as error:
        raise _loading_failure(key, name, attention, trust, error) from None
    if kind == "language model" and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tied = getattr(model, "_tied_weights_keys", None) or {}
        # Files may have the head under an older name, which transformers translates.
        older = {
            f"{head}weight": tied[one] for one in tied for head in _LANGUAGE_MODEL_HEADS if one == "lm_head.weight"
        }
        check_tied_weights(key, name, tied | older)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.return_dict = True  # a config.json may ask for tuples, and all that computes here reads names
    missing, unexpected, mismatched = (
        _names(report[f"{what}_keys"]) for what in ("missing", "unexpected", "mismatched")
    )
    drawn = {one for one in missing | mismatched if one.startswith(_CLASSIFIER_HEAD)} if kind == "classifier" else set()
    model.has_head = not drawn
    if head != "kept":
        missing, mismatched = missing - drawn, mismatched - drawn
    spare += _LANGUAGE_MODEL_HEADS if kind == "classifier" else ()
    unexpected = {one for one in unexpected if not one.startswith(spare)}
    _check_report(key, name, model, kind, missing, unexpected, mismatched)
    if liger:
        check_family(key, name, model)
        if not weightless:
            apply_liger(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and loading reports from the user, within the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Not where nothing would change: each change goes through all loggers of the process, thousands with vLLM and Ray.
    changed = level < logging.ERROR
    if changed:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if changed:
            logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _attention(key: str, name: str | Path, config: Any, attention: str | None) -> str | None:
    """Returns the attention to load a model with. Raises ConfigError for one that computes another model.

    transformers' `sdpa` passes over a cap of the attention's logits (Gemma 2). It is also what transformers chooses by
    itself.
    """
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is None or attention not in (None, "sdpa"):
        return attention
    if attention is None:
        return "eager"
    raise ConfigError(
        f"model.attention is 'sdpa' and {key} is {str(name)!r}, whose config.json caps the attention's logits "
        f"(attn_logit_softcapping {cap}): transformers' sdpa leaves the cap out without a word; use model.attention 'eager', or "
        f"flash_attention_2 on a GPU"
    )


def _names(keys: Iterable[Any]) -> set[str]:
    """The names of weights in transformers' report, where a name may stand in a tuple with its shapes."""
    return {str(one[0] if isinstance(one, tuple) else one) for one in keys}


def _check_report(
    key: str, name: str | Path, model: Any, kind: Kind, missing: set[str], unexpected: set[str], mismatched: set[str]
) -> None:
    """Raises ConfigError if weights of the files and of the model differ."""
    said = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("lack", missing),
            ("also have, and the model does not know,", unexpected),
            ("have in another shape", mismatched),
        )
        if names
    ]
    if not said:
        return
    reason = f"its files {', and '.join(said)}"
    if kind == "language model" and any(one.startswith(_CLASSIFIER_HEAD) for one in unexpected):
        remedy = "these are the files of a reward model: name a causal language model"
    elif kind == "language model" and any(one.startswith(_LANGUAGE_MODEL_HEADS) for one in missing):
        remedy = "it has no language-model head to keep: name a causal language model"
    elif kind == "classifier" and any(one.startswith(_CLASSIFIER_HEAD) for one in missing | mismatched):
        remedy = (
            "without its trained head it is no reward model: name one that was saved with its head `score`, or train one "
            "with `r2m reward-model train`"
        )
    else:
        remedy = "transformers would draw what is lacking at random: save the model anew with all its weights, or name another"
    raise ConfigError(f"{key}: {str(name)!r} is loaded as a {type(model).__name__}, and {reason}; {remedy}")


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more weights"


def _loading_failure(
    key: str, name: str | Path, attention: str | None, trust: bool, error: BaseException
) -> ConfigError:
    """The error for a model that transformers refuses to load. It names the attention if that is the reason."""
    said = str(error)
    lacks_kernels = isinstance(error, ImportError) and any(
        word in said.lower() for word in ("attn", "attention", "kernels")
    )
    if attention is not None and (lacks_kernels or "attn_implementation" in said or attention in said):
        reason, others = _first_line(error).partition(". ")[0], "eager" if attention == "sdpa" else "sdpa or eager"
        return ConfigError(f"model.attention is {attention!r} and {key} is {str(name)!r}: {reason}; use {others}")
    return _refusal(key, name, trust, error)


def _refusal(key: str, name: str | Path, trust: bool, error: BaseException) -> ConfigError:
    if _wants_trust(error, trust):
        switch = f"{'reward' if key.startswith('reward.') else 'model'}.trust_remote_code"
        return ConfigError(
            f"{key}: {str(name)!r} comes with Python code of its own (auto_map), and cannot be loaded without it. That code "
            f"can do here all that you can. Read it; if you trust it, set {switch} true in the config, or give a command "
            f"without config --trust-remote-code (in Python: trust_remote_code=True)"
        )
    if trust and brings_code(name):
        remedy = (
            "its own Python code (auto_map) may not fit this version of transformers, or lack a package; ask its author"
        )
    elif isinstance(error, ImportError):
        remedy = "install it in this environment"
    elif Path(name).exists():
        remedy = "look at its files, or correct the name"
    else:
        remedy = f"there is no such directory either (now in {Path.cwd()}); correct the name"
    return ConfigError(f"{key}: {str(name)!r} cannot be loaded: {_first_line(error)}; {remedy}")


def brings_code(name: str | Path, file: str = "config.json") -> bool:
    """Returns whether a file of a model names Python code (`auto_map`) that comes with the model.

    file: `config.json`, or `tokenizer_config.json` for the tokenizer. Only files on this machine are read.
    """
    from transformers.utils import cached_file

    how = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = cached_file(name, file, local_files_only=True, **how)
        return path is not None and "auto_map" in json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _wants_trust(error: BaseException, trust: bool) -> bool:
    """Whether transformers refuses a model or a tokenizer because the code that comes with it is not trusted."""
    # Code that is trusted may itself load a model, and forget to say so.
    return not trust and "trust_remote_code" in str(error)


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError):  # its first line has the field, and the second what is wrong with it
        return " ".join(str(error).split())[:300]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

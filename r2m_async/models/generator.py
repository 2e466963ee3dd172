"""Answers of a policy that does not change: what an engine is asked and returns, and transformers as an engine.

vLLM as an engine is `actors.vllm_offline`. Groups of a ring are sampled in `generation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    token_ids: tuple[int, ...]
    temperature: float
    """Zero is greedy."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    token_ids: tuple[int, ...]
    """The response without its end-of-text token."""
    finished: bool
    """Whether it ended by itself."""


class Generator(Protocol):
    """A policy that is loaded; answers come in the order of requests."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedText]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    path: str
    tokenizer: Any
    context: int
    """Tokens of prompt and response together, at most."""
    max_new_tokens: int
    max_requests: int
    """At once."""
    dtype: str
    tensor_parallel: int


class TransformersGenerator:
    """One prompt after the other: an answer depends on its own prompt and seed alone."""

    def __init__(self, options: GeneratorOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from r2m_async.finite import check_weights
        from r2m_async.models.generation import eos_ids

        self._max_new_tokens = options.max_new_tokens
        model = AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype)
        check_weights(model, "MODEL", options.path)
        self._eos = eos_ids(model.generation_config, options.tokenizer)
        model.generation_config = GenerationConfig()  # its own sampling settings
        self._model: Any = model.eval()
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedText]:
        from r2m_async.models.loading import one_thread

        with one_thread():
            return [self._generate(request) for request in requests]

    def _generate(self, request: GenerationRequest) -> GeneratedText:
        import torch
        from transformers import GenerationConfig

        how = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._eos,
            pad_token_id=self._eos[0],
            **(how if request.temperature > 0 else {"do_sample": False}),
        )
        prompt = torch.tensor([request.token_ids], device=self._model.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(request.seed)
            row = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0]
        ids = row[len(request.token_ids) :].tolist()
        finished = bool(ids) and ids[-1] in self._eos
        return GeneratedText(token_ids=tuple(ids[:-1] if finished else ids), finished=finished)

    def close(self) -> None:
        del self._model

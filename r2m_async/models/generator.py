"""The interface of an engine that generates with a fixed policy, and such an engine on transformers.

`r2m eval generate` uses it. The engine on vLLM is `actors.vllm_offline`. Training samples its groups elsewhere, in
`generation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to answer, and how to sample the answer."""

    token_ids: tuple[int, ...]
    """The prompt, as tokens of the policy."""
    temperature: float
    """The logits are divided by it. Zero means greedy decoding."""
    seed: int
    """Seeds the random numbers of this answer alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """The response to one request."""

    token_ids: tuple[int, ...]
    """The response, without its end-of-text token."""
    finished: bool
    """True if the policy ended the text itself, False if the limit of length cut it."""


class Generator(Protocol):
    """An engine that holds a loaded policy."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedText]:
        """Answers all requests, and returns the responses in the order of the requests."""
        ...

    def close(self) -> None:
        """Releases the policy. The engine cannot be used afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """How an engine loads a policy and how much it generates. The engine on transformers needs only some of these."""

    path: str
    """HF name or directory of the policy."""
    tokenizer: Any
    """The policy's tokenizer, already loaded."""
    context: int
    """The most tokens that a prompt and its response may have together."""
    max_new_tokens: int
    """The most tokens that a response may have, end of text included."""
    max_requests: int
    """The most requests that one call of `generate` brings."""
    dtype: str
    """The dtype of the weights, by its name in torch or `auto`."""
    tensor_parallel: int
    """The number of GPUs that share the policy."""
    trust: bool = False
    """Whether Python code in the policy's files may be run."""


class TransformersGenerator:
    """A `Generator` on transformers. It answers one prompt at a time.

    So an answer depends on its own prompt, temperature and seed, and not on the other requests.
    """

    def __init__(self, options: GeneratorOptions) -> None:
        """Loads the policy onto the GPU if there is one. It reads `path`, `tokenizer`, `max_new_tokens` and `dtype`.

        Raises ConfigError if a weight is not finite.
        """
        import torch
        from transformers import GenerationConfig

        from r2m_async.finite import check_weights
        from r2m_async.models.pretrained import pretrained_model
        from r2m_async.models.tokens import end_of_text

        self._max_new_tokens = options.max_new_tokens
        model = pretrained_model("MODEL", options.path, dtype=options.dtype, trust=options.trust)
        check_weights(model, "MODEL", options.path)
        self._eos = list(end_of_text(options.tokenizer, model.config, model.generation_config))
        model.generation_config = GenerationConfig()  # drops the sampling settings that came with the model
        self._model: Any = model.eval()
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedText]:
        """Answers all requests, and returns the responses in the order of the requests."""
        from r2m_async.cpu_threads import one_thread

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
        # `generate` draws from torch's global generators. They are seeded here, and the fork restores them.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(request.seed)
            row = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0]
        ids = row[len(request.token_ids) :].tolist()
        finished = bool(ids) and ids[-1] in self._eos
        return GeneratedText(token_ids=tuple(ids[:-1] if finished else ids), finished=finished)

    def close(self) -> None:
        """Drops the model, so that its memory can be used again."""
        del self._model

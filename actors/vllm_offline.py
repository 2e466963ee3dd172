"""vLLM's offline `LLM`, for `r2m eval generate`. The policy does not change, and all prompts are known at the start.

vLLM runs in this process if one GPU, or none, is enough. Its worker is the one of the rollouts. vLLM's own worker on a
CPU fails if a request has a seed and its prompt is split over two steps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput

from actors.vllm_drivers import leave_transformers_alone
from actors.vllm_engine import cpu_options
from r2m_async.models.generator import GeneratedText, GenerationRequest, GeneratorOptions
from r2m_async.models.pretrained import pretrained_config, pretrained_generation_config
from r2m_async.models.tokens import end_of_text

_MAX_SEQUENCES = 256
"""The most responses that vLLM generates at once."""


class OfflineVLLM:
    """A `Generator` (`r2m_async.models.generator`) on vLLM."""

    def __init__(self, options: GeneratorOptions) -> None:
        """Loads the policy at `options.path`."""
        if options.tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._max_new_tokens = options.max_new_tokens
        configs = (
            load("MODEL", options.path, trust=options.trust)
            for load in (pretrained_config, pretrained_generation_config)
        )
        self._eos = list(end_of_text(options.tokenizer, *configs))
        num_sequences = min(options.max_requests, _MAX_SEQUENCES)
        on_cpu = {}
        if not torch.cuda.is_available():
            on_cpu = cpu_options(options.path, options.dtype, options.context, num_sequences, options.trust)
            leave_transformers_alone()
        self._llm = LLM(
            model=options.path,
            dtype=options.dtype,
            trust_remote_code=options.trust,
            generation_config="vllm",  # leaves the checkpoint's own sampling settings out
            max_model_len=options.context,
            max_num_seqs=num_sequences,
            tensor_parallel_size=options.tensor_parallel,
            enable_prefix_caching=False,  # a resumed command starts with an empty cache and should compute the same
            worker_cls="actors.vllm_worker.EngineWorker",
            use_tqdm_on_load=False,
            **on_cpu,
        )

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedText]:
        """Generates an answer to every request. Returns the answers in the order of the requests."""
        params = [
            SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=self._max_new_tokens,
                stop_token_ids=self._eos,
                ignore_eos=True,  # only the tokens above end an answer
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(request.token_ids)) for request in requests]
        completed = self._llm.generate(prompts, params, use_tqdm=False)
        return [self._text(one.outputs[0]) for one in completed]

    def _text(self, output: CompletionOutput) -> GeneratedText:
        """An answer without the end-of-text token with which a finished one ends."""
        ids, finished = tuple(output.token_ids), output.finish_reason == "stop"
        return GeneratedText(token_ids=ids[:-1] if finished else ids, finished=finished)

    def close(self) -> None:
        """Shuts vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()

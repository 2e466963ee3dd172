"""Best-of-n: what a reward model's favourite among n samples is worth, against n's KL (`r2m bon`; GRM Sec. 5.2, Fig. 2).

    OUT/table.md, OUT/results.json, OUT/best_of_n.png, and OUT/pool.jsonl where the samples were drawn here

One pool of N samples per prompt serves every n. `best_of_n` is the mean over all C(N, n) subsets of the value of the
subset's favourite, which is unbiased for n independent samples; the subsets are never listed, since the sample of rank
i (1 is the lowest reward) is the favourite of C(i - 1, n - 1) of them. Rewards are shown less their value at n = 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r2m_async.data.records import Record, load_records
from r2m_async.evaluation.ranked_prompts import RankedPrompt, Response, ranked
from r2m_async.runs.results import markdown_table, write_results
from r2m_async.whole import write_file

if TYPE_CHECKING:
    from r2m_async.from_scratch.embedded import EmbeddedModels

MAX_N = 405
"""The papers'."""
NUM_POINTS = 17
SAMPLES_PER_PASS = 1024

Array = NDArray[np.float64]


# The estimate


def best_of_n(rewards: ArrayLike, values: ArrayLike, n: int) -> float:
    """The expected value of the sample with the highest reward among n.

    rewards, values: [N], of one pool of independent samples; with `values` the rewards themselves, their expected maximum.
    n: 1 to N. Samples of equal reward are each other's equals: one of them is taken at random.
    """
    rewards_N, values_N = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if rewards_N.shape != values_N.shape or rewards_N.ndim != 1:
        raise ValueError(f"rewards and values must have one shape [N], got {rewards_N.shape} and {values_N.shape}")
    order = np.argsort(rewards_N, kind="stable")
    _, tie_N = np.unique(rewards_N[order], return_inverse=True)
    shared_N = (np.bincount(tie_N, weights=values_N[order]) / np.bincount(tie_N))[tie_N]
    return float(best_of_n_weights(len(rewards_N), n) @ shared_N)


def best_of_n_weights(num_samples: int, n: int) -> Array:
    """[N], C(i - 1, n - 1) / C(N, n) for ranks i = 1 ... N: the chance that rank i is the highest of n without replacement."""
    from scipy.special import gammaln

    if not 1 <= n <= num_samples:
        raise ValueError(f"n = {n}: the best of n is estimated from at least n samples, and there are {num_samples}")
    ranks_N = np.arange(1, num_samples + 1, dtype=np.float64)
    ranks_N = ranks_N[n - 1 :]  # no lower one can be the highest of n
    log_favoured = gammaln(ranks_N) - gammaln(ranks_N - n + 1) - gammaln(n)
    log_subsets = gammaln(num_samples + 1) - gammaln(num_samples - n + 1) - gammaln(n + 1)
    return np.concatenate([np.zeros(n - 1), np.exp(log_favoured - log_subsets)])


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: KL(best of n || policy) where no two responses have one reward, else an upper bound."""
    return math.log(n) - (n - 1) / n


def sizes(max_n: int) -> list[int]:
    """About NUM_POINTS values of n from 1 to `max_n`, evenly spread over log n."""
    return sorted({round(max_n ** (place / (NUM_POINTS - 1))) for place in range(NUM_POINTS)})


def curves(rewards: Sequence[ArrayLike], golds: Sequence[ArrayLike], ns: Sequence[int]) -> dict[str, list[float]]:
    """Means over prompts and their standard errors at each n, less the value at n = 1.

    rewards, golds: per prompt [N], N its own and at least max(ns).
    """
    told: dict[str, list[float]] = {}
    for name, values in (("proxy", rewards), ("gold", golds)):
        gains_PM = np.array(
            [
                [best_of_n(rewards_N, values_N, n) - best_of_n(rewards_N, values_N, 1) for n in ns]
                for rewards_N, values_N in zip(rewards, values, strict=True)
            ]
        )
        num = len(gains_PM)
        told[name] = gains_PM.mean(0).tolist()
        told[f"{name}_se"] = (gains_PM.std(0, ddof=1) / math.sqrt(num) if num > 1 else gains_PM[0] * math.nan).tolist()
    return told


# Pools


def embedded_pool(models: EmbeddedModels, seed: int, num_prompts: int, num_samples: int) -> tuple[RankedPrompt, ...]:
    """The embedded policy's samples on held-out prompts with the language's gold rewards, a function of the arguments."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r2m_async.from_scratch import language
    from r2m_async.from_scratch.embedded import sample_policy

    policy, tokenizer = (kind.from_pretrained(models.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    pool = []
    for number, prompt in enumerate(language.prompts(num_prompts, seed, held_out=True)):
        samples = []
        for part, start in enumerate(range(0, num_samples, SAMPLES_PER_PASS)):
            # Each its own seed, none of which the preferences' samples have.
            of_part = 2_000_000 + 1_000_000 * seed + 1000 * number + part
            count = min(SAMPLES_PER_PASS, num_samples - start)
            samples += sample_policy(policy, tokenizer, [prompt], samples_per_prompt=count, seed=of_part)[0]
        pool.append(ranked(prompt, [Response(text=one.response, finished=one.finished) for one in samples]))
    return tuple(pool)


def load_pool(path: str | Path) -> tuple[RankedPrompt, ...]:
    """JSONL of `prompt`, `responses` (texts) and, as long, `golds` (numbers; absent: NaN) and `finished` (absent: true).

    Raises `DataError`.
    """

    def parse(record: Record) -> RankedPrompt:
        fields = record.fields()
        responses = _list(record, "responses", record.field("responses"), str)
        num = len(responses)
        golds = _list(record, "golds", fields.get("golds", [math.nan] * num), float, num)
        finished = _list(record, "finished", fields.get("finished", [True] * num), bool, num)
        texts = tuple(Response(text=text, finished=end) for text, end in zip(responses, finished, strict=True))
        return RankedPrompt(prompt=record.content("prompt"), responses=texts, golds=tuple(map(float, golds)))

    return load_records(str(path), "train", parse)[0]


def write_pool(pool: Sequence[RankedPrompt], path: Path) -> None:
    """For `load_pool`."""
    records = [
        {
            "prompt": one.prompt,
            "responses": [response.text for response in one.responses],
            "finished": [response.finished for response in one.responses],
            "golds": list(one.golds),
        }
        for one in pool
    ]
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def _list(record: Record, key: str, value: Any, kind: type, length: int | None = None) -> list[Any]:
    """A JSON list of str, bool or float, of this length or of any but 0."""

    def fits(one: Any) -> bool:
        return (isinstance(one, int | float) and not isinstance(one, bool)) if kind is float else isinstance(one, kind)

    if not (isinstance(value, list) and value and length in (None, len(value)) and all(map(fits, value))):
        why = f"not a list of {'one or more' if length is None else length} of type {kind.__name__}"
        raise record.refusal("wrong_type", key, value, why, "write one per response")
    return value


# The command


def measure_best_of_n(
    models: Sequence[str],
    pool: Sequence[RankedPrompt],
    gold: str | None = None,
    max_n: int = MAX_N,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Results by name: `ns`, `kl`, and per model its `curves`.

    models, gold: as `reward_evaluation.evaluate` takes them; `gold` judges in place of the pool's own golds.
    Raises ConfigError for what cannot be loaded, for a pool with fewer than `max_n` samples and for one without golds.
    """
    from r2m_async.errors import ConfigError
    from r2m_async.models.loading import one_thread

    fewest = min(len(one.responses) for one in pool)
    if not 1 <= max_n <= fewest:
        raise ConfigError(
            f"n = {max_n}: a prompt of the pool has {fewest} samples; give at least n of them, or a lower --n"
        )
    if gold is None and not all(map(math.isfinite, (value for one in pool for value in one.golds))):
        raise ConfigError(
            "golds: the pool has samples without a gold reward; add it to the file, or name a judge as --gold"
        )
    ns = sizes(max_n)
    with one_thread():
        golds = [one.golds for one in pool] if gold is None else _rewards(gold, pool, max_tokens)
        results = {model: curves(_rewards(model, pool, max_tokens), golds, ns) for model in models}
    return {
        "ns": ns,
        "kl": [best_of_n_kl(n) for n in ns],
        "num_prompts": len(pool),
        "num_samples": fewest,
        "gold": gold,
        "models": results,
    }


def write_best_of_n(results: Mapping[str, Any], out: Path) -> str:
    """Writes OUT's files; returns the table."""
    from r2m_async.evaluation.plots import plot_best_of_n

    told = table(results)
    write_results(out, results, told)
    plot_best_of_n(results, out / "best_of_n.png", band="se")
    return told


def table(results: Mapping[str, Any]) -> str:
    """Markdown; gains over one sample, ± a standard error over prompts."""
    models = results["models"]
    head = ["n", "KL", *(f"{model}: {name} ± SE" for model in models for name in ("proxy", "gold"))]
    rows = []
    for place, (n, kl) in enumerate(zip(results["ns"], results["kl"], strict=True)):
        values = [
            f"{one[name][place]:.3f} ± {one[f'{name}_se'][place]:.3f}"
            for one in models.values()
            for name in ("proxy", "gold")
        ]
        rows.append([n, f"{kl:.2f}", *values])
    return markdown_table(head, rows)


def _rewards(model: str, pool: Sequence[RankedPrompt], max_tokens: int | None) -> list[Array]:
    """[N] per prompt."""
    from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble

    texts = [(one.prompt, response.text, response.finished) for one in pool for response in one.responses]
    rewards = TextScorer(load_ensemble(model, max_tokens)).rewards(texts)
    return np.split(rewards, np.cumsum([len(one.responses) for one in pool])[:-1])

"""Best-of-n: how good a reward model's favourite among n samples is, against n's KL (`r2m bon`; GRM Sec. 5.2, Fig. 2).

    OUT/table.md, OUT/results.json, OUT/best_of_n.png, and OUT/pool.jsonl if the samples were drawn here

The favourite is the sample with the highest reward. One pool of N samples per prompt serves every n: `best_of_n` is the
mean, over all C(N, n) subsets of n samples, of the value of the subset's favourite. This is unbiased if the samples are
independent. The subsets are never listed. The sample of rank i, where 1 is the lowest reward, is the favourite of
C(i - 1, n - 1) subsets, so it enters the mean with that weight.

Results are gains: the value at n minus the value at n = 1.
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
from r2m_async.models.pretrained import pretrained_model, pretrained_tokenizer
from r2m_async.runs.results import markdown_table, write_results
from r2m_async.whole import write_file

if TYPE_CHECKING:
    from r2m_async.from_scratch.word_models import EmbeddedModels

MAX_N = 405
"""The largest n in the papers."""
NUM_POINTS = 17
"""Number of values of n on a curve, before equal ones are merged."""
SAMPLES_PER_PASS = 1024
"""Limit on the samples that are drawn in one batch."""

Array = NDArray[np.float64]


# The estimate


def best_of_n(rewards: ArrayLike, values: ArrayLike, n: int) -> float:
    """The expected value of the favourite among n samples, that is, of the sample with the highest reward.

    rewards: [N], of one pool of independent samples.
    values: [N], what each sample is worth. If these are the rewards again, the result is the expected highest reward.
    n: 1 to N.

    Among samples with equal rewards each is the favourite with the same chance. Raises ValueError for shapes that
    differ, and for another n.
    """
    rewards_N, values_N = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if rewards_N.shape != values_N.shape or rewards_N.ndim != 1:
        raise ValueError(f"rewards and values must have one shape [N], got {rewards_N.shape} and {values_N.shape}")
    order = np.argsort(rewards_N, kind="stable")
    _, tie_N = np.unique(rewards_N[order], return_inverse=True)
    # Samples with equal rewards share the mean of their values, so their order among themselves does not matter.
    shared_N = (np.bincount(tie_N, weights=values_N[order]) / np.bincount(tie_N))[tie_N]
    return float(best_of_n_weights(len(rewards_N), n) @ shared_N)


def best_of_n_weights(num_samples: int, n: int) -> Array:
    """[N], for ranks i = 1 ... N: C(i - 1, n - 1) / C(N, n).

    This is the chance that rank i is the highest of n ranks drawn without replacement. Raises ValueError unless n is 1
    to N.
    """
    from scipy.special import gammaln

    if not 1 <= n <= num_samples:
        raise ValueError(f"n = {n}: the best of n is estimated from at least n samples, and there are {num_samples}")
    ranks_N = np.arange(1, num_samples + 1, dtype=np.float64)
    ranks_N = ranks_N[n - 1 :]  # a lower rank cannot be the highest of n
    # The binomials themselves overflow float64 for large N; their ratio does not.
    log_favoured = gammaln(ranks_N) - gammaln(ranks_N - n + 1) - gammaln(n)
    log_subsets = gammaln(num_samples + 1) - gammaln(num_samples - n + 1) - gammaln(n + 1)
    return np.concatenate([np.zeros(n - 1), np.exp(log_favoured - log_subsets)])


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: KL(best of n || policy).

    It is exact if no two responses have the same reward. Otherwise it is an upper bound.
    """
    return math.log(n) - (n - 1) / n


def sizes(max_n: int) -> list[int]:
    """About NUM_POINTS values of n from 1 to `max_n`, evenly spaced on a logarithmic scale."""
    return sorted({round(max_n ** (place / (NUM_POINTS - 1))) for place in range(NUM_POINTS)})


def curves(rewards: Sequence[ArrayLike], golds: Sequence[ArrayLike], ns: Sequence[int]) -> dict[str, list[float]]:
    """Gains of the best of n over one sample: means over prompts, and their standard errors.

    rewards, golds: for each prompt an array [N]. N may differ between prompts, and is at least max(ns).
    ns: values of n.

    Returns lists with a number for each n: `proxy` and `proxy_se` of the rewards, `gold` and `gold_se` of the golds.
    The standard errors of a single prompt are NaN.
    """
    told: dict[str, list[float]] = {}
    for name, values in (("proxy", rewards), ("gold", golds)):
        # The difference is taken prompt by prompt, so that the errors do not contain how prompts differ at n = 1.
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
    """Samples of the embedded policy on held-out prompts, with gold rewards.

    They are a function of the arguments alone.

    num_samples: samples per prompt.
    """
    from r2m_async.from_scratch import language
    from r2m_async.from_scratch.embedded import sample_policy

    policy, tokenizer = (load("policy", models.policy) for load in (pretrained_model, pretrained_tokenizer))
    pool = []
    for number, prompt in enumerate(language.prompts(num_prompts, seed, held_out=True)):
        samples = []
        for part, start in enumerate(range(0, num_samples, SAMPLES_PER_PASS)):
            # Each batch has its own seed, and the preference pairs were sampled with none of these.
            of_part = 2_000_000 + 1_000_000 * seed + 1000 * number + part
            count = min(SAMPLES_PER_PASS, num_samples - start)
            samples += sample_policy(policy, tokenizer, [prompt], samples_per_prompt=count, seed=of_part)[0]
        pool.append(ranked(prompt, [Response(text=one.response, finished=one.finished) for one in samples]))
    return tuple(pool)


def load_pool(path: str | Path) -> tuple[RankedPrompt, ...]:
    """Reads a pool of samples from JSONL.

    A record has `prompt` and `responses`, a list of texts. It may have two more lists of the same length: `golds`
    (numbers; absent means NaN) and `finished` (booleans; absent means true). Raises `DataError` for anything else.
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
    """Writes a pool as JSONL that `load_pool` reads. Raises DiskError."""
    records = [
        {
            "prompt": one.prompt
            if isinstance(one.prompt, str)
            else [{"role": role, "content": said} for role, said in one.prompt],
            "responses": [response.text for response in one.responses],
            "finished": [response.finished for response in one.responses],
            "golds": list(one.golds),
        }
        for one in pool
    ]
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def _list(record: Record, key: str, value: Any, kind: type, length: int | None = None) -> list[Any]:
    """Checks that `value` is a list of items of one kind: str, bool, or float for any number.

    length: how many items there must be; None means one or more. Raises `DataError`.
    """

    def fits(one: Any) -> bool:
        # In Python a bool is an int, and JSON's true is no number here.
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
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The gains of the best of n by each of several reward models.

    models: reward models, each named as for `evaluation.reward_models.evaluate`.
    gold: a reward model, named in the same way, that gives gold rewards in place of the pool's own; None keeps those.
    max_n: the largest n.
    max_tokens: longest text that is read, in tokens; None means what a model's config says.
    trust_remote_code: whether Python code that comes with the models' files may be run.

    Returns results by name: `ns`, their `kl` in nats, and under `models` the `curves` of each model. Raises ConfigError
    for a model that cannot be loaded, for a pool with fewer than `max_n` samples to a prompt, and for a pool without
    gold rewards if `gold` is None.
    """
    from r2m_async.cpu_threads import one_thread
    from r2m_async.errors import ConfigError

    fewest = min(len(one.responses) for one in pool)
    if not 1 <= max_n <= fewest:
        raise ConfigError(
            f"n = {max_n}: a prompt of the pool has {fewest} samples; give at least n of them, or a lower --n"
        )
    if gold is None and not all(map(math.isfinite, (value for one in pool for value in one.golds))):
        raise ConfigError(
            "golds: the pool has samples without a gold reward; add it to the file, or name a reward model as --gold"
        )
    ns = sizes(max_n)
    with one_thread():
        golds = [one.golds for one in pool] if gold is None else _rewards(gold, pool, max_tokens, trust_remote_code)
        results = {model: curves(_rewards(model, pool, max_tokens, trust_remote_code), golds, ns) for model in models}
    return {
        "ns": ns,
        "kl": [best_of_n_kl(n) for n in ns],
        "num_prompts": len(pool),
        "num_samples": fewest,
        "gold": gold,
        "models": results,
    }


def write_best_of_n(results: Mapping[str, Any], out: Path) -> str:
    """Writes the files of OUT, except for the pool, and returns the table."""
    from r2m_async.evaluation.plots import plot_best_of_n

    told = table(results)
    write_results(out, results, told)
    plot_best_of_n(results, out / "best_of_n.png", band="se")
    return told


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: gains over one sample, each ± its standard error over prompts."""
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


def _rewards(model: str, pool: Sequence[RankedPrompt], max_tokens: int | None, trust: bool) -> list[Array]:
    """For each prompt of the pool, the rewards [N] of its samples by the reward model `model`."""
    from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble

    texts = [(one.prompt, response.text, response.finished) for one in pool for response in one.responses]
    rewards = TextScorer(load_ensemble(model, max_tokens, trust_remote_code=trust)).rewards(texts)
    return np.split(rewards, np.cumsum([len(one.responses) for one in pool])[:-1])

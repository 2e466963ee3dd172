"""Best-of-n: the estimate against every subset and against fresh samples, and the command on pools of either kind."""

import json
import math
import os
from itertools import combinations, permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.cli import main
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.best_of_n import (
    best_of_n,
    best_of_n_kl,
    best_of_n_weights,
    curves,
    embedded_pool,
    load_pool,
    measure_best_of_n,
    sizes,
    write_pool,
)
from r2m_async.evaluation.ranked_prompts import RankedPrompt, Response
from r2m_async.from_scratch import embedded
from r2m_async.from_scratch.language import NUM_HELD_OUT_PROMPTS, gold_reward, prompts
from r2m_async.reward_models.ensemble import RewardEnsemble


def by_all_subsets(rewards, values, n):
    """The mean over all subsets of n of the favourite's value, the mean of the favourites' where they tie."""
    means = []
    for subset in combinations(range(len(rewards)), n):
        best = max(rewards[index] for index in subset)
        means.append(np.mean([values[index] for index in subset if rewards[index] == best]))
    return np.mean(means)


@pytest.mark.parametrize("n", range(1, 10))
def test_the_estimate_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    assert best_of_n(rewards, values, n) == pytest.approx(by_all_subsets(rewards, values, n))
    assert best_of_n(rewards, rewards, n) == pytest.approx(by_all_subsets(rewards, rewards, n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_tied_samples_are_each_others_equals(n):
    rewards, values = [1.0, 0.0, 1.0, 2.0, 0.0, 2.0, 2.0], np.arange(7.0) ** 2
    assert best_of_n(rewards, values, n) == pytest.approx(by_all_subsets(rewards, values, n))


def test_the_order_of_the_pool_does_not_matter():
    rewards, values = np.array([1.0, 1.0, 0.0, 3.0]), np.array([5.0, 1.0, 2.0, 0.0])
    estimates = {round(best_of_n(rewards[list(p)], values[list(p)], 2), 12) for p in permutations(range(4))}
    assert len(estimates) == 1


def test_by_hand_the_best_of_2_of_4():
    """Of the 6 pairs, rank 2 is the higher in 1, rank 3 in 2 and rank 4 in 3."""
    assert best_of_n_weights(4, 2) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert best_of_n([0.1, 0.4, 0.2, 0.3], [10.0, 0.0, 6.0, 12.0], 2) == pytest.approx((6 + 2 * 12 + 0) / 6)


@pytest.mark.parametrize(("num_samples", "n"), [(405, 1), (405, 17), (405, 404), (405, 405), (5000, 405)])
def test_weights_of_large_pools_add_up_and_follow_the_exact_binomials(num_samples, n):
    weights = best_of_n_weights(num_samples, n)
    exact = [math.comb(rank - 1, n - 1) / math.comb(num_samples, n) for rank in range(1, num_samples + 1)]
    assert weights.sum() == pytest.approx(1) and np.allclose(weights, exact, rtol=1e-9, atol=0)


def test_the_estimate_is_unbiased_for_fresh_samples():
    """Gold follows a proxy of uniform noise up to a point; pools of 12, against 200,000 draws of 5."""
    rng = np.random.default_rng(0)

    def gold(rewards):
        return np.where(rewards < 0.8, rewards, 1.6 - rewards)

    estimates = [best_of_n(rewards, gold(rewards), 5) for rewards in rng.random((4000, 12))]
    drawn = gold(rng.random((200_000, 5)).max(1))
    error = math.hypot(np.std(estimates) / math.sqrt(4000), drawn.std() / math.sqrt(200_000))
    assert abs(np.mean(estimates) - drawn.mean()) < 3 * error and error < 0.002
    assert best_of_n(range(1, 13), range(1, 13), 5) / 13 == pytest.approx(5 / 6)  # the expected maximum of 5 uniforms


def test_kl_and_sizes():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    assert best_of_n_kl(405) == pytest.approx(5.006, abs=1e-3)
    ns = sizes(405)
    assert ns[0] == 1 and ns[-1] == 405 and ns == sorted(set(ns)) and 12 < len(ns) <= 17
    assert sizes(1) == [1]


def test_curves_start_at_0_and_have_standard_errors_over_prompts():
    rewards, golds = [[0.0, 1.0, 2.0], [0.0, 4.0, 2.0]], [[0.0, 3.0, 0.0], [1.0, 1.0, 1.0]]
    told = curves(rewards, golds, [1, 2, 3])
    # First prompt: means 1, 5/3, 2 and 1, (3 + 2 * 0) / 3, 0. Second: 2, 10/3, 4 and no change in gold.
    assert told["proxy"] == pytest.approx([0, (2 / 3 + 4 / 3) / 2, 1.5])
    assert told["gold"] == pytest.approx([0, 0, -0.5])
    assert told["proxy_se"] == pytest.approx([0, (2 / 3) / 2, 0.5]) and told["gold_se"] == pytest.approx([0, 0, 0.5])


def test_n_must_be_one_of_the_pools_sizes_and_values_must_belong_to_rewards():
    for n in (0, 4):
        with pytest.raises(ValueError, match=rf"n = {n}: .* at least n samples, and there are 3"):
            best_of_n_weights(3, n)
    with pytest.raises(ValueError, match="one shape"):
        best_of_n([1.0, 2.0], [1.0], 1)


# Pools and the command


@pytest.fixture
def pool_file(tmp_path):
    """Three prompts; the golds count the warm words."""
    records = [
        {"prompt": f"the river {n} :"}
        | {"responses": [" warm" * k + " old" * n for k in range(5)], "golds": list(range(5))}
        for n in range(3)
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.models
def test_the_embedded_pool_is_its_seeds_and_survives_its_file(little_embedded, tmp_path, monkeypatch):
    monkeypatch.setattr("r2m_async.evaluation.best_of_n.SAMPLES_PER_PASS", 4)
    pool = embedded_pool(little_embedded, 0, 3, 8)
    assert [len(one.responses) for one in pool] == [8, 8, 8]
    assert {one.prompt for one in pool} <= set(prompts(NUM_HELD_OUT_PROMPTS, 0, held_out=True))
    assert all(one.responses[:4] != one.responses[4:] for one in pool)  # the passes do not repeat each other
    for one in pool:
        assert one.golds == tuple(gold_reward(one.prompt, text.text, text.finished) for text in one.responses)
    assert pool == embedded_pool(little_embedded, 0, 3, 8) != embedded_pool(little_embedded, 1, 3, 8)
    write_pool(pool, tmp_path / "pool.jsonl")
    assert load_pool(tmp_path / "pool.jsonl") == pool


@pytest.mark.models
def test_bon_on_the_embedded_language_leaves_its_files_and_repeats_from_its_pool(
    little_embedded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(embedded, "embedded_models", lambda: little_embedded)
    out = tmp_path / "bon"
    arguments = ["bon", "embedded", "--n", "8", "--prompts", "3", "--samples", "12"]
    assert main([*arguments, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert (out / "table.md").read_text() in told and (out / "best_of_n.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert (results["ns"][-1], results["num_prompts"], results["num_samples"]) == (8, 3, 12)
    assert results["kl"] == pytest.approx([math.log(n) - (n - 1) / n for n in results["ns"]])
    proxy = results["models"]["embedded"]["proxy"]
    assert proxy[0] == 0 and proxy == sorted(proxy) and proxy[-1] > 0
    again = ["bon", "embedded", "--n", "8", "--pool", str(out / "pool.jsonl"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert (tmp_path / "again" / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_more_prompts_than_there_are_are_refused_before_anything_is_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "embedded_models", lambda: pytest.fail("built"))
    for num in (0, 300):
        assert main(["bon", "embedded", "--prompts", str(num), "--out", str(tmp_path / "bon")]) == 2
        assert (
            f"--prompts is {num}: the embedded language has 200 held-out prompts; give 1 to 200"
            in capsys.readouterr().err
        )
    for few in (["--n", "0"], ["--n", "8", "--samples", "4"]):
        assert main(["bon", "embedded", *few, "--out", str(tmp_path / "bon")]) == 2
        assert (
            f"--n is {few[1]} and --samples is {few[-1] if few[2:] else None}: the best of n needs"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "bon").exists()


def test_a_pool_is_written_whole_or_not_at_all(pool_file, tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    pool = load_pool(pool_file)
    monkeypatch.setattr(os, "fsync", interrupted)  # when the text is written, and not yet on the disk
    with pytest.raises(KeyboardInterrupt):
        write_pool(pool, tmp_path / "interrupted.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]  # the fixture's


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=3)
CONTENTS = TEXTS | st.tuples(TURNS, TEXTS).map(lambda one: (*one[0], ("user", one[1])))
SAID = st.text(st.characters(codec="utf-8"), max_size=8)
RESPONSES = st.lists(st.builds(Response, text=SAID, finished=st.booleans()), min_size=1, max_size=3)
GOLDS = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3)


@given(st.lists(st.tuples(CONTENTS, RESPONSES, GOLDS), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_pool_of_texts_and_conversations_survives_its_file(drawn):
    pool = tuple(
        RankedPrompt(prompt=prompt, responses=tuple(responses), golds=tuple(golds[: len(responses)]))
        for prompt, responses, golds in drawn
    )
    with TemporaryDirectory() as directory:
        write_pool(pool, Path(directory) / "pool.jsonl")
        assert load_pool(Path(directory) / "pool.jsonl") == pool


@pytest.mark.models
def test_any_models_favourites_are_scored_by_the_pools_golds_or_by_another_model(tiny, pool_file):
    proxy, gold_model = tiny("llama", True), tiny("gpt_neox", True)
    pool = load_pool(pool_file)
    rewards = [RewardEnsemble(proxy).score(one.prompt, [r.text for r in one.responses]).tolist() for one in pool]
    other_golds = [
        RewardEnsemble(gold_model).score(one.prompt, [r.text for r in one.responses]).tolist() for one in pool
    ]
    for gold, golds in ((None, [one.golds for one in pool]), (gold_model, other_golds)):
        results = measure_best_of_n([proxy], pool, gold, max_n=4)
        expected = [
            np.mean([by_all_subsets(*both, n) - np.mean(both[1]) for both in zip(rewards, golds, strict=True)])
            for n in results["ns"]
        ]
        assert results["models"][proxy]["gold"] == pytest.approx(expected, abs=1e-4), gold


def test_pools_that_cannot_serve_are_refused(tmp_path, pool_file):
    with pytest.raises(ConfigError, match=r"n = 6: a prompt of the pool has 5 samples"):
        measure_best_of_n([], load_pool(pool_file), max_n=6)
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}))
    with pytest.raises(ConfigError, match="samples without a gold reward; add it to the file, or name a reward model"):
        measure_best_of_n([], load_pool(path), max_n=2)
    for wrong in ({"golds": [1.0]}, {"finished": [1, 0]}, {"responses": []}, {"responses": "b"}):
        path.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]} | wrong))
        with pytest.raises(DataError, match=rf"line 1: {next(iter(wrong))} = .*not a list of"):
            load_pool(path)

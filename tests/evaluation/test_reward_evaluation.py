"""`r2m reward-model eval`: what it measures is what a slow reading gives, on runs, on ensembles and on plain models."""

import json
import random

import numpy as np
import pytest
import torch
from tiny import SHARED_DATA, WORDS, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.cli import main
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation import reward_models as reward_evaluation
from r2m_async.evaluation.ranked_prompts import OTHER_WRITERS, SPLITS, embedded_splits, load_ranked, load_rm_bench
from r2m_async.evaluation.reward_models import EvaluationSources, evaluate, table
from r2m_async.evaluation.text_scorer import TextScorer
from r2m_async.export import RewardScorer, export
from r2m_async.from_scratch import embedded
from r2m_async.from_scratch import preferences as embedded_preferences
from r2m_async.from_scratch.language import NUM_HELD_OUT_PROMPTS, NUM_TRAINING_PROMPTS, gold_reward, prompts
from r2m_async.from_scratch.preferences import EmbeddedPreferenceSettings
from r2m_async.from_scratch.pretraining import score
from r2m_async.launch.ring import Ring
from r2m_async.models.heads import score_group
from r2m_async.models.policy import group_feedback
from r2m_async.models.reward import embed_group
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.training import train
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.runs.records import read_metrics

RM_BENCH = SHARED_DATA / "rm_bench_part.jsonl"


@pytest.fixture(scope="module")
def runs(little_embedded, tmp_path_factory):
    """`single` and an ensemble `min` of two models with heads of two layers, on small embedded preferences."""
    settings = EmbeddedPreferenceSettings(prompts=60, held_out_prompts=20, width=16, layers=2, texts=60, steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2M_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = embedded_preferences.embedded_preferences(little_embedded, settings)
        patch.setattr(embedded_preferences, "embedded_preferences", lambda: small)
        patch.setattr(embedded, "embedded_models", lambda: little_embedded)
        config = RewardModelConfig().run(output_dir=str(tmp_path_factory.mktemp("runs")), device="cpu", seed=3)
        config = config.optimizer(lr=1e-3, batch_size=16, epochs=2).logging(live=False)
        yield {
            "single": train(config),
            "min": train(config.head(layers=2, width=24).ensemble(size=2, combine="min").optimizer(epochs=0.5)),
        }


def styled_records():
    """Six prompts in three domains whose texts differ in length, so in what padding they meet."""
    rng = random.Random(0)
    words = ["the", "river", "warm", "old", "stone", "wind", "."]

    def text():
        return " " + " ".join(rng.choices(words, k=rng.randrange(1, 12)))

    domains = ["chat", "safety-refuse", "safety-response", "chat", "safety-refuse", "chat"]
    return [
        {"prompt": [{"role": "user", "content": f"{number} the river :"}], "domain": domain}
        | {side: [text() for _ in range(3)] for side in ("chosen_styles", "rejected_styles")}
        for number, domain in enumerate(domains)
    ]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# States


@pytest.mark.models
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_states_in_batches_are_those_of_one_text_at_a_time(tiny, family):
    """And the head on the scored state gives the reward, so it is the state that the reward is read from."""
    directory = tiny(family, True)
    scorer = TextScorer(RewardEnsemble(directory))
    texts = [("the river :", " warm" * number, number % 2 == 0) for number in (1, 9, 2, 5)]
    scored, means = scorer.states(texts)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    for number, (prompt, response, finished) in enumerate(texts):
        ids = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id] * finished
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = np.stack([layer[0].mean(0).numpy() for layer in output.hidden_states])
        assert np.allclose(means[:, number], expected, atol=1e-5)
        assert np.allclose(scored[number], output.hidden_states[-1][0, -1], atol=1e-5)
        assert model.score(torch.tensor(scored[number])).item() == pytest.approx(output.logits.item(), abs=1e-4)
        assert scorer.rewards(texts)[number] == pytest.approx(output.logits.item(), abs=1e-4)


@pytest.mark.models
def test_texts_that_are_cut_are_counted_once(tiny):
    ensemble = RewardEnsemble(tiny("llama", True))
    ensemble.config = ensemble.config.data(max_tokens=6)
    scorer = TextScorer(ensemble)
    texts = [("the river :", " warm", True), ("the river :", " warm" * 9, True)]
    scorer.rewards(texts)
    scorer.states(texts)
    assert scorer.num_cut == 1 and len(ensemble.ids(*texts[1], ensemble.max_tokens)) == 6


# RM-Bench


@pytest.mark.models
def test_rm_bench_by_domain_is_a_loop_over_its_nine_cells(tiny, tmp_path):
    directory, records = tiny("llama", True), styled_records()
    file = written(tmp_path / "styles.jsonl", records)
    results = evaluate(directory, EvaluationSources(rm_bench=file))["rm_bench"]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )

    def reward(record, side, style):
        text = f"{record['prompt'][0]['content']}\n{record[side][style]}"
        return score(model, [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]).item()

    def cell(domain, row, column):
        of_domain = [record for record in records if record["domain"] == domain]
        won = [reward(one, "chosen_styles", row) > reward(one, "rejected_styles", column) for one in of_domain]
        return sum(won) / len(won)

    grids = {
        domain: np.array([[cell(domain, row, column) for column in range(3)] for row in range(3)])
        for domain in ("chat", "safety-refuse", "safety-response")
    }
    grids["safety"] = (2 * grids["safety-refuse"] + grids["safety-response"]) / 3  # all three prompts alike
    grids["all"] = (grids["chat"] + grids["safety"]) / 2
    assert {name: one["num"] for name, one in results.items()} == {
        "chat": 3, "safety-refuse": 2, "safety-response": 1, "safety": 3, "all": 6,
    }  # fmt: skip
    for name, grid in grids.items():
        assert np.allclose(results[name]["grid"], grid), name
    assert results["all"]["hard"] == pytest.approx(np.mean([grids["all"][cell] for cell in ((0, 1), (0, 2), (1, 2))]))
    assert len({results[name]["normal"] for name in results}) > 2


RANKED = {
    "instruction": "the river :",
    **{f"response_{i}_text": " the" * i for i in range(1, 5)},
    "all_scores": [0.1, 4, 2, -1],
}


def test_bsrs_validation_sets_give_kendalls_tau_each(tiny, tmp_path):
    for name, tie in (("val2.jsonl", 4), ("val3.json", 0.1)):
        written(tmp_path / name, [RANKED, RANKED | {"instruction": "the stone :", "all_scores": [0.1, tie, 2, -1]}])
    loaded = load_ranked(f"{tmp_path / 'val2.jsonl'},{tmp_path / 'val3.json'}")
    assert list(loaded) == ["val2.jsonl", "val3.json"] and loaded["val3.json"][0].golds == (0.1, 4.0, 2.0, -1.0)
    assert loaded["val2.jsonl"][1].prompt == (("user", "the stone :"),)
    assert [one.text for one in loaded["val2.jsonl"][0].responses] == [" the" * i for i in range(1, 5)]
    results = evaluate(
        tiny("llama", True), EvaluationSources(ranked=f"{tmp_path / 'val2.jsonl'}, {tmp_path / 'val3.json'}")
    )
    assert {name: one["num_prompts"] for name, one in results["splits"].items()} == {"val2.jsonl": 2, "val3.json": 2}
    assert "| val3.json | " in table(results)


@pytest.mark.parametrize("scores", [[1, 2, 3], None, [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, 3, True]])
def test_gold_rewards_that_are_not_one_number_a_response_are_refused(tmp_path, scores):
    with pytest.raises(DataError, match="line 1: all_scores.*: not a finite number for each of the responses"):
        load_ranked(str(written(tmp_path / "a.jsonl", [RANKED | {"all_scores": scores}])))
    with pytest.raises(DataError, match="prompts with 2 and with 4 responses"):
        two = {key: RANKED[key] for key in ("instruction", "response_1_text", "response_2_text")} | {
            "all_scores": [1, 2]
        }
        load_ranked(str(written(tmp_path / "b.jsonl", [RANKED, two])))


def test_rm_benchs_own_files_are_read_too_and_others_refused(tmp_path):
    record = {"prompt": "why?", "domain": "math", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    [loaded] = load_rm_bench(written(tmp_path / "own.jsonl", [record]))
    assert (loaded.prompt, loaded.chosen, loaded.rejected) == ((("user", "why?"),), ("a", "b", "c"), ("d", "e", "f"))
    with pytest.raises(DataError, match=r"line 1: rejected = .*not 3 texts, one per style"):
        load_rm_bench(written(tmp_path / "two.jsonl", [record | {"rejected": ["d", "e"]}]))
    published = [{"id": 8, "subset": "x", **record}, {"id": 9, "subset": "x", **record, "prompt": "how?"}]
    total = tmp_path / "total_dataset.json"
    total.write_text(json.dumps(published, indent=4))
    assert [(one.domain, one.prompt[0][1]) for one in load_rm_bench(total)] == [("math", "why?"), ("math", "how?")]
    files = []
    for domain in ("chat", "code", "math", "safety-refuse", "safety-response"):
        files.append(tmp_path / f"{domain}_filtered.json")
        files[-1].write_text(
            json.dumps([{k: v for k, v in one.items() if k != "domain"} for one in published], indent=4)
        )
        assert {one.domain for one in load_rm_bench(files[-1])} == {domain}
    together = load_rm_bench(", ".join(map(str, files)))
    assert len(together) == 10 and [one.domain for one in together[-3:]] == ["safety-refuse"] + ["safety-response"] * 2
    with pytest.raises(DataError, match=r"poetry_filtered.json, record 1: domain"):
        load_rm_bench(files[0].rename(tmp_path / "poetry_filtered.json"))
    for text, told in (("[]", "no record of RM-Bench"), ("[1]", "record 1: a JSON int"), ("[{]", "not JSON")):
        total.write_text(text)
        with pytest.raises(DataError, match=told):
            load_rm_bench(total)
    if RM_BENCH.is_file():  # what was published, where it lies beside the project
        styled = load_rm_bench(RM_BENCH)
        assert len(styled) == 285 and {one.domain for one in styled} == {"chat", "safety-refuse", "safety-response"}
        lengths = np.array([[len(text) for text in one.chosen] for one in styled]).mean(0)
        assert lengths[0] < lengths[1]


# The four splits


@pytest.mark.models
def test_the_splits_differ_in_prompts_and_in_writers(little_embedded):
    splits = embedded_splits(little_embedded, seed=0, num_prompts=30)
    assert tuple(splits) == SPLITS
    of = {name: [one.prompt for one in split] for name, split in splits.items()}
    assert of["in_domain"] == of["response_disjoint"] and of["prompt_disjoint"] == of["mutual_disjoint"]
    assert set(of["in_domain"]) <= set(prompts(NUM_TRAINING_PROMPTS, 0))
    assert set(of["mutual_disjoint"]) <= set(prompts(NUM_HELD_OUT_PROMPTS, 0, held_out=True))
    texts = {name: [text.text for one in split for text in one.responses] for name, split in splits.items()}
    assert all(len(one.responses) == len(one.golds) == 4 for split in splits.values() for one in split)
    for by_policy, by_others in (SPLITS[0::2], SPLITS[1::2]):
        assert len(set(texts[by_policy]) & set(texts[by_others])) < 3
    for one in (one for split in splits.values() for one in split):
        assert one.golds == tuple(gold_reward(one.prompt, text.text, text.finished) for text in one.responses)
    assert (
        splits
        == embedded_splits(little_embedded, seed=0, num_prompts=30)
        != embedded_splits(little_embedded, seed=1, num_prompts=30)
    )


def test_no_other_writer_is_always_the_best_or_the_worst():
    """Else its style would give the rank away. And all of them can be excellent, and be poor."""
    rng = random.Random(0)
    golds = np.array(
        [
            [gold_reward(prompt, one.text, one.finished) for one in (write(prompt, rng) for write in OTHER_WRITERS)]
            for prompt in prompts(200, 0)
        ]
    )
    first, last = (np.bincount(golds.argsort(1)[:, place], minlength=4) / len(golds) for place in (-1, 0))
    assert first.max() < 0.6 and last.max() < 0.6 and min(first.min(), last.min()) > 0.02
    assert (golds.max(0) > 2).all() and (golds.min(0) < 0.7).all() and (golds.std(0) > 0.5).all()


@pytest.mark.models
def test_a_reward_model_that_knows_gold_ranks_every_split_right(little_embedded):
    class Gold:
        def __init__(self, sign):
            self.sign = sign

        def rewards(self, texts):
            return np.array([self.sign * gold_reward(*text) for text in texts])

    for split in embedded_splits(little_embedded, seed=0, num_prompts=20).values():
        right, wrong = (reward_evaluation._split_results(Gold(sign), split) for sign in (1, -1))
        assert (right["tau"], right["accuracy"], right["tau_se"]) == (pytest.approx(1), 1, pytest.approx(0))
        assert (wrong["tau"], wrong["accuracy"]) == (pytest.approx(-1), 0)
        assert right["num_prompts"] + right["num_prompts_without_order"] == 20


# The command


@pytest.mark.models
def test_a_run_is_evaluated_on_all_that_belongs_to_it(runs, tmp_path, capsys):
    run = runs["single"]
    rm_bench = written(tmp_path / "styles.jsonl", styled_records())
    arguments = ["reward-model", "eval", str(run), "--prompts", "10", "--rm-bench", str(rm_bench)]
    assert main(arguments) == 0
    out = run / "evaluation"
    told = capsys.readouterr().out
    assert (out / "table.md").read_text() in told and f"results: {out}" in told
    results = json.loads((out / "results.json").read_text())
    [*_, last] = read_metrics(run / "seed-3" / "metrics.jsonl")
    assert results["pairs"]["accuracy"] == pytest.approx(last["held_out/accuracy"])
    assert f"| held-out pairs | {last['held_out/accuracy']:.3f} ±" in told
    assert tuple(results["splits"]) == SPLITS and all(-1 <= one["tau"] <= 1 for one in results["splits"].values())
    assert list(results["states"]) == ["training pairs", "held-out pairs", *SPLITS, "RM-Bench"]
    assert {one["num"] for one in results["states"].values()} == {36}
    assert all(1 < one["effective_rank"] <= 16 for one in results["states"].values())
    assert len(results["similarity"]["same"]) == len(results["similarity"]["cross"]) == 3
    assert (out / "evaluation.png").stat().st_size > 20_000
    assert main([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "results.json").read_bytes() == (out / "results.json").read_bytes()
    for num in (0, 201):
        assert main(["reward-model", "eval", str(run), "--prompts", str(num), "--out", str(tmp_path / "none")]) == 2
        assert (
            f"--prompts is {num}: the embedded language has 200 held-out prompts; give 1 to" in capsys.readouterr().err
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.models
def test_an_ensemble_of_heads_of_two_layers_is_evaluated_by_its_combined_rewards(runs):
    run = runs["min"]
    results = evaluate(str(run), EvaluationSources(embedded=False))
    ensemble = RewardEnsemble(run)
    lines = embedded_preferences.embedded_preferences().held_out.read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    rewards = [
        [
            ensemble.score(pair["prompt"], [pair[side]], pair[f"{side}_finished"]).item()
            for side in ("chosen", "rejected")
        ]
        for pair in pairs
    ]
    assert results["num_models"] == 2 and results["splits"] is None
    assert results["pairs"]["accuracy"] == pytest.approx(np.mean([chosen > rejected for chosen, rejected in rewards]))


@pytest.mark.models
def test_a_plain_model_is_evaluated_on_given_pairs_alone(tiny, tmp_path):
    records = [{"prompt": f"the river {n} :", "chosen": " warm" * (n % 5 + 1), "rejected": " cold"} for n in range(9)]
    file = written(tmp_path / "pairs.jsonl", records)
    results = evaluate(tiny("llama", True), EvaluationSources(pairs=str(file)))
    assert results["pairs"]["num"] == 9 and list(results["states"]) == ["held-out pairs"]
    assert results["splits"] is None and results["rm_bench"] is None and results["similarity"]["num_chosen"] == 9
    assert "| held-out pairs |" in table(results) and "split" not in table(results)


@pytest.mark.models
def test_an_exported_head_reads_its_policys_feedback_at_the_last_step(tiny, tiny_config, tmp_path):
    """R2M App. G.6, against the head called by hand at t = T, on pairs that tell it from the classifier alone."""
    config = tiny_config.head(lr=0.05, omega_floor=0.1, omega_horizon=40).run(num_steps=2)
    with Ring.of(config, in_process=True) as ring:
        ring.save(checkpoint_path(tmp_path / "start", 0))
        while not ring.finished:
            ring.step()
        ring.save(checkpoint_path(tmp_path / "run", 2))
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "start", tmp_path / "untrained")
    rng = random.Random(0)
    words = ["the", "river", "warm", "old", "stone", "wind", "sings", "falls", "."]
    texts = [" " + " ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in range(80)]
    records = [{"prompt": "the river :", "chosen": texts[n], "rejected": texts[n + 1]} for n in range(0, 80, 2)]
    pairs = str(written(tmp_path / "pairs.jsonl", records))
    results = evaluate(str(tmp_path / "out"), EvaluationSources(pairs=pairs, initial_policy=config.model.policy))

    scorer = RewardScorer(tmp_path / "out", "cpu")

    def rewards(step):
        found = []
        for text in texts:
            group = scorer._group("the river :", [text], True, {})
            feedback = group_feedback(scorer._policy, group, scorer._config, 2)
            embeddings = embed_group(scorer._reward_model, scorer._reward_tokenizer, group, scorer._config)
            found.append(score_group(scorer._head, embeddings, feedback, step, 2, scorer._config).rewards.item())
        return found

    def accuracy(values):
        return np.mean([chosen > rejected for chosen, rejected in zip(values[0::2], values[1::2], strict=True)])

    after = results["feedback"]["after"]
    assert after["accuracy"] == pytest.approx(accuracy(rewards(39))) and after["num"] == 40
    assert accuracy(rewards(39)) != accuracy(rewards(1)), "t = T and t = 2 are alike: the test is blind"
    plain = RewardEnsemble(tmp_path / "out" / "reward_model").score("the river :", texts).tolist()
    assert results["pairs"]["accuracy"] == pytest.approx(accuracy(plain)) != after["accuracy"]
    before = RewardScorer(tmp_path / "out", "cpu", at_horizon=True, initial_policy=config.model.policy)
    untrained = RewardScorer(tmp_path / "untrained", "cpu", at_horizon=True)
    values = [[one.score("the river :", [text]).item() for text in texts] for one in (before, untrained)]
    assert values[0] == values[1], "the head or the states are not those that the run began with"
    assert results["feedback"]["before"]["accuracy"] == pytest.approx(accuracy(values[0])) != after["accuracy"]
    rows = [line.split(" | ")[0] for line in table(results).splitlines() if line.startswith("| ")]
    assert rows[2:5] == ["| vanilla reward model", *(f"| with feedback, {one} training" for one in ("before", "after"))]

    # An export does not name a directory of the machine that wrote it, and says so.
    unnamed = evaluate(str(tmp_path / "out"), EvaluationSources(pairs=pairs))
    assert unnamed["feedback"] == results["feedback"] | {"initial_policy": None, "before": None}
    assert "| with feedback, before training | not known: give --initial-policy |" in table(unnamed)
    other = save_tiny_model(tmp_path / "wide", "gpt_neox", False, WORDS, seed=0, width=48)
    with pytest.raises(
        ConfigError, match=r"its states have 48 numbers and the exported head reads 32; name the policy"
    ):
        RewardScorer(tmp_path / "out", "cpu", initial_policy=other)
    with pytest.raises(ConfigError, match="'no/such-policy' cannot be loaded"):
        RewardScorer(tmp_path / "out", "cpu", initial_policy="no/such-policy")


@pytest.mark.models
def test_the_embedded_reward_model_is_evaluated_by_name(little_embedded):
    results = evaluate("embedded", EvaluationSources(num_prompts=5), little_embedded)
    assert tuple(results["splits"]) == SPLITS and results["pairs"] is None


@pytest.mark.models
def test_what_cannot_be_evaluated_is_refused(tiny, runs, tmp_path):
    with pytest.raises(ConfigError, match="nothing to evaluate on; give --pairs, --ranked, --rm-bench or --embedded"):
        evaluate(tiny("llama", True))
    with pytest.raises(
        ConfigError, match="its files lack score.weight; without its trained head it is no reward model"
    ):
        evaluate(tiny("llama", False))
    with pytest.raises(ConfigError, match="reward model: 'no/such-model' cannot be loaded"):
        evaluate("no/such-model")
    (tmp_path / "config.yaml").write_text((runs["single"] / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"seed-3/model: is not there yet; finish with `r2m reward-model resume"):
        evaluate(str(tmp_path))

"""Offline reward-model training: what it saves is what it trained, whole, in parts, resumed, and in every set-up."""

import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from tiny import WORDS, save_tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, DataError, NonFiniteStep
from r2m_async.from_scratch.pretraining import score
from r2m_async.models.reward import load_classifier, load_reward_model, save_classifier, scoring_head
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.preferences import PairReader, given_pairs, load_preference_data, tokenized
from r2m_async.reward_models.trainee import RewardTrainee
from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.reward_models.training import resume, train
from r2m_async.runs.checkpoints import checkpoints
from r2m_async.runs.directory import new_directory
from r2m_async.runs.records import read_metrics
from r2m_async.whole import only_writer

pytestmark = pytest.mark.models


@pytest.fixture
def config(reward_model_config):
    return reward_model_config


def make(directory):
    directory.mkdir()
    return directory


def trainer_of(config):
    return RewardTrainer(config, load_preference_data(config), config.model.start)


def trained(config, steps):
    with one_thread():
        trainer = trainer_of(config)
        metrics = [trainer.step() for _ in range(steps)]
    return trainer, metrics


def texts_of(trainer, num=6):
    return [text for pair in trainer.held_out[:num] for text in (pair.chosen, pair.rejected)]


def ids_of(trainer):
    return [list(text.token_ids) for text in texts_of(trainer)]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_in_bfloat16_rewards_are_those_of_a_float32_head_in_training_and_in_evaluations(config, tiny, tmp_path):
    """As in a run. Of 100 rewards in bfloat16 many are the same number."""
    model = load_classifier(tiny("llama", True)).to(torch.bfloat16)
    shutil.copytree(tiny("llama", True), tmp_path / "bfloat16")
    save_classifier(model, tmp_path / "bfloat16")
    ensemble = RewardEnsemble(tmp_path / "bfloat16")
    trainer, _ = trained(config.model(dtype="bfloat16"), 1)
    assert (ensemble.models[0].dtype, trainer.model.classifier.dtype) == (torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        for rewards in (
            ensemble.score_ids([[2, 3, number] for number in range(4, 104)]),
            trainer.model(texts_of(trainer))[0],
        ):
            assert rewards.dtype == torch.float32 and (rewards != rewards.bfloat16().float()).any()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_projects_its_states_gets_a_head_that_reads_them(config, tmp_path, monkeypatch, frozen):
    """OPT-350m: 1024 numbers inside, and 512 in the states that its head reads."""
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    shutil.copytree(config.model.start, tmp_path / "opt")
    rows, ends = AutoConfig.from_pretrained(config.model.start).vocab_size, {"pad_token_id": 0, "eos_token_id": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    opt = AutoConfig.for_model("opt", vocab_size=rows, word_embed_proj_dim=16, **sizes, **ends)
    AutoModelForCausalLM.from_config(opt).save_pretrained(tmp_path / "opt")
    trainer, _ = trained(config.model(start=str(tmp_path / "opt"), frozen=frozen).head(dropout=0.1), 1)
    assert trainer.model.classifier.score.in_features == 16


# What is saved


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_transformers_loads_what_was_trained_and_scores_the_same(config, tiny, family, tmp_path):
    trainer, _ = trained(config.model(start=tiny(family, False)), steps=2)
    trainer.model.save(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.num_labels == 1
    assert torch.allclose(score(loaded, ids_of(trainer)), score(trainer.model.classifier, ids_of(trainer)), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the old river")["input_ids"] == trainer.model.tokenizer("the old river")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(trainer.model(texts_of(trainer))[0], score(loaded, ids_of(trainer)), atol=1e-5)


def test_a_head_of_two_layers_is_whole_for_us_and_no_reward_for_transformers(config, tmp_path):
    trainer, _ = trained(config.head(layers=2, width=24), steps=2)
    trainer.model.save(tmp_path / "model")
    expected = score(trainer.model.classifier, ids_of(trainer))
    assert torch.allclose(score(load_classifier(tmp_path / "model"), ids_of(trainer)), expected, atol=1e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="num_labels = 24"):
        scoring_head(plain)
    ring = load_reward_model(str(tmp_path / "model"), R2MConfig().run(device="cpu"))
    assert torch.allclose(score(ring, ids_of(trainer)), expected, atol=1e-6)
    save_classifier(ring, tmp_path / "again")
    assert torch.allclose(score(load_classifier(tmp_path / "again"), ids_of(trainer)), expected, atol=1e-6)


def test_lora_trains_adapters_and_head_and_is_saved_merged(config, tmp_path):
    config = config.model(lora={"rank": 2, "alpha": 4})
    trainer, _ = trained(config, steps=2)
    names = {name.rsplit(".", 2)[-2] if "lora" not in name else "lora" for name in trainer.parameters}
    assert names == {"lora", "score"} and any("lora" in name for name in trainer.parameters)
    trainer.model.save(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.allclose(score(loaded, ids_of(trainer)), score(trainer.model.classifier, ids_of(trainer)), atol=1e-4)
    start, end = AutoModelForCausalLM.from_pretrained(config.model.start).model.state_dict(), loaded.model.state_dict()
    moved = {name.rsplit(".", 2)[-2] for name in start if not torch.equal(start[name], end[name])}
    assert moved == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_a_frozen_backbone_stays_as_it_came(config, tmp_path):
    config = config.model(frozen=True).head(layers=2, width=16)
    trainer, _ = trained(config, steps=2)
    start = AutoModelForCausalLM.from_pretrained(config.model.start).model.state_dict()
    assert same(start, dict(trainer.model.classifier.model.state_dict()))
    assert set(trainer.parameters) == {f"classifier.score.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert not same(weights_of(trainer_of(config)), weights_of(trainer))


def test_in_bfloat16_float32_masters_move_and_the_saved_model_has_what_they_learnt(config, tmp_path):
    """Steps of this size vanish in bfloat16: without masters most weights would stay, and the norms' all."""
    small = config.model(dtype="bfloat16").optimizer(lr=1e-5)
    trainer, _ = trained(small, 3)
    assert trainer.model.classifier.dtype == torch.bfloat16
    trainer.save(tmp_path / "checkpoint")
    trainer.save_model(make(tmp_path / "model"))
    start = AutoModelForCausalLM.from_pretrained(config.model.start).to(torch.bfloat16).float().model.state_dict()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    backbone = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32} and backbone.keys() == start.keys()
    for name, tensor in backbone.items():
        if "embed_tokens" not in name:  # the texts have few of the tokens
            assert (tensor != start[name]).float().mean() > 0.9, name
    resumed = trainer_of(small)
    resumed.restore(tmp_path / "checkpoint")
    with one_thread():
        for one in (trainer, resumed):
            one.step()
            one.save_model(make(tmp_path / f"{id(one)}"))
    first, second = (load_file(tmp_path / f"{id(one)}" / "model.safetensors") for one in (trainer, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_kept_head_is_the_starts_and_a_new_one_has_norm_about_one(config, tiny):
    classifier = tiny("llama", True)
    kept = RewardTrainee(classifier, config.head(init="keep")).classifier.score.weight
    assert torch.equal(kept, AutoModelForSequenceClassification.from_pretrained(classifier).score.weight)
    drawn = [RewardTrainee(classifier, config.run(seed=seed)).classifier.score.weight for seed in range(40)]
    assert torch.cat(drawn).var().item() == pytest.approx(1 / (48 + 1), rel=0.1)
    wide = RewardTrainee(classifier, config.head(layers=2, width=2000)).classifier.score
    assert [wide[at].weight.var().item() for at in (0, 2)] == pytest.approx([1 / 49, 1 / 2001], rel=0.1)
    assert not wide[0].bias.any() and not wide[2].bias.any()


# What a step computes


def test_the_log_probs_of_a_response_are_those_of_the_language_model(config, tiny):
    """Summed over its tokens and the end of text, not over the prompt's; the LM head is tied, or its own."""
    for family in ("llama", "gpt_neox"):
        config = config.model(start=tiny(family, False)).loss(regularizer="sft")
        trainer = trainer_of(config)
        pair = load_preference_data(config).held_out[0]
        language_model = AutoModelForCausalLM.from_pretrained(config.model.start)
        prompt_ids = trainer.model.tokenizer(pair.prompt)["input_ids"]
        ids = trainer.model.tokenizer(pair.prompt + pair.chosen)["input_ids"] + [trainer.model.tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = language_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logprobs[at - 1, ids[at]].item() for at in range(len(prompt_ids), len(ids)))
            both = trainer.model(texts_of(trainer), with_logprobs=True)[1]
        assert both[0].item() == pytest.approx(expected, rel=1e-4)


def test_log_probs_of_a_response_are_capped_as_the_language_model_caps_its_logits(config, tiny, tmp_path):
    start = Path(save_tiny_model(tmp_path / "gemma2", "gemma2", False, WORDS, seed=2))
    trainer = trainer_of(config.model(start=str(start), attention="eager").loss(regularizer="sft"))
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    model.config.final_logit_softcapping = trainer.model.language_model.config.final_logit_softcapping = 2.0
    text = trainer.pairs[0].chosen
    with torch.no_grad():
        _, (logprob,) = trainer.model([text], with_logprobs=True)
        ids = torch.tensor([text.token_ids])
        own = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    assert logprob.item() == pytest.approx(own[text.prompt_len - 1 :].sum().item(), rel=1e-4)


def test_a_tied_lm_head_is_the_embeddings_that_the_classifier_trains(config, tmp_path):
    tied = AutoModelForCausalLM.from_pretrained(config.model.start)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(config.model.start).save_pretrained(tmp_path / "tied")
    trainer, _ = trained(config.model(start=str(tmp_path / "tied")).loss(regularizer="sft"), steps=1)
    assert trainer.model.language_model.lm_head.weight is trainer.model.classifier.get_input_embeddings().weight
    assert not any("lm_head" in name for name in trainer.parameters)


def test_a_prompt_that_is_cut_counts_fewer_tokens(config, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama", False))
    pair = load_preference_data(config).held_out[0]
    whole, cut = (tokenized(pair, tokenizer, tokens).chosen for tokens in (1000, len_of(pair, tokenizer) - 2))
    assert whole.prompt_len == len(tokenizer(pair.prompt)["input_ids"])
    assert cut.token_ids == whole.token_ids[2:] and cut.prompt_len == whole.prompt_len - 2


def len_of(pair, tokenizer):
    return len(tokenizer(pair.prompt + pair.chosen)["input_ids"]) + 1


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"preference": "bt_margin"},
        {"bsr": "squared_mean", "bsr_weight": 5.0},
        {"bsr": "mean_square", "bsr_weight": 5.0, "pos_reg_weight": 0.5},
        {"regularizer": "sft", "alpha": 0.5, "bsr": "squared_mean"},
    ],
)
def test_micro_batches_give_the_step_of_the_whole_batch(config, loss):
    config = config.loss(**loss)
    whole, [metrics] = trained(config.optimizer(tokens_per_microbatch=10_000), steps=1)
    parts, [same_metrics] = trained(config.optimizer(tokens_per_microbatch=60), steps=1)
    assert len(parts.microbatches(parts.batch(0))) > 3 and len(whole.microbatches(whole.batch(0))) == 1
    assert metrics == pytest.approx(same_metrics, rel=1e-3, abs=1e-4, nan_ok=True)
    for (name, a), b in zip(whole.parameters.items(), parts.parameters.values(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


def test_the_parts_of_a_batch_are_within_the_limit_and_pairs_of_like_length(config):
    trainer = trainer_of(config.optimizer(tokens_per_microbatch=80, batch_size=30))
    batch = trainer.batch(0)
    parts = trainer.microbatches(batch)
    assert sorted(index for part in parts for index in part) == sorted(batch)
    lengths = [[trainer.pairs[index].length for index in part] for part in parts]
    assert all(2 * max(part) * len(part) <= 80 or len(part) == 1 for part in lengths)
    in_order = [length for part in lengths for length in part]
    assert in_order == sorted(in_order)


def two_steps(config):
    """(metrics of both, gradients of the first, weights after the second)."""
    trainer, metrics = trained(config, steps=1)
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}
    with one_thread():
        metrics.append(trainer.step())
    return metrics, gradients, weights_of(trainer)


def rank_of_two(rank, rendezvous, config, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save(two_steps(config), f"{out}-{rank}")
    torch.distributed.destroy_process_group()  # gloo's threads, still running at the end, would abort the process


def test_two_ranks_take_the_step_of_one_with_bsr_over_both_their_pairs(config, tmp_path):
    """After a step AdamW has made whole steps of what rounds in gradients near 0: weights are alike as a whole."""
    config = config.loss(bsr="squared_mean", bsr_weight=5.0).optimizer(tokens_per_microbatch=60)
    torch.multiprocessing.spawn(rank_of_two, (tmp_path / "rendezvous", config, tmp_path / "rank"), nprocs=2)
    metrics, gradients, expected = two_steps(config)
    start = weights_of(trainer_of(config))
    moved = sum((expected[name] - start[name]).square().sum() for name in expected).sqrt()
    for rank in range(2):
        rank_metrics, rank_gradients, weights = torch.load(f"{tmp_path / 'rank'}-{rank}")
        assert rank_metrics[0] == pytest.approx(metrics[0], rel=1e-3, abs=1e-4, nan_ok=True)
        assert rank_metrics[1]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-2)
        assert rank_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(rank_gradients[name], gradient, rtol=1e-3, atol=1e-5), name
        apart = sum((weights[name] - expected[name]).square().sum() for name in expected).sqrt()
        assert apart < 0.05 * moved


def test_dpo_starts_at_log_two_because_the_reference_is_the_start(config):
    trainer, metrics = trained(config.loss(regularizer="dpo", alpha=0.5), steps=3)
    assert metrics[0]["loss/regularizer"] == pytest.approx(0.6931472, abs=1e-4)
    assert abs(metrics[2]["loss/regularizer"] - 0.6931472) > 1e-3
    assert not torch.equal(
        trainer.model.language_model.lm_head.weight,
        AutoModelForCausalLM.from_pretrained(trainer.config.model.start).lm_head.weight,
    )


def test_the_learning_rate_rises_then_falls_to_zero(config):
    config = config.optimizer(lr=1.0, warmup=0.2)
    rates = [config.learning_rate(step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_cosine_falls_as_that_of_transformers_does(config):
    from transformers import get_cosine_schedule_with_warmup

    config = config.optimizer(lr=1.0, warmup=0.2, schedule="cosine")
    of_transformers = get_cosine_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], lr=1.0), 2, 10)
    expected = [of_transformers.lr_lambdas[0](step) for step in range(2, 10)]
    assert [config.learning_rate(step, 10) for step in range(10)] == pytest.approx([1 / 3, 2 / 3, *expected])


def test_dropout_is_on_what_the_head_reads_and_in_training_alone(config):
    config = config.head(dropout=0.25)
    trainer, plain = trainer_of(config), trainer_of(config.head(dropout=0.0))
    part = trainer.batch(0)
    pairs = [trainer.pairs[index] for index in part]
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    factors = trainer._dropout(part)
    assert factors.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((factors == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / factors.numel()) ** 0.5
    with torch.no_grad():
        _, states = trainer.model.rewards_and_states(texts)
        expected = (states * factors) @ trainer.model.classifier.score.weight.T
        assert torch.allclose(trainer._forward(part)[0].flatten(), expected.squeeze(1), atol=1e-6)
        assert torch.equal(trainer.model(texts)[0], plain.model(texts)[0])
    assert trainer.evaluate() == plain.evaluate()


def test_dropout_depends_on_neither_the_microbatches_nor_an_interruption(config, tmp_path):
    config = config.head(dropout=0.5).loss(bsr="squared_mean")
    trainer, other = trainer_of(config), trainer_of(config.optimizer(tokens_per_microbatch=40))
    assert len(other.microbatches(other.batch(0))) > 1 and trainer.step()["loss"] == pytest.approx(other.step()["loss"])
    for (name, one), two in zip(trainer.parameters.items(), other.parameters.values(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-5 * one.grad.abs().max().item()), name
    trainer.save(tmp_path / "checkpoint")
    resumed = trainer_of(config)
    resumed.restore(tmp_path / "checkpoint")
    trainer.step(), resumed.step()
    assert same(weights_of(trainer), weights_of(resumed))
    assert not torch.equal(trainer._dropout([0]), other._dropout([0]))  # another step drops others


def test_a_uniform_head_is_drawn_as_a_linear_layer_of_pytorch_is(config):
    score = RewardTrainee(config.model.start, config.head(init="uniform", layers=2, width=16)).classifier.score
    for layer in score.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                assert 0 < parameter.abs().max() <= bound
    wide = RewardTrainee(config.model.start, config.head(init="uniform", layers=2, width=2000)).classifier.score
    first = next(layer for layer in wide.modules() if isinstance(layer, torch.nn.Linear)).weight
    assert first.abs().max() > 0.99 * first.shape[1] ** -0.5


def test_the_margins_of_the_data_enter_the_loss_of_their_own_pairs(config):
    config = config.loss(preference="bt_margin").optimizer(tokens_per_microbatch=60)
    trainer = trainer_of(config)
    batch = [trainer.pairs[index] for index in trainer.batch(0)]
    with torch.no_grad():
        chosen, rejected = (trainer.model([getattr(pair, of) for pair in batch])[0] for of in ("chosen", "rejected"))
    losses = torch.log1p(torch.exp(rejected - chosen + torch.tensor([pair.margin for pair in batch])))
    assert trainer.step()["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_order_of_pairs_is_the_seeds(config):
    batches = [trainer_of(config.data(held_out=0.0).run(seed=seed)).batch(0) for seed in (1, 1, 2)]
    assert batches[0] == batches[1] != batches[2]


def test_every_pair_has_its_turn_once_per_pass(config):
    trainer = trainer_of(config)
    num = len(trainer.pairs)
    seen = [index for step in range(num) for index in trainer.batch(step)]  # batch_size passes
    passes = [seen[start : start + num] for start in range(0, len(seen), num)]
    assert all(sorted(one) == list(range(num)) for one in passes) and passes[0] != passes[1]


# Whole runs


def test_it_learns_and_leaves_metrics_a_plot_and_a_model(config):
    run = train(config.optimizer(epochs=8))
    metrics = read_metrics(run / "seed-1" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["held_out/accuracy"] > 0.9 and metrics[-1]["loss"] < 0.5 < metrics[0]["loss"]
    assert all((run / f"{name}.png").stat().st_size > 5000 for name in ("training", "states"))
    assert AutoModelForSequenceClassification.from_pretrained(run / "seed-1" / "model").config.num_labels == 1


def test_two_processes_do_not_train_into_one_run(config):
    run = new_directory(config.run.output_dir, "one", config)
    with only_writer(run) as alone:
        assert alone
        with pytest.raises(ConfigError, match="another process writes into this run"):
            resume(run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_run_that_was_killed_goes_on_to_the_same_bits(config, monkeypatch):
    config = config.checkpoint(every=2).evaluation(every=3).optimizer(epochs=2, weight_decay=0.1)
    config = config.model(lora={"rank": 2}).loss(regularizer="dpo", bsr="squared_mean")
    whole = train(config)
    step = RewardTrainer.step

    def killed(self):
        if self.steps_done == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(RewardTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt) as killed_by:
        train(config.run(name="killed"))
    monkeypatch.undo()
    [run] = whole.parent.glob("killed-*")
    goes_on = f"`r2m reward-model resume {run}` goes on from {run}/seed-1/checkpoints/step-000004."
    assert killed_by.value.__notes__ == [f"What was measured is in {run}: {goes_on}"]
    assert [path.name for path in checkpoints(run / "seed-1")] == ["step-000004"]
    resume(run)
    names = ("seed-1/model/model.safetensors", "seed-1/model/config.json")
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)
    metrics, expected = (read_metrics(path / "seed-1" / "metrics.jsonl") for path in (run, whole))
    assert json.dumps(metrics) == json.dumps(expected) and "held_out/accuracy" in metrics[2]
    assert not checkpoints(run / "seed-1")


def test_a_gradient_that_is_not_finite_ends_training_and_says_at_which_step(config):
    trainer, _ = trained(config, steps=1)
    with torch.no_grad():
        trainer.model.classifier.score.weight.fill_(float("nan"))
    with pytest.raises(
        NonFiniteStep, match=r"step 2: the gradient's norm is nan at learning rate .* lower optimizer.lr"
    ):
        trainer.step()


def test_a_checkpoint_of_other_pairs_is_refused(config, tmp_path):
    trainer, _ = trained(config, steps=1)
    trainer.save(tmp_path / "step-000001")
    with pytest.raises(ConfigError, match=r"step-000001: was trained on other pairs"):
        trainer_of(config.data(label_noise=0.2)).restore(tmp_path / "step-000001")


@pytest.mark.parametrize(
    ("key", "section", "changes"),
    [
        ("loss.preference", "loss", {"preference": "hinge"}),
        ("optimizer.batch_size", "optimizer", {"batch_size": 4}),
        ("head.width", "head", {"width": 7}),
        ("run.seed", "run", {"seed": 9}),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_with_both_values(config, tmp_path, key, section, changes):
    trainer, _ = trained(config, steps=1)
    trainer.save(tmp_path / "step-000001")
    (value,) = changes.values()
    with pytest.raises(
        ConfigError, match=rf"step-000001 was saved with {key} = .*, and the config has {value}: resume with"
    ):
        trainer_of(getattr(config, section)(**changes)).restore(tmp_path / "step-000001")
    faster = trainer_of(config.optimizer(lr=1e-4, epochs=3).run(name="another"))
    faster.restore(tmp_path / "step-000001")
    assert faster.steps_done == 1


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(config, tmp_path):
    trainer, _ = trained(config, steps=1)
    for step in (1, 2):
        trainer.save(tmp_path / f"step-00000{step}")
    path = tmp_path / "step-000002" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ConfigError, match=rf"{path}: is damaged: .*; use {tmp_path / 'step-000001'}, the newest whole one"
    ):
        trainer_of(config).restore(tmp_path / "step-000002")
    (tmp_path / "step-000001" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"step-000001/notes.txt: is no file of this checkpoint"):
        trainer_of(config).restore(tmp_path / "step-000001")


def test_an_ensemble_has_a_model_per_seed_and_combines_their_rewards(config):
    runs = {how: train(config.ensemble(size=2, combine=how).optimizer(epochs=0.5)) for how in ("mean", "min")}
    responses = [" the warm river", " cold", " old stone or wind"]
    rewards = {}
    for run in runs.values():
        ensemble = RewardEnsemble(run)
        tokenizer = AutoTokenizer.from_pretrained(run / "seed-1" / "model")
        ids = [[*tokenizer("the river :" + text)["input_ids"], tokenizer.eos_token_id] for text in responses]
        members = [score(load_classifier(run / f"seed-{seed}" / "model"), ids) for seed in (1, 2)]
        rewards[run] = ensemble.score("the river :", responses), torch.stack(members)
    (mean, members), (least, same_members) = (rewards[run] for run in runs.values())
    assert torch.equal(members, same_members) and not torch.allclose(*members)  # by seed, so equal in both runs
    assert torch.equal(mean, members.mean(0)) and torch.equal(least, members.amin(0))


# Data


def test_label_noise_flips_its_share_of_the_training_pairs_and_no_held_out_one(config):
    """The scores go with the labels, as an annotator who errs would give them."""
    config = config.loss(preference="bt_margin")
    clean, noisy = (load_preference_data(config.data(label_noise=share)) for share in (0.0, 0.25))
    both = list(zip(clean.training, noisy.training, strict=True))
    flipped = [(pair, other) for pair, other in both if pair != other]
    assert len(flipped) == round(0.25 * len(both)) and clean.held_out == noisy.held_out
    for pair, other in flipped:
        assert (other.chosen, other.chosen_finished) == (pair.rejected, pair.rejected_finished)
        assert (other.rejected, other.rejected_finished, other.margin) == (pair.chosen, True, pair.margin)
    assert not all(pair.rejected_finished for pair, _ in flipped)
    assert noisy == load_preference_data(config.data(label_noise=0.25))
    assert noisy.training != load_preference_data(config.data(label_noise=0.25).run(seed=2)).training


def test_the_pairs_of_a_prompt_are_held_out_together(config):
    data = load_preference_data(config)
    sides = [{pair.prompt for pair in side} for side in (data.training, data.held_out)]
    assert not sides[0] & sides[1] and len(sides[1]) == round(0.25 * sum(map(len, sides)))


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_preferences_come_from_hf_data_sets_as_from_jsonl(config, tmp_path, form):
    """One that `datasets` saved, of which splits are taken, and a directory of Parquet, as the hub has them."""
    import datasets

    rows = [json.loads(line) for line in Path(config.data.preferences).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows[:8]), validation=datasets.Dataset.from_list(rows[8:])
    )
    if form == "saved":
        both.save_to_disk(str(tmp_path / "hf"))
    else:
        (tmp_path / "hf").mkdir()
        for name, part in both.items():
            part.to_parquet(tmp_path / "hf" / f"{name}-00000-of-00001.parquet")
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    config = config.loss(preference="bt_margin")
    loaded = load_preference_data(config.data(preferences=str(tmp_path / "hf"), split="validation"))
    assert loaded == load_preference_data(config.data(preferences=str(tmp_path / "same.jsonl")))
    assert loaded.training[0].prompt[0][0] == "user" and len(loaded.training) + len(loaded.held_out) == 40
    hf = config.data(preferences=str(tmp_path / "hf"))
    both = load_preference_data(hf.data(eval=str(tmp_path / "hf"), eval_split="validation"))
    assert both.training == given_pairs_with_margins(hf) and len(both.training) == 8
    assert both.held_out == given_pairs_with_margins(hf.data(split="validation"))
    other = load_preference_data(hf.data(eval=str(tmp_path / "same.jsonl"), split="validation"))
    assert other.held_out == other.training == both.held_out
    plain = config.loss(preference="bt")
    assert given_pairs(str(tmp_path / "hf"), plain, "validation") == given_pairs(str(tmp_path / "same.jsonl"), plain)
    of_run = plain.data(eval="somewhere", eval_split="else", split="validation")
    assert given_pairs(str(tmp_path / "hf"), of_run) == given_pairs(str(tmp_path / "same.jsonl"), plain)


def given_pairs_with_margins(config):
    return load_preference_data(config.data(held_out=0.0)).training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"eval": "HF"},
            "data.eval and data.preferences are both 'HF', with data.split 'train' and .* None: the model would be evaluated",
        ),
        (
            {"eval": "HF", "split": "a", "eval_split": "a"},
            "data.eval and data.preferences are both 'HF', .* 'a' and data.eval_split 'a': .* name another split",
        ),
        (
            {"eval_split": "a"},
            "data.eval_split is 'a' and data.eval is None: .* set data.eval, too, or leave data.eval_split out",
        ),
    ],
)
def test_held_out_pairs_that_are_the_training_pairs_are_refused(config, data, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        config.data(preferences="HF", **data)
    with pytest.raises(ConfigError, match=f"^{message.replace('preferences', 'prompts')}"):
        R2MConfig().data(prompts="HF", **data)
    file = config.data.preferences
    with pytest.raises(ConfigError, match="the model would be evaluated on the data that it is trained on"):
        config.data(eval=file, eval_split="test")


def test_the_commands_take_a_split_of_their_pairs(config, tiny, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in Path(config.data.preferences).read_text(encoding="utf-8").splitlines()]
    splits = {"train": datasets.Dataset.from_list(rows[:8]), "test": datasets.Dataset.from_list(rows[8:13])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "hf"))
    for command, model in (("reward-model eval", tiny("llama", True)), ("policy-states", tiny("llama", False))):
        run = [*command.split(), model, "--out", str(tmp_path / "out")]
        for split, count in (([], 8), (["--split", "test"], 5)):
            assert main([*run, "--pairs", str(tmp_path / "hf"), *split]) == 0
            results = json.loads((tmp_path / "out" / "results.json").read_text())
            assert (results["num_pairs"] if "num_pairs" in results else results["pairs"]["num"]) == count
        assert main([*run, "--split", "test"]) == 2
        assert "--split test: is a split of --pairs, which is not given" in capsys.readouterr().err


def test_the_margin_is_the_difference_of_the_datas_scores(config):
    data = load_preference_data(config.loss(preference="bt_margin").data(held_out=0.0))
    assert statistics.fmean(pair.margin for pair in data.training) == pytest.approx(1 + 47 / 96)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"line 1: chosen_score: missing"),
        ({"chosen_score": "good", "rejected_score": 1}, r"line 1: chosen_score = 'good': not a finite number"),
        ({"chosen_score": 1, "rejected_score": 1, "chosen_finished": 0}, r"line 1: chosen_finished = 0: neither"),
    ],
)
def test_records_that_a_loss_cannot_use_are_refused_by_line(config, tmp_path, record, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | record))
    with pytest.raises(DataError, match=message):
        load_preference_data(config.loss(preference="bt_margin").data(preferences=str(path)))


# What is refused


def test_a_pair_that_the_models_chat_template_refuses_is_a_bad_record(tiny, config, tmp_path):
    start = shutil.copytree(tiny("llama", False), tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(start)
    user = {"role": "user", "content": "a river"}
    prompts = [[user], [{"role": "system", "content": "the"}, user]]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": one, "chosen": "b", "rejected": "c"}) + "\n" for one in prompts))
    config = config.data(preferences=str(pairs), held_out=0.0)
    reader = PairReader(tokenizer, AutoConfig.from_pretrained(start))
    with pytest.raises(
        DataError, match=r"line 2: .*the chat template of the reward model's tokenizer refuses it \(no system\)"
    ):
        load_preference_data(config, reader)
    assert load_preference_data(config.data(on_bad_record="skip"), reader).skipped == {"chat_template": 1}
    with pytest.raises(DataError, match="line 2"):
        train(config.model(start=str(start)).run(output_dir=str(tmp_path / "runs")))


def test_starts_that_lack_what_is_asked_for_are_refused(config, tiny):
    with pytest.raises(ConfigError, match="lack lm_head.weight; it has no language-model head to keep"):
        trainer_of(config.model(start=tiny("llama", True)).loss(regularizer="sft"))
    with pytest.raises(ConfigError, match="head.init is 'keep' and model.start .* has no head"):
        trainer_of(config.head(init="keep"))
    with pytest.raises(ConfigError, match="model.start: 'no/such-model' cannot be loaded"):
        trainer_of(config.model(start="no/such-model"))


def test_settings_of_loss_by_name_are_those_of_the_function():
    import inspect

    from r2m_async.reward_models.config import LossSection
    from r2m_async.reward_objectives import preference_loss

    parameters = inspect.signature(preference_loss).parameters
    assert all(parameters[name].default == value for name, value in LossSection().model_dump().items())


def test_the_bits_depend_on_the_seed_alone(config):
    weights = [weights_of(trained(config.run(seed=seed), steps=2)[0]) for seed in (3, 3, 4)]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_pairs_of_the_embedded_language_to_measure_on_are_the_held_out_ones(config, tmp_path, monkeypatch):
    rows = Path(config.data.preferences).read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"training": rows[:4], "golden": rows[4:8], "held_out": rows[8:11]}
    for name, part in parts.items():
        (tmp_path / name).write_text("".join(part))
    files = SimpleNamespace(**{name: tmp_path / name for name in parts})
    monkeypatch.setattr("r2m_async.from_scratch.preferences.embedded_preferences", lambda: files)
    for name in ("embedded", "embedded_golden"):
        assert given_pairs(name, config) == given_pairs(str(files.held_out), config)
    assert len(given_pairs("embedded", config)) == 3


def test_a_classifier_without_a_score_head_is_told_and_not_a_traceback(tmp_path):
    bert = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="`score` head and one label, got BertForSequenceClassification"):
        scoring_head(load_classifier(tmp_path / "bert"))

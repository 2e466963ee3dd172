"""A frozen backbone reads every text once, whatever is trained on its states, and the head learns what it would without."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2m_async.reward_models import frozen_states as module
from r2m_async.reward_models.frozen_states import frozen_states
from r2m_async.reward_models.preferences import TokenizedText, load_preference_data, tokenized
from r2m_async.reward_models.trainee import RewardTrainee
from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.reward_models.training import train
from r2m_async.runs.checkpoints import seal

pytestmark = pytest.mark.models


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(reward_model_config):
    """Frozen, three passes over the pairs; each text has a forward pass of its own."""
    config = reward_model_config.model(frozen=True).head(layers=2, width=16).logging(live=False)
    return config.optimizer(epochs=3, tokens_per_microbatch=1).evaluation(every=2)


@pytest.fixture
def read(monkeypatch):
    """The texts that backbones read, in order."""
    texts = []
    backbone = RewardTrainee._read

    def reads(self, some):
        texts.extend(text.token_ids for text in some)
        return backbone(self, some)

    monkeypatch.setattr(RewardTrainee, "_read", reads)
    return texts


def one_by_one(monkeypatch) -> None:
    """Lets a model read the texts of a pass one at a time, each at every call."""
    batched = RewardTrainee._head_states
    monkeypatch.setattr(RewardTrainee, "know_states", lambda self, states: None)
    monkeypatch.setattr(
        RewardTrainee, "_head_states", lambda self, texts: torch.cat([batched(self, [text]) for text in texts])
    )


def run_of(config) -> tuple[list[dict], dict]:
    """Metrics of two steps, an evaluation, and the trained parameters."""
    trainer = RewardTrainer(config, load_preference_data(config), config.model.start)
    records = [trainer.step(), trainer.step(), trainer.evaluate()]
    return records, {name: parameter.detach() for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize("change", [{}, {"bsr": "squared_mean"}])
def test_a_head_on_kept_states_learns_the_same_bits_as_on_states_that_are_computed_each_time(
    config, monkeypatch, change
):
    config = config.loss(**change)
    kept, head = run_of(config)
    with monkeypatch.context() as patch:
        one_by_one(patch)
        anew, other_head = run_of(config)
    assert repr(kept) == repr(anew)  # as text, in which NaN equals NaN
    assert head.keys() == other_head.keys()
    assert all(torch.equal(head[name], other_head[name]) for name in head)
    start = RewardTrainee(config.model.start, config)
    assert not torch.equal(start.classifier.score[0].weight, head["classifier.score.0.weight"])


def test_each_text_is_read_once_in_a_run_and_never_again_by_another_head_seed_or_ensemble(config, read):
    train(config.optimizer(tokens_per_microbatch=120))
    data = load_preference_data(config)
    texts = {(pair.prompt, text) for pair in (*data.training, *data.held_out) for text in (pair.chosen, pair.rejected)}
    assert len(read) == len(set(read))
    assert len(set(read)) >= len(texts) > 24
    read.clear()
    other = config.optimizer(tokens_per_microbatch=120, lr=1e-2).run(seed=4).data(label_noise=0.2)
    train(other.head(layers=1).ensemble(size=2))
    assert read == []


def test_a_backbone_that_is_trained_reads_in_every_epoch(config, read):
    config = config.model(frozen=False)
    trainer = RewardTrainer(config, load_preference_data(config), config.model.start)
    assert read == []
    while not trainer.finished:
        trainer.step()
    assert len(read) == 2 * config.optimizer.batch_size * trainer.num_steps > 2 * len(set(read))


def states_of(config, change=None, **how) -> dict:
    trainee = RewardTrainee(config.model.start, config)
    if change is not None:
        change(trainee)
    data = load_preference_data(config)
    pairs = [tokenized(pair, trainee.tokenizer, 64) for pair in data.training[: how.get("num", 8)]]
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    return frozen_states(trainee, texts, how.get("max_tokens", 120))


@pytest.mark.parametrize("what", ["weights", "texts", "max_tokens"])
def test_states_of_other_weights_texts_or_passes_are_computed_anew(config, read, what):
    def moved(trainee):
        with torch.no_grad():
            trainee.classifier.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3

    states_of(config)
    read.clear()
    states_of(config)
    assert read == []
    states_of(config, **{"weights": {"change": moved}, "texts": {"num": 7}, "max_tokens": {"max_tokens": 60}}[what])
    assert read


def test_a_head_that_changes_takes_the_kept_states(config, cache):
    states = states_of(config)
    [directory] = cache.glob("backbone-states-*")
    stored = load_file(directory / "states.safetensors")["states"]
    assert sorted(map(tuple, stored.tolist())) == sorted(tuple(state.tolist()) for state in states.values())
    save_file({"states": stored + 1}, directory / "states.safetensors")  # seen if it is read, and not computed again
    seal(directory)
    again = states_of(config.head(layers=1))
    assert all(torch.equal(again[text], states[text] + 1) for text in states)


def test_kept_states_that_were_damaged_are_computed_anew(config, cache, read):
    states = states_of(config)
    [directory] = cache.glob("backbone-states-*")
    file = directory / "states.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    read.clear()
    again = states_of(config)
    assert read and all(torch.equal(again[text], states[text]) for text in states)
    assert file.read_bytes() != data


def test_ranks_share_the_texts_and_each_gets_the_whole(config, monkeypatch):
    whole = states_of(config)
    monkeypatch.setattr(module, "num_ranks", lambda: 3)
    monkeypatch.setattr(module, "summed", lambda tensor: tensor)  # each rank's own part
    trainee = RewardTrainee(config.model.start, config)
    unique = [TokenizedText(token_ids=ids, prompt_len=1) for ids in whole]
    parts = []
    for number in range(3):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        parts.append(module._computed(trainee, unique, 120, None))
    filled = torch.stack([part.any(1) for part in parts])
    assert filled.sum(0).tolist() == [1] * len(unique)
    assert filled.any(1).all(), "every rank had a part"
    total = sum(parts)
    assert all(torch.equal(total[row], whole[text.token_ids]) for row, text in enumerate(unique))


def test_states_keep_the_models_number_format(config):
    states = states_of(config.model(dtype="bfloat16"))
    assert {state.dtype for state in states.values()} == {torch.bfloat16}


def test_progress_counts_the_texts(config):
    seen = []
    trainer = RewardTrainer(
        config, load_preference_data(config), config.model.start, lambda *counts: seen.append(counts)
    )
    total = len(
        {text.token_ids for pair in (*trainer.pairs, *trainer.held_out) for text in (pair.chosen, pair.rejected)}
    )
    assert seen == [("frozen backbone: texts read once", done, total) for done in range(1, total + 1)]

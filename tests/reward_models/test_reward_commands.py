"""`r2m reward-model train | resume`, its config and its shipped files, on the embedded language in small."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.from_scratch import embedded
from r2m_async.from_scratch import preferences as embedded_preferences
from r2m_async.from_scratch.language import gold_reward, prompts
from r2m_async.from_scratch.preferences import EmbeddedPreferenceSettings
from r2m_async.from_scratch.pretraining import score
from r2m_async.models.reward import load_classifier
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.runs.records import read_metrics

ALL_CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "reward_model").glob("*.yaml"))
CONFIGS = [path for path in ALL_CONFIGS if path.stem != "smollm2"]  # those of the embedded language


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def golds(record):
    return [gold_reward(record["prompt"], record[one], record[f"{one}_finished"]) for one in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def small(little_embedded, tmp_path_factory):
    """The embedded language's start and comparisons."""
    settings = EmbeddedPreferenceSettings(prompts=60, held_out_prompts=20, width=16, layers=1, texts=60, steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2M_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded_preferences.embedded_preferences(little_embedded, settings)


@pytest.mark.models
def test_embedded_pairs_follow_noisy_gold_in_training_and_gold_itself_on_other_prompts_held_out(small):
    training, held_out = records_of(small.training), records_of(small.held_out)
    right = [chosen > rejected for chosen, rejected in map(golds, training)]
    assert 0.5 < sum(right) / len(right) < 0.95 and len(right) > 60
    assert all(record["chosen_score"] > record["rejected_score"] for record in training)
    assert all([record["chosen_score"], record["rejected_score"]] == golds(record) for record in held_out)
    assert not {record["prompt"] for record in training} & {record["prompt"] for record in held_out}
    assert {record["prompt"] for record in training} <= set(prompts(60, 0))
    golden = records_of(small.golden)
    assert all([record["chosen_score"], record["rejected_score"]] == golds(record) for record in golden)
    same = ({frozenset((one["chosen"], one["rejected"])) for one in records} for records in (training, golden))
    assert len(golden) == len(training) and next(same) == next(same)


@pytest.mark.models
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_trains_on_the_embedded_language(
    path, small, little_embedded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(embedded_preferences, "embedded_preferences", lambda: small)
    monkeypatch.setattr(embedded, "embedded_models", lambda: little_embedded)
    few = ["optimizer.epochs=0.5", "data.label_noise=0.25", f"run.output_dir={tmp_path}"]
    assert main(["reward-model", "train", str(path), *few]) == 0
    out = capsys.readouterr().out
    [run] = tmp_path.glob(f"{path.stem}-*")
    assert f"run directory: {run}" in out and "training pairs" in out and "held out 0." in out
    resolved = RewardModelConfig.from_yaml(run / "config.yaml")
    assert resolved == RewardModelConfig.from_yaml(path, few)
    metrics = read_metrics(run / "seed-0" / "metrics.jsonl")
    assert len(metrics) >= 2 and all(0 < record["loss"] < 5 for record in metrics)
    assert {
        key.removeprefix("loss/") for key, value in metrics[0].items() if key.startswith("loss/") and value == value
    } == {
        "bt": {"preference"},
        "bsr": {"preference", "bsr"},
        "grm": {"preference", "regularizer"},
        "pretrained": {"preference"},
    }[path.stem]
    tokenizer = AutoTokenizer.from_pretrained(run / "seed-0" / "model")
    ids = [tokenizer(text)["input_ids"] for text in ("the river", "a house")]
    rewards = score(load_classifier(run / "seed-0" / "model"), ids)
    assert rewards.isfinite().all() and rewards[0] != rewards[1]
    assert main(["reward-model", "resume", str(run)]) == 0  # nothing is left to do


@pytest.mark.models
def test_the_embedded_start_is_a_language_model_that_no_reward_was_taught(small):
    _, info = AutoModelForCausalLM.from_pretrained(small.start, output_loading_info=True)
    assert not info["missing_keys"]
    _, info = AutoModelForSequenceClassification.from_pretrained(small.start, num_labels=1, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}


def test_every_file_is_a_config_and_only_a_chat_model_needs_more_than_this_package():
    starts = {path.stem: RewardModelConfig.from_yaml(path).model.start for path in ALL_CONFIGS}
    assert [name for name, start in starts.items() if not start.startswith("embedded")] == ["smollm2"]


def test_the_shipped_configs_differ_in_loss_and_head_alone():
    assert [path.stem for path in CONFIGS] == ["bsr", "bt", "grm", "pretrained"]
    trees = [RewardModelConfig.from_yaml(path).to_dict() for path in CONFIGS]
    for tree in trees:
        del tree["loss"], tree["head"], tree["run"]["name"]
    assert trees[0] == trees[1] == trees[2]
    for tree in trees:
        del tree["model"]["start"], tree["data"]["preferences"]
    assert trees[3] == trees[0]


PAPERS = {
    "bsr_llama3.2_3b": (3e-6, "linear", 0.05, 128, 1, 1.0, None, "squared_mean", 1e-3),
    "bsr_skywork_llama3.1_8b": (2e-6, "linear", 0.05, 128, 1, 1.0, None, "squared_mean", 16 * 1e-3),
    "grm_gemma_2b": (1e-5, "cosine", 0.03, 16, 2, 5.0, "sft", None, None),
    "grm_llama3_8b": (2e-6, "cosine", 0.03, 512, 1, 5.0, "sft", None, None),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_presets_have_the_numbers_of_their_papers(name):
    folder = CONFIGS[0].parents[1] / "presets" / "reward_model"
    assert {path.stem for path in folder.glob("*.yaml")} == set(PAPERS)
    config = RewardModelConfig.from_yaml(folder / f"{name}.yaml")
    optimizer, loss = config.optimizer, config.loss
    told = (optimizer.lr, optimizer.schedule, optimizer.warmup, optimizer.batch_size, optimizer.epochs)
    lambda_ = loss.bsr_weight if loss.bsr else None
    assert (*told, optimizer.max_grad_norm, loss.regularizer, loss.bsr, lambda_) == pytest.approx(PAPERS[name])
    assert (config.head.layers, config.head.dropout) == ((2, 0.1) if loss.regularizer else (1, 0.0))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"los": {}}, "los: no such key; did you mean loss?"),
        ({"loss": {"bsr_weigth": 1}}, "loss.bsr_weigth: no such key; did you mean loss.bsr_weight?"),
        ({"loss": {"lr": 1}}, "loss.lr: no such key; did you mean optimizer.lr?"),
        ({"model": {"lora": {"rnk": 1}}}, "model.lora.rnk: no such key; did you mean model.lora.rank?"),
        ({"data": {"label_noise": 0.5}}, "data.label_noise: input should be less than 0.5; got 0.5"),
        ({"model": {"frozen": True, "lora": {}}}, "model.frozen is True and model.lora is set"),
        ({"model": {"frozen": True}, "loss": {"regularizer": "sft"}}, "loss.regularizer is 'sft'"),
        ({"head": {"init": "keep", "layers": 2}}, "head.init is 'keep' and head.layers is 2"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_key_and_a_remedy(sections, message):
    with pytest.raises(ConfigError) as error:
        RewardModelConfig.from_dict(sections)
    assert message in str(error.value)


def test_a_section_called_changes_its_keys_alone():
    config = RewardModelConfig().loss(bsr="squared_mean").ensemble(size=3).run(seed=5)
    assert (config.loss.bsr, config.seeds) == ("squared_mean", [5, 6, 7])
    assert RewardModelConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


def test_a_mistake_on_the_command_line_is_told_in_one_line(tmp_path, capsys):
    assert main(["reward-model", "train", str(CONFIGS[0]), "loss.beta=-1"]) == 2
    assert main(["reward-model", "resume", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "loss.beta: input should be greater than 0; got -1" in errors[0] and "cannot be read" in errors[1]


@pytest.mark.models
@pytest.mark.parametrize(
    ("key", "record", "told"),
    [
        ("data.preferences", {"question": "a", "chosen": "b", "rejected": "c"}, "add it, name another field as data.prompt_field or"),
        ("data.preferences", {"prompt": "a", "chosen": "b"}, "'chosen'; add it, name another field as data.columns.rejected or set"),
        ("model.start", None, "there is no such directory either (now in "),
    ],
)  # fmt: skip
def test_a_training_that_cannot_begin_leaves_no_run_directory(tiny, tmp_path, capsys, monkeypatch, key, record, told):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record or {"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    sets = {"data.preferences": tmp_path / "pairs.jsonl", "model.start": tiny("llama", True), "head.init": "keep"}
    sets |= {"run.output_dir": tmp_path / "runs"} | ({key: "nothere"} if record is None else {})
    sets = [f"{one}={value}" for one, value in sets.items()]
    assert main(["reward-model", "train", str(CONFIGS[0]), *sets]) == 2
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())

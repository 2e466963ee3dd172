"""A weight file that is cut off, empty or no weight file is refused by its key and its name, wherever a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.models.weight_files import check_weight_files

pytestmark = pytest.mark.models

DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a page for an error": lambda data: b"<html>404</html>",
}


def ring(model: Path, config: R2MConfig) -> None:
    from r2m_async.launch.ring import Ring

    Ring.of(config, in_process=True).stop()


def loaded_policy(model: Path, config: R2MConfig) -> None:
    from r2m_async.models.loading import load_policy

    load_policy(str(model), config)


def loaded_reward_model(model: Path, config: R2MConfig) -> None:
    from r2m_async.models.reward import load_reward_model

    load_reward_model(str(model), config)


def loaded_critic(model: Path, config: R2MConfig) -> None:
    from r2m_async.models.critic import load_critic

    load_critic(str(model), config)


def trained(model: Path, config: R2MConfig) -> None:
    from r2m_async.reward_models.config import RewardModelConfig
    from r2m_async.reward_models.trainee import RewardTrainee

    RewardTrainee(str(model), RewardModelConfig())


def scored(model: Path, config: R2MConfig) -> None:
    from r2m_async.reward_models.ensemble import RewardEnsemble

    RewardEnsemble(model)


def asked(model: Path, config: R2MConfig) -> None:
    from r2m_async.evaluation.answering import GenerationSettings, generate_answers

    generate_answers(
        str(model), model / "prompts", model / "out", GenerationSettings(format="tldr", engine="transformers")
    )


USES = [
    ("model.policy", False, ring),
    ("model.reference", False, ring),
    ("critic.model", False, ring),
    ("reward.model", True, ring),
    ("model.policy", False, loaded_policy),
    ("model.reference", False, loaded_policy),
    ("reward.model", True, loaded_reward_model),
    ("critic.model", False, loaded_critic),
    ("model.start", False, trained),
    ("reward model", True, scored),
    ("MODEL", False, asked),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("key", "classifier", "use"), USES, ids=[f"{use.__name__} {key}" for key, _, use in USES])
def test_a_weight_file_that_is_not_whole_is_refused_by_key_and_file(
    tiny, tiny_config, tmp_path, key, classifier, use, damage
):
    model = tmp_path / "model"
    shutil.copytree(tiny("llama" if classifier else "qwen2", classifier), model)
    weights = model / "model.safetensors"
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    config = tiny_config.advantage(name="gae").objective(ratio="token") if key == "critic.model" else tiny_config
    section, dot, field = key.partition(".")
    if dot and key != "model.start":
        config = getattr(config, section)(**{field: str(model)})
    said = rf"^{key} '{model}': {weights} is not a complete weight file: .*; copy or download it again$"
    with pytest.raises(ConfigError, match=said):
        use(model, config)


def test_of_several_files_each_is_looked_at_and_their_index(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny("qwen2", False), model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [list(tensors)[::2], list(tensors)[1::2]]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "consolidated.safetensors").write_bytes(b"that nobody loads")
    check_weight_files("model.policy", str(model))
    (model / files[1]).write_bytes((model / files[1]).read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"model.policy .*: {model / files[1]} is not a complete weight file"):
        check_weight_files("model.policy", str(model))
    (model / files[1]).unlink()
    with pytest.raises(
        ConfigError, match=f"names 2 weight files, and {files[1]} is not there; copy or download it again"
    ):
        check_weight_files("model.policy", str(model))
    (model / "model.safetensors.index.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"model.policy .*: .*index\.json cannot be read: .*; copy or download it again"
    ):
        check_weight_files("model.policy", str(model))


def test_the_second_layer_of_a_reward_models_head_is_one_of_its_files(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", True), model)
    (model / "reward_head.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"reward.model .*reward_head\.safetensors is not a complete weight file"):
        check_weight_files("reward.model", model)
    for absent in ("no/such-model-on-this-machine", tmp_path / "no", "no name, at all"):
        check_weight_files("reward.model", absent)  # for the loader to refuse


def test_a_model_in_the_hubs_cache_is_looked_at_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123")
    shutil.copytree(tiny("qwen2", False), model / "snapshots" / "0123")
    check_weight_files("model.policy", "some/model")
    (model / "snapshots" / "0123" / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"model.policy 'some/model': .*0123/model\.safetensors is not a complete weight file"
    ):
        check_weight_files("model.policy", "some/model")

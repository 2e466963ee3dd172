"""An attention that cannot train here is refused before anything is loaded, with what is missing."""

import json

import pytest
import torch

from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_code
from r2m_async.models.attention import check_attention

MISSING = [
    ("flash_attention_2", r"flash-attn is not installed: pip install 'r2m-async\[flash-attn\]'"),
    ("flash_attention_3", "flash-attn-3 is not installed"),
    ("flash_attention_4", "flash-attn-4 is not installed"),
    ("kernels-community/flash-attn2", r"kernels, .* is not installed: pip install 'transformers\[kernels\]'"),
    ("somebody/paged-attention", "kernels, .* is not installed"),
]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as these checks can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def without_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def with_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.parametrize(("attention", "said"), MISSING)
def test_an_attention_without_its_package_is_refused_with_what_to_install(on_a_gpu, without_packages, attention, said):
    with pytest.raises(ConfigError, match=rf"model.attention is '{attention}', and the package {said}.*or use"):
        check_attention(attention, "auto", "bfloat16")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_an_attention_that_trains_on_gpus_alone_is_refused_without_one(with_packages, monkeypatch, attention):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, said in (("auto", "torch finds no GPU on this machine"), ("cpu", "run.device is 'cpu'")):
        with pytest.raises(ConfigError, match=f"'{attention}', which trains on GPUs alone, and {said}"):
            check_attention(attention, device, "bfloat16")


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_flash_attention_is_refused_for_float32(on_a_gpu, with_packages, attention):
    with pytest.raises(ConfigError, match="16 bits alone, and model.dtype is 'float32': use model.dtype bfloat16"):
        check_attention(attention, "auto", "float32")
    check_attention(attention, "auto", "bfloat16")


def test_an_attention_for_an_engines_cache_is_refused():
    with pytest.raises(ConfigError, match=r"'paged\|eager', which reads the cache.*use 'eager'"):
        check_attention("paged|eager", "cpu", "float32")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_computes_everywhere_needs_nothing(without_packages, attention):
    check_attention(attention, "cpu", "float32")


def test_everything_that_is_missing_is_told_at_once_by_check_and_by_both_trainings(tmp_path, capsys, tiny_config):
    config = tiny_config.model(attention="flash_attention_2", policy="no/such-model")
    with pytest.raises(ConfigError, match=r"(?s)not installed.*run.device is 'cpu'.*model.dtype is 'float32'"):
        check_code(config)
    path = tmp_path / "reward.yaml"
    path.write_text(json.dumps({"run": {"output_dir": str(tmp_path)}, "model": {"attention": "flash_attention_2"}}))
    assert main(["reward-model", "train", str(path)]) == 2
    assert "r2m-async[flash-attn]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]

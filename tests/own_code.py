"""Models whose architecture is Python code in their own files, as `trust_remote_code` is for."""

import json
import shutil
from pathlib import Path

CODE = """
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)


class OwnConfig(LlamaConfig):
    model_type = "own-of-a-test"


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass


AutoModel.register(OwnConfig, OwnModel)  # the classifier makes its decoder by this
"""
CLASSES = {
    "AutoConfig": "OwnConfig",
    "AutoModel": "OwnModel",
    "AutoModelForCausalLM": "OwnForCausalLM",
    "AutoModelForSequenceClassification": "OwnForSequenceClassification",
}


def with_own_code(model: str, directory: Path, tokenizer: bool = False) -> str:
    """A copy of a Llama that only its own code can load; with `tokenizer` its tokenizer is such code, too."""
    shutil.copytree(model, directory)
    (directory / "own.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    kind = (
        "AutoModelForSequenceClassification" if "ForSequence" in config["architectures"][0] else "AutoModelForCausalLM"
    )
    config |= {
        "model_type": "own-of-a-test",
        "architectures": [CLASSES[kind]],
        "auto_map": {auto: f"own.{name}" for auto, name in CLASSES.items()},
    }
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        path = directory / "tokenizer_config.json"
        own = {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return str(directory)

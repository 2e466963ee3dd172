"""Tiny random models of different architectures and tokenizers, made once per session; Ray, started once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: workers would starve beside another test

import json
import random
import select
import sys
import time
from collections import Counter

import pytest
from forked_workers import forked_workers

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "wind",
    "old",
    "warm",
    "cold",
    "sings",
    "falls",
    "moves",
    "softly",
    "and",
    "or",
    "not",
    "one",
    "two",
    "three",
    ".",
    ":",
]


PERTURBED = Path(__file__).parent / "perturbed"


def pytest_addoption(parser):
    parser.addoption(
        "--perturb-linear",
        action="store_true",
        help="compute matrix products as another processor might, a unit in the last place off (tests/perturbed)",
    )


def pytest_configure(config):
    """torch finds the kernels on the path when it is imported, here and in every process that a test starts."""
    if config.getoption("--perturb-linear"):
        assert "torch" not in sys.modules, "a plugin imported torch before its kernels could be perturbed"
        sys.path.insert(0, str(PERTURBED))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PERTURBED), os.environ.get("PYTHONPATH")]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is fast comes first, then what needs models, then Ray.

    There the files with the fewest tests come first: theirs are the longest, and the end is then even on both workers.
    """

    def part(item):
        return 2 if item.get_closest_marker("ring") else 1 if item.get_closest_marker("models") else 0

    counts = Counter((part(item), item.path) for item in items)
    items.sort(key=lambda item: (part(item), counts[part(item), item.path] if part(item) == 2 else 0))


def left_of(processes, seconds: float = 30.0) -> list:
    """Those of psutil's processes that have not ended within so many seconds. Returns as soon as all have."""
    deadline, left = time.monotonic() + seconds, []
    for process in processes:
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:  # asked once the descriptor is there: another process may have had its number since
            if process.is_running() and not select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
                left.append(process)
        finally:
            os.close(descriptor)
    return left


def word_of(pipe: int, seconds: float) -> str:
    """What processes write next into a pipe; nothing once all have closed it, or if that takes longer."""
    return os.read(pipe, 1 << 16).decode() if select.select([pipe], [], [], seconds)[0] else ""


@pytest.fixture(autouse=True)
def threads_can_be_set():
    """A vLLM engine in this process forbids `torch.set_num_threads` from there on, to all tests that follow."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads = torch._C.set_num_threads


def save_tokenizer(directory: Path, words: list[str]) -> int:
    """A byte-level BPE tokenizer (the kind every family loads) that knows `words` whole; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained(directory)
    return len(wrapped)


def save_tiny_model(
    directory: Path, family: str, classifier: bool, words: list[str], seed: int, width: int = 32
) -> str:
    """A random 2-layer model of a family (llama, qwen2, gpt_neox) with its tokenizer, as an HF directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    vocab_size = save_tokenizer(directory, words)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width, "hidden_size": width}
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 1
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **sizes,
    )
    if classifier:
        config.num_labels = 1
    torch.manual_seed(seed)
    model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(family, classifier)`: the directory of a tiny model; policy and reward model have their own vocabularies."""
    made = {}
    seeds = {
        ("qwen2", False): 0,
        ("llama", True): 1,
        ("llama", False): 2,
        ("gpt_neox", False): 3,
        ("gpt_neox", True): 4,
    }

    def make(family: str, classifier: bool) -> str:
        if (family, classifier) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{'reward' if classifier else 'policy'}")
            words = WORDS[::2] if classifier else WORDS
            made[family, classifier] = save_tiny_model(
                directory,
                family,
                classifier,
                words,
                seed=seeds.get((family, classifier), 5),
                width=48 if classifier else 32,
            )
        return made[family, classifier]

    return make


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"the {a} {b} :"}) for a in WORDS[2:8] for b in WORDS[5:12]]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """24 prompts with two pairs each; the chosen response has "warm" where the rejected one has "cold"."""
    rng = random.Random(0)
    records = []
    for number in range(48):
        words = rng.choices(WORDS[:6], k=rng.randrange(1, 9))
        at = rng.randrange(len(words) + 1)
        chosen, rejected = (" " + " ".join([*words[:at], tone, *words[at:]]) for tone in ("warm", "cold"))
        prompt = f"the {WORDS[number % 8]} {WORDS[number % 3]} :"
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        records[-1] |= {"chosen_score": 2.0 + number / 48, "rejected_score": 1.0, "rejected_finished": number % 2 == 0}
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def reward_model_config(tiny, pairs_file, tmp_path):
    """A reward model's training that takes a second."""
    from r2m_async.reward_models.config import RewardModelConfig

    return RewardModelConfig.from_dict(
        {
            "run": {"output_dir": str(tmp_path / "runs"), "device": "cpu", "seed": 1},
            "model": {"start": tiny("llama", False)},
            "data": {"preferences": str(pairs_file), "held_out": 0.25},
            "optimizer": {"lr": 3e-3, "batch_size": 8, "epochs": 1, "tokens_per_microbatch": 120},
        }
    )


@pytest.fixture(scope="session")
def tiny_config(tiny, prompts_file):
    """A ring that runs in a second: Qwen2 policy, Llama reward model, groups of 3, 2 groups a step."""
    from r2m_async.config import R2MConfig

    return R2MConfig.from_dict(
        {
            "run": {"num_steps": 3, "seed": 1, "device": "cpu"},
            "model": {"policy": tiny("qwen2", False)},
            "reward": {"model": tiny("llama", True)},
            "data": {"prompts": prompts_file},
            "rollouts": {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "max_prompt_tokens": 16},
            "head": {"width": 16, "lr": 1e-3},
            "learner": {"lr": 1e-3},
        }
    )


@pytest.fixture(scope="session")
def ray_session():
    import ray

    with forked_workers():
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            object_store_memory=300 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def little_embedded(tmp_path_factory):
    """The embedded language's, by a policy that has learnt a little."""
    from r2m_async.from_scratch import embedded
    from r2m_async.from_scratch.embedded import EmbeddedSettings, embedded_models

    sizes = {"policy_width": 32, "policy_layers": 1, "policy_texts": 400, "policy_steps": 60, "policy_lr": 1e-2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2M_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(embedded, "NUM_MEASURED_PROMPTS", 4)
        return embedded_models(
            settings=EmbeddedSettings(**sizes, reward_width=16, reward_layers=1, reward_prompts=4, reward_epochs=1)
        )

"""Tiny random models of different architectures and tokenizers, made once per session; Ray, started once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: workers would starve beside another test

import gc
import json
import random
import signal
import sys
from collections import Counter

import pytest
from tiny import WORDS, save_tiny_model

from r2m_async.launch.forked_workers import WorkerTemplate

pytest.register_assert_rewrite("groups", "processes", "rings")  # helpers with assertions, which test files import

PERTURBED = Path(__file__).parent / "perturbed"


def pytest_addoption(parser):
    parser.addoption(
        "--perturb-linear",
        action="store_true",
        help="compute matrix products as another processor might, a unit in the last place off (tests/perturbed)",
    )


def pytest_configure(config):
    """Signals are as from a terminal; with --perturb-linear torch finds its kernels on the path, in every process."""
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup and a shell's background have them ignored, by children too
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
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


@pytest.fixture(autouse=True)
def what_is_there_already_is_not_searched_for_garbage():
    """The imports alone are millions of objects, through which an engine goes seven times as it starts and ends."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads_can_be_set():
    """A vLLM engine in this process forbids `torch.set_num_threads` from there on, to all tests that follow."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads = torch._C.set_num_threads


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

    with pytest.MonkeyPatch.context() as patch:
        # Workers import the tests' helpers. xdist sets this, pytest alone does not.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        template = WorkerTemplate("vllm")
        with template.forks_workers():
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
        template.close()


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

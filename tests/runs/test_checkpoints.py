"""Checkpoints: what is refused by the name of its file, what a resumed run may say otherwise, and that a save is whole."""

import importlib.util
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_whole import names, no_file_larger_than

from actors.replay_queue import ReplayQueue
from r2m_async import codec
from r2m_async.codec import encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, DiskError
from r2m_async.launch.ring import Ring
from r2m_async.launch.training import keep_checkpoint
from r2m_async.runs.checkpoints import (
    MANIFEST,
    checkpoint_path,
    checkpoints,
    read_checkpoint,
    seal,
    verified,
    write_parts,
)
from r2m_async.runs.directory import RunDirectory
from r2m_async.runs.resuming import MAY_CHANGE, check_resumable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("checkpoint_faults", ROOT / "benchmarks" / "checkpoint_faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exact_config(tiny_config):
    return tiny_config.run(num_steps=4).scheduling(max_policy_age=1, max_head_age=1, lag="exact")


@pytest.fixture(scope="module")
def run(exact_config, tmp_path_factory) -> Path:
    """With checkpoints of the steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("run")
    with Ring.of(exact_config, in_process=True) as ring:
        for step in (1, 2, 3):
            ring.step()
            ring.save(checkpoint_path(run, step))
    return run


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


# Damage


@pytest.mark.ring
def test_whatever_happens_to_a_rings_checkpoint_is_refused_by_the_files_name(faults, run, exact_config, tmp_path):
    places = [checkpoint_path(run, step) for step in (3, 2)]
    counts = faults.damages(*places, exact_config, 60, 0, tmp_path)
    assert counts == dict(accepted=0, unnamed=0, flip=10, zero=10, cut=10, missing=10, mixed=10, stray=10)


@pytest.mark.ring
def test_a_ring_is_not_resumed_from_another_steps_head_and_the_newest_whole_one_is_named(copy, exact_config):
    newest, before = checkpoint_path(copy, 3), checkpoint_path(copy, 2)
    shutil.copy(before / "head_learner.msgpack", newest)
    said = rf"{newest}/head_learner.msgpack: is damaged, or rather that of step-000002: .*; use {before}, the newest whole one"
    with pytest.raises(ConfigError, match=said):
        Ring.of(exact_config, in_process=True, resume=newest)
    (before / "config.yaml").write_text((before / "config.yaml").read_text() + "\n")
    with pytest.raises(ConfigError, match=rf"; use {checkpoint_path(copy, 1)}, the newest whole one"):
        read_checkpoint(newest, exact_config)
    shutil.rmtree(checkpoint_path(copy, 1))
    with pytest.raises(ConfigError, match="; there is no whole one beside it"):
        read_checkpoint(newest, exact_config)


@pytest.mark.ring
def test_a_path_may_be_a_text_and_what_is_none_is_refused_with_what_is(copy, exact_config):
    with Ring.of(exact_config, in_process=True, resume=str(checkpoint_path(copy, 3))) as ring:
        assert ring.step()["step"] == 4
        ring.save(str(copy / "text"))
    assert read_checkpoint(copy / "text", exact_config)
    with pytest.raises(
        ConfigError, match=rf"{copy}: has no manifest.json: .*; use {checkpoint_path(copy, 3)}, the newest"
    ):
        Ring.of(exact_config, in_process=True, resume=copy)
    with pytest.raises(ConfigError, match="absent: is not there"):
        Ring.of(exact_config, in_process=True, resume=copy / "absent")
    (checkpoint_path(copy, 3) / MANIFEST).unlink()
    with pytest.raises(
        ConfigError, match="step-000003: has no manifest.json: .*an older version of r2m-async wrote it"
    ):
        read_checkpoint(checkpoint_path(copy, 3), exact_config)


def test_parts_of_another_version_are_refused_by_name(tmp_path, monkeypatch):
    config = R2MConfig()
    parts = {"step": encode(3), "policy_learner": encode({"version": 3})}
    with monkeypatch.context() as other:
        other.setattr(codec, "SCHEMA", codec.SCHEMA + 1)
        parts["head_learner"] = encode({"version": 3})
    write_parts(tmp_path, parts, config)
    with pytest.raises(
        ConfigError, match=r"head_learner\.msgpack: cannot be read: has schema \d+; .*use the version that"
    ):
        read_checkpoint(tmp_path, config)
    (tmp_path / "config.yaml").write_text("head: {wdith: 4}\n")
    (tmp_path / "head_learner.msgpack").unlink()
    seal(tmp_path)
    with pytest.raises(
        ConfigError, match=r"config\.yaml: this version of r2m-async does not know this config: .*wdith"
    ):
        read_checkpoint(tmp_path, config)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match=r"manifest\.json: has format 2, and this version of r2m-async reads 1"):
        read_checkpoint(tmp_path, config)


def test_manifests_that_cannot_be_read_are_told_and_no_other_is_waited_for(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / MANIFEST).mkdir(parents=True)  # of which the disk says an error
    with pytest.raises(
        ConfigError, match=r"step-000002/manifest\.json: cannot be read: Is a directory; there is no whole"
    ):
        read_checkpoint(tmp_path / "step-000002", R2MConfig())


def test_a_part_of_another_size_is_told_as_that_of_the_other_checkpoint(tmp_path):
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        write_parts(tmp_path / str(step), {"step": encode(step), "head_learner": encode("x" * 100 * step)}, R2MConfig())
    shutil.copy(tmp_path / "1" / "head_learner.msgpack", tmp_path / "2")
    size = len((tmp_path / "1" / "head_learner.msgpack").read_bytes())
    with pytest.raises(
        ConfigError, match=rf"2/head_learner\.msgpack: is damaged, or rather that of 1: it has {size} bytes"
    ):
        read_checkpoint(tmp_path / "2", R2MConfig())


@pytest.mark.parametrize("way", ["exchange", "fallback"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, faults, monkeypatch, way):
    if way == "fallback":
        monkeypatch.setattr("r2m_async.whole._exchange", lambda one, other: False)
    faults.save(tmp_path / "place", 1)
    asked = []

    def wanted(name: str) -> bool:
        asked.append(name)
        if len(asked) == 3:
            faults.save(tmp_path / "place", 2)
        return name == "step.msgpack"

    (step,) = verified(tmp_path / "place", wanted).values()
    assert codec.decode(step) == 2 and len(asked) > 9


# Saving


@pytest.mark.ring
@pytest.mark.parametrize("way", ["exchange", "fallback"])
def test_at_every_instant_of_a_rings_save_a_reader_finds_the_old_checkpoint_or_the_new(
    exact_config, faults, tmp_path, monkeypatch, way
):
    """Kills by SIGKILL are in `test_whole`; what one would leave is what the disk shows before each call that touches it."""
    if way == "fallback":
        monkeypatch.setattr("r2m_async.whole._exchange", lambda one, other: False)
    place, seen, saver = tmp_path / "checkpoint", [], None

    def look(event: str, _: object) -> None:
        nonlocal saver
        if event in faults._TOUCHING and threading.get_ident() == saver:
            saver = None  # the reader's own calls
            seen.append(codec.decode(read_checkpoint(place, exact_config)["step"]))
            saver = threading.get_ident()

    sys.addaudithook(look)
    with Ring.of(exact_config, in_process=True) as ring:
        ring.step()
        ring.save(place)
        ring.step()
        try:
            saver = threading.get_ident()
            ring.save(place)
        finally:
            saver = None
    assert set(seen) == {1, 2} and seen == sorted(seen) and len(seen) > 20
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.ring
def test_a_disk_that_does_not_take_a_checkpoint_leaves_the_one_before_it_and_no_part(exact_config, tmp_path):
    with Ring.of(exact_config, in_process=True) as ring:
        ring.step()
        ring.save(checkpoint_path(tmp_path, 1))
        ring.step()
        with (
            no_file_larger_than(20_000),
            pytest.raises(DiskError, match=r"step-000002: cannot be written: File too large"),
        ):
            ring.save(checkpoint_path(tmp_path, 2))
        assert names(tmp_path / "checkpoints") == ["step-000001"]
        with pytest.raises(DiskError, match="^/sys/r2m/checkpoint: cannot be written: "):
            ring.save(Path("/sys/r2m/checkpoint"))
        ring.save(checkpoint_path(tmp_path, 2))
        assert ring.step()["step"] == 3
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (1, 2)]


@pytest.mark.ring
def test_a_copy_beside_the_checkpoints_neither_ends_a_run_nor_goes_with_the_old_ones(exact_config, tmp_path):
    config = exact_config.checkpoint(every=1, keep=1)
    with Ring.of(config, in_process=True) as ring, RunDirectory(tmp_path, config) as run:
        ring.step()
        keep_checkpoint(ring, run)
        shutil.copytree(checkpoint_path(tmp_path, 1), tmp_path / "checkpoints" / "step-000001.good")
        ring.step()
        keep_checkpoint(ring, run)
    assert names(tmp_path / "checkpoints") == ["step-000001.good", "step-000002"]


# Keys


CHANGED = {
    "run.num_steps": 9,
    "run.device": "auto",
    "model.attention": "eager",
    "reward.replicas": 2,
    "head.lr": 0.5,
    "rollouts.num_actors": 3,
    "rollouts.hang_after": 5.0,
    "scheduling.stall_after": 60.0,
    "scheduling.overage_after": 7.0,
    "cluster.wait": 5.0,
    "queue.max_bytes": 10**9,
    "objective.kl_stop": 3.0,
    "learner.lr": 0.5,
    "learner.schedule": "linear",
    "learner.max_grad_norm": 2.0,
    "learner.tokens_per_microbatch": 64,
    "learner.on_nonfinite": "skip",
    "weights.timeout": 5.0,
    "checkpoint.every": 1,
    "logging.live": False,
    "evaluation.gold": "m:f",
}
REFUSED = {
    "run.seed": 7,
    "model.policy": "another",
    "model.reference": "another",
    "model.dtype": "bfloat16",
    "reward.model": "another",
    "reward.dtype": "bfloat16",
    "reward.max_tokens": 64,
    "reward.functions": ("m:f",),
    "reward.clip": 1.0,
    "reward.length_penalty": 0.1,
    "reward.missing_eos_penalty": 0.1,
    "head.variant": "r2m_noise",
    "head.width": 8,
    "head.omega_floor": 0.1,
    "head.omega_horizon": 50,
    "head.alpha": 0.1,
    "head.pair_source": "frozen",
    "feedback.source": "learner",
    "feedback.dtype": "bfloat16",
    "rollouts.engine": "vllm",
    "rollouts.prompts_per_step": 3,
    "rollouts.group_size": 4,
    "rollouts.temperature": 0.5,
    "rollouts.max_prompt_tokens": 32,
    "rollouts.max_new_tokens": 5,
    "scheduling.max_policy_age": 1,
    "scheduling.max_head_age": 1,
    "scheduling.lag": "exact",
    "scheduling.overage": "drop",
    "advantage.name": "grpo",
    "advantage.options": {"eps": 0.1},
    "objective.clip_low": 0.1,
    "objective.kl_coef": 0.5,
    "objective.epochs": 3,
    "objective.num_minibatches": 2,
    "critic.clip": 0.5,
    "critic.model": "another",
    "data.prompts": "another.jsonl",
    "data.prompt_field": "text",
    "data.on_bad_record": "skip",
}


def changed(config: R2MConfig, key: str, value: object) -> R2MConfig:
    section, _, field = key.partition(".")
    return getattr(config, section)(**{field: value})


@pytest.mark.parametrize("key", CHANGED)
def test_a_resumed_run_may_change_where_how_fast_and_how_long_it_trains(tiny_config, key):
    before = tiny_config.head(omega_horizon=100)
    check_resumable(Path("x"), before, changed(before, key, CHANGED[key]))


@pytest.mark.parametrize("key", REFUSED)
def test_what_decides_a_prompts_responses_and_rewards_is_refused_with_both_values(tiny_config, key):
    after = changed(tiny_config, key, REFUSED[key])
    section, _, field = key.partition(".")
    was, now = (one.to_dict()[section][field] for one in (tiny_config, after))
    if key == "head.omega_horizon":
        was = tiny_config.run.num_steps
    said = f"x was saved with {key} = {was}, and the config has {now}: resume with the same"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_resumable(Path("x"), tiny_config, after)


def test_keys_that_may_change_are_refused_where_they_decide_one_that_may_not(tiny_config):
    longer = tiny_config.run(num_steps=9)
    with pytest.raises(ConfigError, match=r"saved with head\.omega_horizon = 3, and the config has 9"):
        check_resumable(Path("x"), tiny_config, longer)
    check_resumable(Path("x"), tiny_config, longer.head(omega_horizon=3))
    vanilla = [config.head(variant="vanilla") for config in (tiny_config, longer)]  # which reads no omega
    check_resumable(Path("x"), *vanilla)

    evaluated = tiny_config.evaluation(every=1, num_prompts=4)  # which trains on 4 prompts fewer
    with pytest.raises(
        ConfigError, match=r"prompts held back \(evaluation.num_prompts, .*\) = 0, and the config has 4"
    ):
        check_resumable(Path("x"), tiny_config, evaluated)
    check_resumable(Path("x"), evaluated, evaluated.evaluation(every=7))
    elsewhere = tiny_config.data(eval="held_out.jsonl")
    check_resumable(Path("x"), elsewhere, elsewhere.evaluation(every=1, num_prompts=4))

    vllm = tiny_config.rollouts(engine="vllm", engine_options={"max_num_seqs": 4, "quantization": "fp8"})
    check_resumable(Path("x"), vllm, vllm.rollouts(engine_options={"quantization": "fp8"}))
    with pytest.raises(ConfigError, match=r"rollouts\.engine_options\.quantization = fp8, and the config has None"):
        check_resumable(Path("x"), vllm, vllm.rollouts(engine_options={"max_num_seqs": 4}))


def test_every_key_that_may_change_is_one_and_stands_in_the_documentation():
    keys = [f"{name}.{key}" for name, section in R2MConfig().to_dict().items() for key in section]
    table = (ROOT / "docs" / "checkpoints.md").read_text().partition("## What a resumed run may change")[2]
    told = re.findall(
        r"`([a-z_]+\.[a-z_*.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    assert sorted(told) == sorted(MAY_CHANGE)
    for key in MAY_CHANGE:
        plain = key.removesuffix(".*")
        known = any(one == plain or one.startswith(f"{plain}.") for one in keys)
        assert known or plain.startswith("rollouts.engine_options."), key


@pytest.mark.ring
def test_a_ring_says_a_text_when_another_temperature_is_asked_for(run, exact_config):
    with pytest.raises(ConfigError, match=r"saved with rollouts\.temperature = 1\.0, and the config has 0\.5"):
        Ring.of(exact_config.rollouts(temperature=0.5), in_process=True, resume=checkpoint_path(run, 2))


@pytest.mark.ring
def test_a_ring_resumed_from_any_of_its_checkpoints_ends_with_the_same_bits(run, exact_config):
    ends = []
    for step in (1, 3):
        with Ring.of(exact_config, in_process=True, resume=checkpoint_path(run, step)) as ring:
            while not ring.finished:
                ring.step()
            ring.drain()
            ends.append(ring.policy_weights().tensors)
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_a_manifest_of_nothing_but_brackets_is_a_damaged_one(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="manifest.json: is damaged"):
        verified(tmp_path)


@pytest.mark.ring
def test_a_checkpoint_is_written_by_the_queue_and_not_through_the_driver(exact_config, tmp_path, monkeypatch):
    async def never(payload):
        raise AssertionError("the bytes came to the driver")

    with Ring.of(exact_config, in_process=True) as ring:
        ring.step()
        with monkeypatch.context() as elsewhere:  # a queue whose machine does not have the directory
            elsewhere.setattr(ReplayQueue, "write", lambda self, path, payload: (None,))
            ring.save(tmp_path / "through")
        object.__setattr__(ring.controller.stages, "to_bytes", never)
        ring.save(tmp_path / "beside")
    for name in names(tmp_path / "through"):
        if name not in ("progress.msgpack", "manifest.json"):  # it has the seconds
            assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def test_a_file_that_another_machine_has_written_to_a_disk_of_its_own_is_missed(tmp_path):
    with pytest.raises(DiskError, match=r"head_learner\.msgpack: a stage has written it on another machine"):
        write_parts(tmp_path, {}, R2MConfig(), {"head_learner.msgpack": {"bytes": 1, "xxh3_128": "0"}})

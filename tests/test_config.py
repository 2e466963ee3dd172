"""The config tree: what it refuses and how it says so, how files and overrides become one, the numbers that follow."""

import importlib.util
import inspect
import math
import re
from pathlib import Path

import pytest
import yaml

from r2m_async import config_rules
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_code, check_queue, worst_group_bytes
from r2m_async.reward_models.config import RewardModelConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("studies", "reward_model", "cluster")
)
VARIANTS = sorted((CONFIGS / "variants").glob("*.yaml"))


def refusal(**sections) -> str:
    with pytest.raises(ConfigError) as error:
        R2MConfig(**sections)
    return str(error.value)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Refusals


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {}}, "rollout: no such key; did you mean rollouts?"),
        ({"run": {"num_step": 3}}, "run.num_step: no such key; did you mean run.num_steps?"),
        ({"run": {"max_bytes": 3}}, "run.max_bytes: no such key; did you mean queue.max_bytes?"),
        (
            {"rollouts": {"max_policy_age": 3}},
            "rollouts.max_policy_age: no such key; did you mean scheduling.max_policy_age?",
        ),
        ({"weights": {"zzz": 1}}, "weights.zzz: no such key; valid are transport, probe, timeout"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one_in_its_section_or_another(sections, message):
    assert refusal(**sections) == message


def test_keys_that_stand_together_under_the_wrong_section_share_a_line():
    """A whole section under another's name is one mistake. Its keys were a line each."""
    lines = refusal(
        feedback={"num_actors": 2, "max_bytes": 3, "engine": "vllm", "zzz": 1}, run={"seeds": 1}
    ).splitlines()
    assert sorted(lines) == [
        "feedback.max_bytes: no such key; did you mean queue.max_bytes?",
        "feedback.zzz: no such key; valid are source, dtype",
        "feedback: no such keys: num_actors, engine; did you mean those of rollouts?",
        "run.seeds: no such key; did you mean run.seed?",
    ]


def test_an_unknown_section_like_nothing_known_is_refused_with_all_sections():
    message = refusal(zzz={})
    assert message.startswith("zzz: no such key; valid are run, model, reward, head, ")
    assert all(name in message for name in R2MConfig.model_fields)


@pytest.mark.parametrize(
    ("sections", "key", "value"),
    [
        ({"run": {"num_steps": 0}}, "run.num_steps", "0"),
        ({"run": {"num_steps": "many"}}, "run.num_steps", "'many'"),
        ({"run": {"num_steps": 2.5}}, "run.num_steps", "2.5"),
        ({"run": {"seed": -1}}, "run.seed", "-1"),
        ({"run": 3}, "run", "3"),
        ({"run": {"device": "tpu"}}, "run.device", "'tpu'"),
        ({"model": {"dtype": "float16"}}, "model.dtype", "'float16'"),
        ({"reward": {"functions": "module:attr"}}, "reward.functions", "'module:attr'"),
        ({"reward": {"clip": 0}}, "reward.clip", "0"),
        ({"reward": {"max_tokens": 1}}, "reward.max_tokens", "1"),
        ({"head": {"omega_floor": 1.5}}, "head.omega_floor", "1.5"),
        ({"head": {"alpha": -0.1}}, "head.alpha", "-0.1"),
        ({"head": {"variant": "r2m_no_gre"}}, "head.variant", "'r2m_no_gre'"),
        ({"rollouts": {"temperature": 0}}, "rollouts.temperature", "0"),
        ({"scheduling": {"max_policy_age": -1}}, "scheduling.max_policy_age", "-1"),
        ({"advantage": {"options": 3}}, "advantage.options", "3"),
        ({"objective": {"off_policy_cap": 1.0}}, "objective.off_policy_cap", "1.0"),
        ({"objective": {"clip_low": 1.0}}, "objective.clip_low", "1.0"),
        ({"learner": {"lr": math.nan}}, "learner.lr", "nan"),
        ({"evaluation": {"every": 0}}, "evaluation.every", "0"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_key_and_value(sections, key, value):
    message = refusal(**sections)
    assert message.startswith(f"{key}: input should be ")
    assert message.endswith(f"; got {value}")


@pytest.mark.parametrize(
    "override",
    [
        "run.num_steps=true",
        "run.seed=no",
        "learner.lr=on",
        "objective.kl_coef=yes",
        "reward.clip=on",
        "evaluation.every=yes",
        "model.lora={rank: on}",
        "reward.overlong={start: yes}",
        "objective.off_policy_mask={low: off}",
        "data.filters={max_prompt_tokens: yes}",
        "reward.functions={f: {function: 'm:f', weight: on}}",
    ],
)
def test_a_truth_value_is_no_number(tmp_path, override):
    """For YAML `on` is true, and for pydantic true is 1."""
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"a truth value, as YAML reads yes.*; write a number; got (True|False)"):
        R2MConfig.from_yaml(tmp_path / "empty.yaml", [override])


@pytest.mark.parametrize("key", ["model.reference", "logging.wandb", "data.eval", "rollouts.function"])
def test_none_is_a_text_for_yaml_and_no_name(tmp_path, key):
    (tmp_path / "empty.yaml").write_text("")
    for text in ("None", "none"):
        with pytest.raises(ConfigError, match=rf"^{key}: .*write null for nothing; got '{text}'"):
            R2MConfig.from_yaml(tmp_path / "empty.yaml", [f"{key}={text}"])
    R2MConfig.from_yaml(tmp_path / "empty.yaml", [f"{key}=null"])


def test_a_number_too_large_for_float32_is_refused_in_options_too():
    with pytest.raises(ConfigError, match=r"^objective.loss_options: beyond the 1e\+37"):
        R2MConfig().objective(loss="dual_clip", loss_options={"c": 1e300})


def test_every_mistake_of_a_config_is_named_at_once():
    lines = refusal(run={"num_steps": 0, "nmae": "x"}, head={"alpha": 2}).splitlines()
    assert {line.partition(":")[0] for line in lines} == {"run.num_steps", "run.nmae", "head.alpha"}


@pytest.mark.parametrize(
    ("sections", "numbers"),
    [
        (
            {"scheduling": {"lag": "exact", "overage": "mask"}},
            ["scheduling.overage is 'mask'", "scheduling.lag is 'exact'"],
        ),
        (
            {"objective": {"num_minibatches": 9}, "rollouts": {"prompts_per_step": 8}},
            ["objective.num_minibatches is 9", "rollouts.prompts_per_step is 8"],
        ),
        ({"rollouts": {"group_size": 1}}, ["rollouts.group_size is 1", "head.variant is 'r2m'"]),
        ({"head": {"pessimism": 0.5}}, ["head.pessimism is 0.5", "head.ensemble is 1"]),
        ({"head": {"steering": 0.5, "variant": "vanilla"}}, ["head.steering is 0.5", "head.variant is 'vanilla'"]),
        ({"head": {"variant": "vanilla", "ensemble": 3}}, ["head.ensemble is 3", "head.variant is 'vanilla'"]),
        ({"learner": {"warmup": 5}, "run": {"num_steps": 5}}, ["learner.warmup is 5", "run.num_steps is 5"]),
        ({"learner": {"num_ranks": 2}}, ["learner.num_ranks is 2", "learner.backend is 'torch'"]),
        ({"learner": {"zero_stage": 1}}, ["learner.zero_stage is 1", "learner.backend is 'torch'"]),
        ({"learner": {"zero_options": {"a": 1}}}, ["learner.zero_options is {'a': 1}", "learner.backend is 'torch'"]),
        (
            {"learner": {"backend": "deepspeed"}, "scheduling": {"lag": "exact"}},
            ["learner.backend is 'deepspeed'", "scheduling.lag is 'exact'"],
        ),
        (
            {"learner": {"backend": "deepspeed"}, "model": {"dtype": "bfloat16"}},
            ["learner.zero_stage is 0", "model.dtype is 'bfloat16'"],
        ),
        (
            {"learner": {"backend": "deepspeed", "zero_stage": 2, "offload": "params"}},
            ["learner.offload is 'params'", "learner.zero_stage is 2", "zero_stage 3"],
        ),
        (
            {"learner": {"backend": "deepspeed", "zero_stage": 1, "offload": "optimizer"}, "run": {"device": "cpu"}},
            ["learner.offload is 'optimizer'", "run.device is 'cpu'"],
        ),
        ({"reward": {"model": "from_scratch"}}, ["reward.model is 'from_scratch'", "data.preferences is not set"]),
        ({"model": {"policy": "from_scratch"}}, ["model.policy is 'from_scratch'", "data.prompts is 'embedded'"]),
    ],
)
def test_what_two_keys_contradict_is_refused_with_both_and_a_remedy(sections, numbers):
    message = refusal(**sections)
    assert all(number in message for number in numbers)
    assert any(remedy in message for remedy in ("use ", "name ", "at most"))


@pytest.mark.parametrize(
    ("sections", "numbers"),
    [
        ({"labels": {"source": "m:f"}, "head": {"variant": "vanilla"}}, ["labels.source is 'm:f'", "is 'vanilla'"]),
        ({"labels": {"budget": 2}}, ["labels.budget is 2", "labels.source is None"]),
        (
            {"labels": {"source": "m:f", "replay_from": 9}},
            ["labels.replay_from is 9", "labels.replay is 0"],
        ),
        (
            {"labels": {"source": "m:f"}, "scheduling": {"lag": "exact"}},
            ["labels.wait is False", "scheduling.lag is 'exact'"],
        ),
        ({"labels": {"source": "m:f", "max_age": 0}}, ["labels.max_age is 0", "labels.wait is False"]),
        (
            {"labels": {"source": "m:f", "wait": True, "timeout": 99}, "scheduling": {"stall_after": 99}},
            ["labels.timeout is 99", "scheduling.stall_after is 99"],
        ),
        (
            {"labels": {"source": "m:f", "budget": 9}, "rollouts": {"prompts_per_step": 8, "group_size": 3}},
            ["labels.budget is 9", "at most 8 pairs"],
        ),
    ],
)
def test_labels_that_nobody_gives_learns_or_could_repeat_are_refused_with_a_remedy(sections, numbers):
    message = refusal(**sections)
    assert all(number in message for number in numbers)
    assert any(remedy in message for remedy in ("use ", "name ", "set "))


def test_what_the_cross_checks_just_allow_is_allowed():
    R2MConfig(objective={"num_minibatches": 8}, rollouts={"prompts_per_step": 8})
    R2MConfig(rollouts={"group_size": 1}, head={"variant": "vanilla"})
    R2MConfig(learner={"warmup": 4}, run={"num_steps": 5})
    R2MConfig(scheduling={"overage": "drop", "lag": "bounded"})
    deepspeed = R2MConfig(
        learner={"backend": "deepspeed", "num_ranks": 2, "zero_stage": 1}, model={"dtype": "bfloat16"}
    )
    deepspeed.learner(offload="optimizer").learner(zero_stage=3, offload="params")


# Fluent methods


def test_a_fluent_method_returns_a_new_config_and_leaves_the_old_one():
    old = R2MConfig()
    new = old.rollouts(num_actors=8).scheduling(max_policy_age=2)
    assert (new.rollouts.num_actors, new.scheduling.max_policy_age) == (8, 2)
    assert old == R2MConfig()
    assert new != old
    assert new.rollouts(num_actors=1).scheduling(max_policy_age=0) == old


def test_a_fluent_method_keeps_what_earlier_ones_set_and_checks_what_it_sets():
    config = R2MConfig().rollouts(num_actors=8).rollouts(group_size=2)
    assert (config.rollouts.num_actors, config.rollouts.group_size) == (8, 2)
    with pytest.raises(ConfigError, match=r"rollouts\.num_actor: no such key; did you mean rollouts\.num_actors\?"):
        config.rollouts(num_actor=3)
    with pytest.raises(ConfigError, match=r"learner\.warmup is 100 and run\.num_steps is 100"):
        config.learner(warmup=100)


def test_a_section_cannot_be_written_to():
    config = R2MConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.run.num_steps = 3
    assert config == R2MConfig()


# Files


def test_a_base_file_is_merged_key_by_key_and_the_nearer_file_wins(tmp_path):
    written(tmp_path / "root.yaml", "run: {name: root, seed: 1, num_steps: 7}\nhead: {alpha: 0.5}")
    written(tmp_path / "middle.yaml", "base: root.yaml\nrun: {name: middle, seed: 2}")
    (tmp_path / "sub").mkdir()
    leaf = written(tmp_path / "sub" / "leaf.yaml", "base: ../middle.yaml\nrun: {name: leaf}\nlearner: {lr: 0.5}")
    config = R2MConfig.from_yaml(leaf)
    assert (config.run.name, config.run.seed, config.run.num_steps) == ("leaf", 2, 7)
    assert (config.head.alpha, config.learner.lr) == (0.5, 0.5)
    assert config == R2MConfig(
        run={"name": "leaf", "seed": 2, "num_steps": 7}, head={"alpha": 0.5}, learner={"lr": 0.5}
    )


def test_overrides_win_over_every_file_and_are_read_as_yaml(tmp_path):
    written(tmp_path / "root.yaml", "run: {name: root, seed: 1}")
    leaf = written(tmp_path / "leaf.yaml", "base: root.yaml")
    overrides = ["run.seed=5", "run.name=a=b", "reward.functions=[m:f, m:g]", "reward.clip=null", "logging.live=false"]
    config = R2MConfig.from_yaml(leaf, overrides)
    assert (config.run.seed, config.run.name, config.logging.live) == (5, "a=b", False)
    assert (config.reward.functions, config.reward.clip) == (("m:f", "m:g"), None)


def test_base_files_in_a_circle_are_refused(tmp_path):
    written(tmp_path / "b.yaml", "base: a.yaml")
    path = written(tmp_path / "a.yaml", "base: b.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: its base files name each other in a circle"):
        R2MConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="circle"):
        R2MConfig.from_yaml(written(tmp_path / "own.yaml", "base: own.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1", r"config\.yaml: is not YAML"),
        ("- run", r"config\.yaml: holds a list; expected sections like `run:`"),
        ("just a word", r"config\.yaml: holds a str; expected sections"),
        ("base: absent.yaml", r"absent\.yaml: cannot be read: No such file"),
        ("base: 3", r"config\.yaml: base"),
        ("run:", r"run: input should be"),
        ("1: {name: x}", "1: no such key"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name_with_the_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        R2MConfig.from_yaml(written(tmp_path / "config.yaml", text))


def test_a_file_that_is_not_there_or_not_text_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        R2MConfig.from_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.yaml: is not YAML"):
        R2MConfig.from_yaml(tmp_path / "binary.yaml")


def test_an_empty_file_is_the_default_config(tmp_path):
    assert R2MConfig.from_yaml(written(tmp_path / "empty.yaml", "# nothing yet\n")) == R2MConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.num_steps", r"'run\.num_steps' is not of the form section\.key=value"),
        ("num_steps=3", r"'num_steps=3' is not of the form section\.key=value"),
        ("run.num_steps=few", r"run\.num_steps: input should be a valid integer.*got 'few'"),
        ("run.num_step=3", r"run\.num_step: no such key; did you mean run\.num_steps\?"),
        ("rnu.num_steps=3", r"rnu: no such key; did you mean run\?"),
        ("head.alpha=3", r"head is 7, not a section of keys"),
        ("run.num_steps=[3", r"run\.num_steps=\[3.*is not YAML"),
    ],
)
def test_an_override_that_cannot_be_is_refused_with_the_reason(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        R2MConfig.from_yaml(written(tmp_path / "config.yaml", "head: 7" if "head" in override else ""), [override])


def test_a_config_written_out_and_read_back_is_the_same(tmp_path):
    config = R2MConfig(
        run={"name": "x: y", "num_steps": 7},
        reward={"functions": ["m:f"], "clip": 1.5},
        advantage={"name": "grpo", "options": {"eps": 1e-9, "unbiased": False}},
        learner={"lr": 3e-7},
    )
    path = written(tmp_path / "resolved.yaml", config.to_yaml())
    assert R2MConfig.from_yaml(path) == config
    assert R2MConfig.from_yaml(path).to_yaml() == config.to_yaml()
    assert yaml.safe_load(config.to_yaml()).keys() == R2MConfig.model_fields.keys()


# Numbers that follow


def test_a_queue_below_one_step_is_refused_with_both_numbers_and_one_step_is_enough():
    config = R2MConfig().rollouts(prompts_per_step=4).queue(max_bytes=3999)
    with pytest.raises(
        ConfigError, match=r"queue\.max_bytes is 3999, one step of rollouts\.prompts_per_step 4 .* 4000"
    ):
        check_queue(config, 1000)
    check_queue(config.queue(max_bytes=4000), 1000)


def test_the_bytes_of_a_group_are_what_the_hand_computes():
    config = R2MConfig(
        rollouts={"group_size": 2, "max_prompt_tokens": 10, "max_new_tokens": 5}, model={"dtype": "bfloat16"}
    )
    per_response = 16 * 15 + 256 * 5 + 2 * 2 * 14 * 8 + 4 * 6 + 1024
    assert worst_group_bytes(config, 8, 6, greedy_twin=False) == 2 * per_response + 512 * 10 + 4096
    assert worst_group_bytes(config, 8, 6, greedy_twin=True) == 3 * per_response + 512 * 10 + 4096
    in_float32 = worst_group_bytes(config.feedback(dtype="float32"), 8, 6, greedy_twin=False)
    assert in_float32 == 2 * (per_response + 2 * 2 * 14 * 8) + 512 * 10 + 4096
    without_feedback = worst_group_bytes(config.head(variant="vanilla"), 8, 6, greedy_twin=False)
    assert without_feedback == 2 * (per_response - 2 * 2 * 14 * 8) + 512 * 10 + 4096


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.4, 0.8, 1.2, 1.2, 1.2, 1.2]),
        ("linear", [0.4, 0.8, 1.2, 0.9, 0.6, 0.3]),
        ("cosine", [0.4, 0.8, 1.2, 1.0242641, 0.6, 0.1757359]),
    ],
)
def test_the_learning_rate_is_what_the_hand_computes(schedule, rates):
    config = R2MConfig(run={"num_steps": 6}, learner={"lr": 1.2, "warmup": 2, "schedule": schedule})
    assert [config.learning_rate(step) for step in range(6)] == pytest.approx(rates, abs=1e-6)


def test_the_learning_rate_without_warmup_begins_at_its_height():
    assert R2MConfig(run={"num_steps": 4}, learner={"lr": 1.0, "schedule": "linear"}).learning_rate(0) == 1.0


def test_what_is_left_open_follows_from_other_keys():
    config = R2MConfig(run={"num_steps": 7})
    assert (config.omega_horizon, config.head(omega_horizon=3).omega_horizon) == (7, 3)
    assert (config.aggregation, config.objective(ratio="token").aggregation) == ("sequence", "token")
    assert config.objective(aggregation="token").aggregation == "token"
    assert (config.model(dtype="bfloat16").feedback_dtype, config.feedback(dtype="bfloat16").feedback_dtype) == (
        "bfloat16",
        "bfloat16",
    )
    variants = ("r2m", "vanilla", "iterative_head", "iterative_model")
    reads = {variant: config.head(variant=variant).reads_feedback for variant in variants}
    assert reads == {"r2m": True, "vanilla": False, "iterative_head": False, "iterative_model": False}
    trains = {
        variant: config.head(variant=variant).trains_head for variant in ("r2m", "r2m_no_train", "iterative_head")
    }
    assert trains == {"r2m": True, "r2m_no_train": False, "iterative_head": True}


def test_a_run_directory_at_a_url_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"^run\.output_dir is 's3://bucket/runs', a URL: .*docs/cluster\.md"):
        R2MConfig().run(output_dir="s3://bucket/runs")


# The files of this repository


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_under_configs_loads_and_is_named_after_itself(path):
    assert R2MConfig.from_yaml(path).run.name == path.stem


def test_every_variant_has_a_file():
    found = {path.stem: R2MConfig.from_yaml(path).head for path in VARIANTS}
    assert {name: (head.variant, head.alpha) for name, head in found.items()} == {
        "r2m": ("r2m", 0.3),
        "vanilla": ("vanilla", 0.3),
        "r2m_no_train": ("r2m_no_train", 0.3),
        "r2m_noise": ("r2m_noise", 0.3),
        "iterative_head": ("iterative_head", 0.3),
        "iterative_model": ("iterative_model", 0.3),
        "r2m_no_bt": ("r2m", 1.0),
        "r2m_no_gre": ("r2m", 0.0),
        "pretrained_rm": ("vanilla", 0.3),
    }


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_differs_from_quickstart_in_its_name_and_its_head_alone_or_its_reward_model(path):
    variant, quickstart = (R2MConfig.from_yaml(one).to_dict() for one in (path, CONFIGS / "quickstart.yaml"))
    for tree in (variant, quickstart):
        del tree["run"]["name"], tree["head"]["variant"], tree["head"]["alpha"]
        if path.stem == "pretrained_rm":
            del tree["reward"]["model"]
    assert variant == quickstart


PAPER = {
    "dialogue_qwen2.5_3b": dict(lr=6e-6, omega=0.7, head_lr=1e-6, steps=100, prompts=64, group=8, new=512),
    "dialogue_llama3_8b": dict(lr=1e-6, omega=0.6, head_lr=1e-6, steps=100, prompts=64, group=8, new=512),
    "tldr_pythia_2.8b": dict(lr=3e-6, omega=0.6, head_lr=5e-7, steps=122, prompts=2048, group=4, new=50),
}


@pytest.mark.parametrize(("name", "paper"), PAPER.items(), ids=PAPER)
def test_a_preset_has_the_numbers_of_the_paper(name, paper):
    """R2M, arXiv 2601.22664, Sec. 5 and App. G; 51.2k and 1000k trajectories."""
    config = R2MConfig.from_yaml(CONFIGS / "presets" / f"{name}.yaml")
    rollouts = config.rollouts
    assert paper == dict(
        lr=config.learner.lr,
        omega=config.head.omega_floor,
        head_lr=config.head.lr,
        steps=config.run.num_steps,
        prompts=rollouts.prompts_per_step,
        group=rollouts.group_size,
        new=rollouts.max_new_tokens,
    )
    trajectories = 51_200 if name.startswith("dialogue") else 1_000_000
    assert round(trajectories / (rollouts.prompts_per_step * rollouts.group_size)) == config.run.num_steps
    assert (config.head.variant, config.head.alpha, config.advantage.name) == ("r2m", 0.3, "rloo")
    assert config.omega_horizon == config.run.num_steps


def test_the_dialogue_presets_have_temperature_two_epochs_and_the_papers_models():
    qwen, llama = (R2MConfig.from_yaml(CONFIGS / "presets" / f"{name}.yaml") for name in list(PAPER)[:2])
    for config in (qwen, llama):
        assert (config.rollouts.temperature, config.objective.epochs) == (0.7, 2)
        assert config.reward.model == "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
    assert qwen.model.policy == "Qwen/Qwen2.5-3B-Instruct"
    assert llama.model.policy == "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize(
    ("name", "widths"),
    [("dialogue_qwen2.5_3b", (2048, 4096)), ("dialogue_llama3_8b", (4096, 4096)), ("tldr_pythia_2.8b", (2560, 2560))],
)
def test_the_queue_of_a_preset_holds_a_step_of_the_papers_models(name, widths):
    config = R2MConfig.from_yaml(CONFIGS / "presets" / f"{name}.yaml")
    check_queue(config, worst_group_bytes(config, *widths, greedy_twin=False))


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_sampling_from_a_part_of_the_distribution_is_refused_with_the_reason(key):
    assert "would bias the ratio of Eq. 2" in refusal(rollouts={key: 0.9})


def test_a_tuple_in_a_free_option_is_a_list_as_it_is_in_a_file():
    config = R2MConfig().advantage(options={"betas": (0.1, {"deep": (1, 2)})})
    assert config.advantage.options == {"betas": [0.1, {"deep": [1, 2]}]}
    assert R2MConfig.from_dict(config.to_dict()) == config


def test_a_config_of_an_earlier_version_names_the_gold_function_where_it_was():
    old = R2MConfig(evaluation={"gold": "r2m_async.language:gold_reward"})
    assert old == R2MConfig(evaluation={"gold": "r2m_async.from_scratch.language:gold_reward"})


def test_a_section_of_no_config_says_so_when_it_is_called():
    with pytest.raises(ConfigError, match="RunSection: this section belongs to no config"):
        R2MConfig.model_fields["run"].annotation()(num_steps=3)


def test_rules_are_broken_together_and_told_together(tmp_path):
    lines = refusal(
        learner={"warmup": 500, "num_ranks": 2}, rollouts={"group_size": 1, "tensor_parallel": 2}
    ).splitlines()
    assert {line.split(" is ")[0] for line in lines} == {
        "learner.warmup",
        "learner.num_ranks",
        "rollouts.group_size",
        "rollouts.tensor_parallel",
    }


def keys_of(message):
    """The key that each line of a refusal begins with."""
    return [line.split(" is ")[0].split(": ")[0] for line in message.splitlines()]


def test_a_rule_that_several_keys_break_names_each_of_them():
    told = refusal(
        rollouts={"tensor_parallel": 2, "engine_options": {"seed": 1}, "in_flight_updates": True},
        objective={"kl_cap": 1.0, "kl_target": 0.1, "kl_coef": 0.0},
        learner={"offload": "params", "zero_options": {"stage": 1}},
    )
    assert keys_of(told) == [
        "rollouts.tensor_parallel",
        "rollouts.in_flight_updates",
        "rollouts.engine_options",
        "learner.zero_options",
        "learner.offload",
        "objective.kl_cap",
        "objective.kl_target",
    ]


def test_values_that_are_not_valid_hide_no_rule_about_other_sections():
    told = refusal(run={"seed": "x"}, bogus={}, rollouts={"group_size": 1}, learner={"warmup": 500, "num_ranks": 2})
    # Whether the warmup fits depends on the section `run`, which is not valid.
    assert keys_of(told) == ["run.seed", "bogus", "learner.num_ranks", "rollouts.group_size"]
    with pytest.raises(ConfigError) as caught:
        RewardModelConfig(run={"sed": 1}, model={"frozen": True, "lora": {}}, loss={"regularizer": "sft"})
    assert keys_of(str(caught.value)) == ["run.sed", "model.frozen", "model.frozen"]


def test_all_overrides_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        R2MConfig.from_yaml(tmp_path / "config.yaml", ["seed=1", "run.seed=[", "run.num_steps=3", "run.seed"])
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("'seed=1' is not of the form") and third.startswith("'run.seed' is not of the form")
    assert second.startswith("'run.seed=[': is not YAML")


def per_token_and_whole_batch(inputs):
    return inputs.rewards


per_token_and_whole_batch.per_token = per_token_and_whole_batch.whole_batch = True


def test_all_code_that_does_not_fit_the_config_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = R2MConfig(
        advantage={
            "name": f"{__name__}:per_token_and_whole_batch",
            "options": {"eps": 1, "q": 2},
            "whiten": "responses",
        },
        objective={"loss": "none_such"},
        scheduling={"overage": "mask"},
        reward={"functions": ["none_such:a", "none_such:b"]},
        evaluation={"gold": "none_such:c"},
        rollouts={"engine": "vllm"},
        learner={"backend": "deepspeed"},
    )
    with pytest.raises(ConfigError) as caught:
        check_code(config)
    assert [re.split(" is | = ", line)[0] for line in str(caught.value).splitlines()] == [
        "advantage.options.eps",
        "advantage.options.q",
        "advantage.name",
        "advantage.whiten",
        "scheduling.overage",
        "objective.loss",
        "reward.functions",
        "reward.functions",
        "evaluation.gold",
        "learner.backend",
        "rollouts.engine",
    ]


def test_every_rule_of_the_module_is_asked():
    rules = {
        function
        for name, function in vars(config_rules).items()
        if inspect.isfunction(function) and function.__module__ == config_rules.__name__
    }
    assert set(config_rules.RULES) == rules - {config_rules.changed, config_rules.held_out}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.lora.rank=8", ("model", "lora", "rank", 8)),
        ("advantage.options.eps=1e-6", ("advantage", "options", "eps", 1e-6)),
        ("rollouts.engine_options.a.b=[1]", ("rollouts", "engine_options", "a", {"b": [1]})),
    ],
)
def test_an_override_reaches_keys_within_keys(tmp_path, override, value):
    (tmp_path / "config.yaml").write_text("run: {num_steps: 3}\nmodel: {lora: }\nrollouts: {engine: vllm}\n")
    config = R2MConfig.from_yaml(tmp_path / "config.yaml", [override]).to_dict()
    section, key, inner, expected = value
    assert config[section][key][inner] == expected


# Secrets


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        (
            {"rollouts": {"engine": "vllm", "engine_options": {"hf": {"auth_token": "sk-123"}}}},
            "rollouts.engine_options",
        ),
        ({"reward": {"functions": {"a": {"function": "m:f", "options": {"API_KEY": "sk-123"}}}}}, "reward.functions"),
        (
            {"reward": {"functions": {"a": {"function": "m:f", "options": {"x": [{"password": "sk-123"}]}}}}},
            "reward.fun",
        ),
        ({"data": {"prompts": "s3://user:sk-123@bucket/prompts.jsonl"}}, "data.prompts"),
        (
            {"reward": {"functions": [{"function": "m:f", "options": {"api_key": "sk-123"}}]}},
            "reward.functions.0: input",
        ),
        (
            {"rollouts": {"engine_options": {"client_secret": "sk-123"}, "temperature": "http://u:sk-123@h"}},
            "temperature",
        ),
    ],
)
def test_a_secret_is_refused_and_appears_in_no_message(tree, where):
    with pytest.raises(ConfigError) as raised:
        R2MConfig.from_dict(tree)
    assert where in str(raised.value) and "sk-123" not in str(raised.value)


def test_the_name_of_an_environment_variable_and_tokens_of_a_tokenizer_are_no_secrets():
    options = {"api_key_env": "JUDGE_KEY", "pad_token": "<pad>", "url": "http://host:8000/v1", "max_tokens": 3}
    config = R2MConfig.from_dict({"reward": {"functions": {"judge": {"function": "m:f", "options": options}}}})
    assert config.to_dict()["reward"]["functions"]["judge"]["options"] == options


def test_a_transformers_actor_takes_a_steps_groups_at_once_where_rounding_may_depend_on_them():
    asynchronous = R2MConfig().scheduling(max_policy_age=1)
    assert (R2MConfig().concurrent_groups, asynchronous.concurrent_groups) == (1, 8)
    for alone in (
        asynchronous.scheduling(lag="exact"),
        asynchronous.rollouts(engine="vllm"),
        asynchronous.rollouts(function="mine:play"),
        asynchronous.rollouts(group_size=65),
        asynchronous.rollouts(concurrent_groups=1),
    ):
        assert alone.concurrent_groups == 1
    assert asynchronous.rollouts(num_actors=3).concurrent_groups == 3
    assert asynchronous.rollouts(group_size=20).concurrent_groups == 3
    assert R2MConfig().rollouts(concurrent_groups=2).concurrent_groups == 2
    assert R2MConfig().rollouts(concurrent_groups=1).scheduling(lag="exact").concurrent_groups == 1

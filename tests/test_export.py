"""`r2m export`: what it writes is what the run had, transformers loads it, and `RewardScorer` scores as the ring does."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from actors.reward_annotator import RewardAnnotator
from r2m_async.cli import main
from r2m_async.codec import decode
from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.errors import ConfigError, DataError
from r2m_async.export import RewardScorer, _portable, export
from r2m_async.launch import ring as launch
from r2m_async.launch import training
from r2m_async.launch.ring import Ring
from r2m_async.models.heads import build_head
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback
from r2m_async.models.reward import load_reward_model, scoring_head
from r2m_async.models.weights import load_weights
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints, seal
from r2m_async.trajectories import GroupRewards, Prompt, Ticket, Trajectory, TrajectoryGroup

pytestmark = pytest.mark.models

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
TEXT = "the old river :"
TURNS = [
    {"role": "user", "content": "the wind"},
    {"role": "assistant", "content": "sings"},
    {"role": "user", "content": "not"},
]
RESPONSES = [" the river sings softly .", " one stone or two", ""]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """`saved_run(config)`: a run directory with the checkpoint of the run's last step."""

    def run(config: R2MConfig) -> Path:
        directory = tmp_path_factory.mktemp("run")
        with Ring.of(config, in_process=True) as ring:
            while not ring.finished:
                ring.step()
            ring.save(checkpoint_path(directory, config.run.num_steps))
        return directory

    return run


@pytest.fixture(scope="module")
def plain_run(saved_run, tiny_config) -> Path:
    return saved_run(tiny_config)


def saved_weights(run: Path, what: str):
    (checkpoint,) = checkpoints(run)
    return decode((checkpoint / f"{what}_weights_{int(checkpoint.name[5:])}.msgpack").read_bytes())


def copied_model(source: str, directory: Path, chat_template: str | None = None, **files) -> str:
    shutil.copytree(source, directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    if chat_template:
        (directory / "chat_template.jinja").write_text(chat_template)
    return str(directory)


def assert_nothing_written(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


# The policy


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_transformers_loads_exactly_the_checkpoints_policy_and_generates(
    saved_run, tiny, tiny_config, tmp_path, family
):
    run = saved_run(tiny_config.model(policy=tiny(family, False)))
    assert export(run, tmp_path / "out") == checkpoint_path(run, 3)
    policy, base = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out/policy", tiny(family, False))
    )
    expected = saved_weights(run, "policy").tensors
    loaded, before = dict(policy.named_parameters()), dict(base.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in expected.items()), "training moved nothing"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/policy")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert policy.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    assert (tmp_path / "out/policy/model.safetensors").is_file()


def test_tied_weights_stay_tied_and_a_short_dtype_stays_short(saved_run, tiny, tiny_config, tmp_path):
    config = AutoConfig.from_pretrained(tiny("qwen2", False), tie_word_embeddings=True)
    shutil.copytree(tiny("qwen2", False), tmp_path / "base")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    run = saved_run(tiny_config.model(policy=str(tmp_path / "base"), dtype="bfloat16"))
    export(run, tmp_path / "out")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out/policy")
    expected = saved_weights(run, "policy").tensors
    assert "lm_head.weight" not in expected
    assert policy.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(policy.lm_head.weight, expected["model.embed_tokens.weight"])


def test_tokenizer_chat_template_and_generation_config_are_the_base_models(tiny_config, saved_run, tmp_path):
    """Training samples without the model's own settings, whoever loads the result wants them back: contradictions too."""
    own = {"repetition_penalty": 1.5, "temperature": 0.3, "do_sample": False, "eos_token_id": [1, 0], "pad_token_id": 0}
    base = copied_model(tiny_config.model.policy, tmp_path / "base", TEMPLATE, generation_config=own)
    export(saved_run(tiny_config.model(policy=base)), tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out/policy")
    assert written.to_dict() == GenerationConfig.from_pretrained(base).to_dict()
    assert {key: getattr(written, key) for key in own} == own
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path / "out/policy")
    assert after.get_vocab() == before.get_vocab()
    assert (after.chat_template, after.eos_token_id, after.pad_token_id) == (TEMPLATE, 1, 0)
    ids = after(TEXT + RESPONSES[0])["input_ids"]
    assert ids == before(TEXT + RESPONSES[0])["input_ids"]
    assert after.decode(ids) == TEXT + RESPONSES[0]


# The reward model


def annotated(run: Path, config: R2MConfig, prompt: Prompt, finished: bool) -> GroupRewards:
    """What the ring's annotator binds, with the policy and head of the run's checkpoint, to the texts in `RESPONSES`."""
    policy_weights, head_weights = saved_weights(run, "policy"), saved_weights(run, "head")
    version, tokenizer = policy_weights.version, AutoTokenizer.from_pretrained(config.model.policy)

    def trajectory(text: str) -> Trajectory:
        ids = [*prompt.token_ids, *tokenizer.encode(text), *[1] * finished]  # 1 ends the text of every tiny model
        return Trajectory(
            token_ids=torch.tensor(ids),
            prompt_len=len(prompt.token_ids),
            behaviour_logprobs=torch.zeros(len(ids)),
            policy_versions=torch.zeros(len(ids), dtype=torch.int32),
            finish_reason="stop" if finished else "length",
            text=text,
        )

    ticket = Ticket(group_id=0, due_step=version - 1, seed=3, attempt=0, prompt=prompt)
    group = TrajectoryGroup(ticket=ticket, trajectories=tuple(map(trajectory, RESPONSES)), greedy=None)
    policy, model = load_policy(config.model.policy, config), load_reward_model(config.reward.model, config)
    load_weights(policy, policy_weights)
    head = build_head(scoring_head(model), 48, 32, config, model)
    annotator = RewardAnnotator(model, AutoTokenizer.from_pretrained(config.reward.model), head, config)
    feedback = group_feedback(policy, group, config, version) if config.reads_feedback else None
    _, embeddings = annotator.embed(group)
    _, (rewards,) = annotator.score(version - 1, head_weights, [embeddings], [feedback])
    return rewards


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("variant", ["r2m", "r2m_noise", "vanilla", "iterative_head", "iterative_model"])
def test_the_scorer_gives_the_annotators_rewards_bit_for_bit(saved_run, tiny_config, tmp_path, variant, finished):
    config = tiny_config.head(variant=variant, lr=0.05, omega_floor=0.2)
    run = saved_run(config)
    export(run, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(config.model.policy).encode(TEXT)
    with one_thread():
        prompt = Prompt(prompt_id="", content=TEXT, text=TEXT, token_ids=tuple(ids))
        expected = annotated(run, config, prompt, finished).rewards
        rewards = RewardScorer(tmp_path / "out", device="cpu").score(TEXT, RESPONSES, finished=finished)
    assert torch.equal(rewards, expected)
    assert rewards.std() > 1e-3, "rewards too alike to tell responses apart"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_turns_and_every_key_that_a_reward_depends_on_score_as_in_the_ring(
    saved_run, tiny, tiny_config, tmp_path, monkeypatch, family
):
    (tmp_path / "own_rewards.py").write_text(
        "def stones(prompt, response):\n    return 0.25 * response.count('stone')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = copied_model(tiny(family, False), tmp_path / "base", TEMPLATE)
    config = tiny_config.model(policy=base, dtype="bfloat16", attention="eager").feedback(dtype="float32")
    config = config.head(variant="r2m_noise", lr=0.05, omega_floor=0.2, omega_horizon=6, ensemble=2, pessimism=2.0)
    config = config.reward(dtype="bfloat16", max_tokens=8, clip=1e3, length_penalty=0.125, missing_eos_penalty=0.5)
    config = config.reward(overlong={"start": 1})
    config = config.reward(functions=["own_rewards:stones"])
    run = saved_run(config)
    text = "<user> the wind <assistant> sings <user> not :"
    content = tuple((turn["role"], turn["content"]) for turn in TURNS)
    ids = AutoTokenizer.from_pretrained(base).encode(text)
    prompt = Prompt(prompt_id="", content=content, text=text, token_ids=tuple(ids))
    with one_thread():
        # Between the largest two of three rewards: where training has brought them depends on the processor.
        magnitudes = annotated(run, config, prompt, False).model_rewards.abs().sort().values
        config = config.reward(clip=magnitudes[1:].mean().item())
        saved = checkpoint_path(run, config.run.num_steps)
        (saved / "config.yaml").write_text(config.to_yaml())
        seal(saved)
        export(run, tmp_path / "out")
        expected = annotated(run, config, prompt, False).rewards
        assert torch.equal(RewardScorer(tmp_path / "out", "cpu").score(TURNS, RESPONSES, finished=False), expected)

        path = tmp_path / "out/reward_model/r2m_head.json"
        record = json.loads(path.read_text())
        shapes = ("width", "ensemble")  # without them the weights would not fit
        keys = [(section, key) for section, keys in record["config"].items() for key in keys if key not in shapes]
        for section, key in keys:
            others = {name: dict(values) for name, values in record["config"].items()}
            del others[section][key]
            path.write_text(json.dumps(record | {"config": others}))
            rewards = RewardScorer(tmp_path / "out", "cpu").score(TURNS, RESPONSES, finished=False)
            assert not torch.equal(rewards, expected), (
                f"{section}.{key} at its default changes nothing: the test is blind"
            )


@pytest.mark.parametrize("variant", ["vanilla", "iterative_head", "iterative_model"])
def test_a_head_that_reads_no_feedback_is_the_classifiers_own(saved_run, tiny_config, tmp_path, variant):
    config = tiny_config.head(variant=variant, lr=0.05)
    export(saved_run(config), tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/reward_model")
    base = AutoModelForSequenceClassification.from_pretrained(config.reward.model)
    assert torch.equal(loaded.score.weight, base.score.weight) == (variant == "vanilla")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/reward_model")
    rewards = RewardScorer(tmp_path / "out", device="cpu").score(TEXT, RESPONSES)
    for response, reward in zip(RESPONSES, rewards, strict=True):
        ids = torch.tensor([reward_input_ids(tokenizer, TEXT, response, finished=True)])
        with torch.no_grad():
            assert loaded(ids).logits.item() == pytest.approx(reward.item(), abs=1e-5)


@pytest.mark.parametrize(
    "head", [{}, {"variant": "iterative_head", "ensemble": 2, "lr": 0.05}], ids=["r2m", "ensemble"]
)
def test_under_a_head_that_no_classifier_can_be_the_classifier_stays_the_frozen_one(
    saved_run, tiny_config, tmp_path, head
):
    export(saved_run(tiny_config.head(**head)), tmp_path / "out")
    frozen, base = (
        AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        for path in (tmp_path / "out/reward_model", tiny_config.reward.model)
    )
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.items())


def test_the_scorer_refuses_what_is_no_export_and_a_text_in_place_of_texts(plain_run, tmp_path):
    export(plain_run, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"out/policy: is not what `r2m export` writes: .*; name a directory that it wrote"
    ):
        RewardScorer(tmp_path / "out/policy")
    scorer = RewardScorer(str(tmp_path / "out"), device="cpu")
    with pytest.raises(
        DataError, match=r"the response ' stone stone.* have 30\d tokens .* and the policy 256 positions"
    ):
        scorer.score("the river :", [" warm", " stone" * 300])
    with pytest.raises(ValueError, match="responses is one text, 'the wind': pass a list of texts"):
        scorer.score(TEXT, "the wind")
    assert scorer.score(TEXT, []).shape == (0,)


@pytest.mark.parametrize("variant", ["vanilla", "iterative_head"])
def test_a_head_without_feedback_has_no_beginning_with_a_policy(saved_run, tiny_config, tmp_path, variant):
    export(saved_run(tiny_config.head(variant=variant)), tmp_path / "out")
    assert not RewardScorer(tmp_path / "out", device="cpu").reads_feedback
    with pytest.raises(
        ConfigError, match="the exported head does not read the states of a policy; leave the initial policy out"
    ):
        RewardScorer(tmp_path / "out", device="cpu", initial_policy=tiny_config.model.policy)


def test_the_start_of_a_policy_is_named_where_the_name_means_the_same_elsewhere(tmp_path):
    assert [_portable(name) for name in ("org/model", "embedded")] == ["org/model", "embedded"]
    assert _portable(str(tmp_path)) is None and _portable("from_scratch") is None


# What is written, and what is refused


def test_an_export_names_no_path_of_the_machine_and_needs_no_prompts(saved_run, tiny_config, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(tiny_config.data.prompts, prompts)
    run = saved_run(tiny_config.data(prompts=str(prompts)))
    prompts.unlink()
    (tmp_path / "out").mkdir()  # an empty one will do
    export(run, tmp_path / "out")
    texts = [*(tmp_path / "out").rglob("*.json"), *(tmp_path / "out").rglob("*.md")]
    assert sorted(path.parent.name for path in texts if path.name == "README.md") == ["policy", "reward_model"]
    for path in texts:
        assert not re.search(r"/tmp|/home|" + re.escape(str(tmp_path)), path.read_text()), path
    assert json.loads((tmp_path / "out/reward_model/r2m_head.json").read_text())["initial_policy"] is None


def test_of_several_checkpoints_the_newest_is_taken_unless_one_is_named(plain_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    newest = shutil.copytree(checkpoint_path(run, 3), run / "checkpoints" / "step-1000000")
    shutil.copytree(newest, run / "checkpoints" / ".step-1000001.partial")
    assert export(run, tmp_path / "a") == newest
    assert export(checkpoint_path(run, 3), tmp_path / "b") == checkpoint_path(run, 3)


def test_a_run_without_checkpoint_is_refused_with_what_makes_one(tmp_path):
    for source in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="neither a checkpoint nor a run that has one; .* checkpoint.at_end"):
            export(source, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


def test_a_place_that_holds_something_is_refused_and_left_as_it_is(plain_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "full"):
        with pytest.raises(ConfigError, match=f"OUT {out}: is there already; name a new directory or an empty one"):
            export(plain_run, out)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"step-000003: cannot be exported to .*file/out: .*Not a directory"):
        export(plain_run, tmp_path / "file" / "out")


@pytest.mark.parametrize("part", ["step", "policy_weights_3", "head_weights_3", "head_learner"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), r"is damaged: it has \d+ bytes, and \d+ were written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "is damaged: its bytes are not those that"),
    ],
    ids=["gone", "cut", "changed"],
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_part(plain_run, tmp_path, part, damage, said):
    """Also by that of one which an export does not need: whoever resumes from it would."""
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    whole = shutil.copytree(checkpoint_path(run, 3), checkpoint_path(run, 2))
    path = checkpoint_path(run, 3) / f"{part}.msgpack"
    damage(path)
    with pytest.raises(ConfigError, match=f"{path}: {said}.*; use {whole}, the newest whole one"):
        export(run, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")
    export(whole, tmp_path / "out")


def test_a_checkpoint_of_an_older_version_is_refused_as_one(plain_run, tmp_path):
    shutil.copytree(plain_run, tmp_path / "run")
    (checkpoint_path(tmp_path / "run", 3) / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"step-000003: has no manifest.json: .* an older version of r2m-async wrote it"
    ):
        export(tmp_path / "run", tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


def test_the_scorer_refuses_weights_that_have_changed(plain_run, tmp_path):
    export(plain_run, tmp_path / "out")
    for name in ("reward_model/r2m_head.safetensors", "reward_model/model.safetensors", "policy/model.safetensors"):
        path = tmp_path / "out" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ConfigError, match=f"{path}: is damaged: its bytes are not those that were written"):
            RewardScorer(tmp_path / "out", "cpu")
        path.write_bytes(data)
    (tmp_path / "out" / "README.md").write_text("mine")
    RewardScorer(tmp_path / "out", "cpu")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="has no manifest.json: .* export"):
        RewardScorer(tmp_path / "out", "cpu")


@pytest.mark.parametrize(("section", "key"), [("model", "policy"), ("reward", "model")])
def test_a_base_model_that_is_gone_damaged_or_another_is_refused_by_its_key(
    saved_run, tiny, tiny_config, tmp_path, section, key
):
    base = tmp_path / "base"
    shutil.copytree(getattr(getattr(tiny_config, section), key), base)
    run = saved_run(getattr(tiny_config, section)(**{key: str(base)}))

    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            export(run, tmp_path / "out")
        assert_nothing_written(tmp_path / "out")
        return str(error.value)

    (base / "model.safetensors").rename(tmp_path / "weights")
    assert re.search(rf"{section}.{key}: .* cannot be loaded: .*model.safetensors", refusal())
    shutil.rmtree(base)
    assert f"{section}.{key}: '{base}' cannot be loaded" in refusal()
    shutil.copytree(tiny("gpt_neox" if key == "policy" else "qwen2", key == "model"), base)
    if key == "model":
        model = AutoModelForSequenceClassification.from_pretrained(base)
        wide = AutoConfig.from_pretrained(base, hidden_size=64)
        type(model)(wide).save_pretrained(base)
    assert re.search(
        f"{section}.{key} '{base}' is not the model that the run started from: .*; put that one back", refusal()
    )


# From a run to its export


@pytest.fixture
def run_config(tiny_config, tmp_path) -> R2MConfig:
    return tiny_config.run(output_dir=str(tmp_path / "runs")).logging(tensorboard=False, live=False)


@pytest.mark.parametrize(
    ("changes", "steps", "num_saves"),
    [
        ({}, [3], 1),
        ({"every": 3}, [3], 1),
        ({"every": 2}, [2, 3], 2),
        ({"every": 1}, [2, 3], 3),
        ({"every": 1, "keep": 1}, [3], 3),
        ({"every": 2, "at_end": False}, [2], 1),
        ({"at_end": False}, [], 0),
    ],
)
def test_a_run_leaves_its_last_checkpoint_once_and_the_newest_before_it(
    run_config, monkeypatch, changes, steps, num_saves
):
    saves, save = [], Ring.save
    monkeypatch.setattr(Ring, "save", lambda ring, *how: (saves.append(how), save(ring, *how)))
    run = training.train(run_config.checkpoint(**changes), in_process=True)
    assert checkpoints(run) == [checkpoint_path(run, step) for step in steps]
    assert len(saves) == num_saves


def test_a_run_that_kl_stop_ends_leaves_its_last_checkpoint(run_config):
    run = training.train(run_config.run(num_steps=9).objective(kl_stop=1e-9), in_process=True)
    (checkpoint,) = checkpoints(run)
    assert checkpoint < checkpoint_path(run, 9)


def test_a_checkpoint_that_was_being_written_when_the_run_died_is_not_taken(run_config, monkeypatch, tmp_path):
    encode, saved = launch.encode, []

    def killed(step: int) -> memoryview:
        saved.append(step)
        if step == 2:  # the number of steps, of the second checkpoint
            raise KeyboardInterrupt
        return encode(step)

    monkeypatch.setattr(launch, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train(run_config.checkpoint(every=1), in_process=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"], "the partial one is removed"
    assert export(run, tmp_path / "out") == checkpoint_path(run, 1)
    assert RewardScorer(tmp_path / "out", "cpu").score(TEXT, RESPONSES).isfinite().all()


def test_the_pages_commands_and_python_take_a_run_with_you(run_config, monkeypatch, capsys, tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^    r2m (export) \S+ (\S+)", page, re.MULTILINE)
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which `main` adds
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(run_config.to_yaml(), encoding="utf-8")
    assert main(["train", "tiny.yaml", "--in-process"]) == 0
    run = capsys.readouterr().out.splitlines()[-1].removeprefix("run directory: ")
    assert main([command[0], run, command[1]]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"checkpoint    {checkpoint_path(Path(run), 3)}",
        "policy        exported/policy",
        "reward model  exported/reward_model",
    ]
    exec(compile(python, "export.md", "exec"), {})
    assert re.search(r"tensor\(\[-?\d+\.\d+, -?\d+\.\d+\]\)", capsys.readouterr().out)
    assert main([command[0], run, command[1]]) == 2
    assert capsys.readouterr().err == "r2m: OUT exported: is there already; name a new directory or an empty one\n"

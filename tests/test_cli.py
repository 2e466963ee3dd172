"""The command line: what `plan` and `check` print, and how a user's mistake ends."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.cli import main
from r2m_async.launch.workload import worst_group_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
FILES = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("studies", "reward_model", "cluster")
)


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch, tmp_path):
    """`main` puts the working directory on it; runs go into a directory of the test's own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_file(tiny_config, tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config.to_yaml(), encoding="utf-8")
    return str(path)


def mistake(capsys, *arguments: str) -> str:
    """The one line that a mistake ends with."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("r2m: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, f"not one line: {err}"
    assert "# ok" not in out
    return err


def planned(capsys, *arguments: str) -> dict[str, list[float]]:
    """The numbers of each line that `plan` prints, by the line's name."""
    assert main(["plan", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.partition("  ") for line in out.splitlines()]
    return {name: [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", rest)] for name, _, rest in lines}


# check


@pytest.mark.models
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_check_passes_every_file_under_configs_and_names_models_that_are_not_here(capsys, path):
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("# ok")
    assert ("not checked" in out.splitlines()[-1]) == ("is not on this machine" in out)
    absent, built = (
        re.findall(r"# (\S+): \S+ " + what, out) for what in ("is not on this machine", "is built by `r2m train`")
    )
    models = ["model.policy", "reward.model"]
    first_to_train = {"pretrained_rm": models[1:], "smollm2_cpu": models}.get(path.stem, [])
    assert absent == (models if path.parent.name == "presets" else first_to_train)
    assert sorted(absent + built) == models


@pytest.mark.models
def test_check_prints_the_resolved_config_and_what_one_step_is(capsys, tmp_path):
    assert main(["check", QUICKSTART, "run.num_steps=7", "objective.num_minibatches=4"]) == 0
    out = capsys.readouterr().out
    assert "num_steps: 7\n" in out
    assert "# step: 64 responses, 8 policy updates" in out
    assert "# policy age at most 1, head age at most 1" in out
    (tmp_path / "resolved.yaml").write_text(out, encoding="utf-8")
    assert main(["check", str(tmp_path / "resolved.yaml")]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if not line.startswith("# disk: ")] == [
        line for line in out.splitlines() if not line.startswith("# disk: ")
    ]


@pytest.mark.models
def test_check_reports_the_queues_bytes_where_the_models_are_here(capsys, tiny_file, tiny_config):
    group_bytes = worst_group_bytes(tiny_config, 32, 48, greedy_twin=False)
    assert main(["check", tiny_file, f"queue.max_bytes={5 * group_bytes}"]) == 0
    out = capsys.readouterr().out
    assert f"# queue: at most {group_bytes} bytes a group; max_bytes holds 2.5 whole steps" in out
    with_twin = worst_group_bytes(tiny_config, 32, 48, greedy_twin=True)
    assert main(["check", tiny_file, "advantage.name=remax"]) == 0
    assert f"# queue: at most {with_twin} bytes a group" in capsys.readouterr().out


@pytest.mark.models
def test_check_refuses_a_queue_below_one_step_and_an_estimator_that_cannot_be(capsys, tiny_file):
    assert re.search(
        r"queue\.max_bytes is 9000, .* can take \d+:", mistake(capsys, "check", tiny_file, "queue.max_bytes=9000")
    )
    err = mistake(capsys, "check", tiny_file, "advantage.name=reinforce_pp")
    assert "'reinforce_pp'" in err
    assert "'sequence'" in err
    assert "did you mean 'rloo'?" in mistake(capsys, "check", tiny_file, "advantage.name=rlo")
    err = mistake(capsys, "check", tiny_file, "advantage.options={epsilon: 1}", "advantage.name=grpo")
    assert "advantage.options.epsilon is unknown to grpo" in err


@pytest.mark.models
def test_check_refuses_the_data_that_train_refuses(capsys, tiny_file, tmp_path):
    def written(*records):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return f"data.prompts={tmp_path / 'a.jsonl'}"

    good = {"prompt": "the river", "answer": "x" * 5000}
    assert main(["check", tiny_file, written(good, good)]) == 0
    with_columns = capsys.readouterr().out
    assert "# data.prompts: 2 prompts, 0 held out" in with_columns
    assert main(["check", tiny_file, written(*[{"prompt": "the river"}] * 2), "data.on_bad_record=skip"]) == 0
    # A group in the queue carries the columns of its prompt.
    most = [int(re.search(r"at most (\d+) bytes a group", out)[1]) for out in (with_columns, capsys.readouterr().out)]
    assert most[0] - most[1] > 5000
    assert "line 2: prompt: missing" in mistake(capsys, "check", tiny_file, written(good, {"text": "a"}))
    assert "tokens where rollouts.max_prompt_tokens" in mistake(
        capsys, "check", tiny_file, written({"prompt": "a" * 99})
    )
    assert "no such file" in mistake(capsys, "check", tiny_file, "data.prompts=none.parquet")
    evaluation = ["evaluation.every=1", "evaluation.num_prompts=2"]
    assert "nothing would be left" in mistake(capsys, "check", tiny_file, written(good, good), *evaluation)
    built = ["check", QUICKSTART, "model.policy=from_scratch", "evaluation.every=null"]
    assert "line 1: prompt = 7" in mistake(capsys, *built, written({"prompt": 7}))
    pairs = ["reward.model=from_scratch", f"data.preferences={tmp_path / 'a.jsonl'}"]
    assert "line 1: chosen: missing" in mistake(capsys, *built, written(good), *pairs)


@pytest.mark.models
def test_check_looks_at_the_critics_model_as_at_the_others(capsys, monkeypatch, tiny, tiny_file, tmp_path):
    gae = ["advantage.name=gae", "objective.ratio=token"]
    err = mistake(capsys, "check", tiny_file, *gae, f"critic.model={tiny('llama', True)}")
    assert "critic.model is" in err and "their tokenizers differ" in err
    assert main(["check", tiny_file, *gae, f"critic.model={tiny('qwen2', False)}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "# ok"
    assert main(["check", tiny_file, *gae, "critic.model=no/where"]) == 0
    out = capsys.readouterr().out
    assert "# critic.model: no/where is not on this machine: it was not checked" in out and "# queue: " in out
    assert "its memory and its part of a checkpoint are not counted below" in out
    assert out.splitlines()[-1] == "# ok, but for critic.model, not checked"
    monkeypatch.setenv("R2M_CACHE", str(tmp_path))  # where the embedded models are not yet
    assert main(["check", QUICKSTART, *gae, f"critic.model={tiny('qwen2', False)}"]) == 0
    assert "reads the tokens of model.policy was not checked" in capsys.readouterr().out


@pytest.fixture
def multimodal(tiny, tmp_path):
    """`multimodal(classifier)`: the directory of a Gemma 3 that sees (text 32 wide, vision 16), with a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Gemma3Config

    def make(classifier: bool) -> str:
        path = tmp_path / f"gemma-{classifier}"
        tokenizer = AutoTokenizer.from_pretrained(tiny("qwen2", False))
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        vision = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        marks = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
        config = Gemma3Config(
            text_config=text, vision_config=vision, **marks, **({"num_labels": 1} if classifier else {})
        )
        assert not hasattr(config, "hidden_size") and not hasattr(config, "vocab_size")
        (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(
            config
        ).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return make


@pytest.mark.models
def test_check_reads_the_sizes_of_a_multimodal_models_language_part(capsys, multimodal, tiny_file, tiny_config):
    policy, reward = multimodal(False), multimodal(True)
    seeing = ["check", tiny_file, f"model.policy={policy}", f"reward.model={reward}"]
    assert main(seeing) == 0
    out = capsys.readouterr().out
    assert f"# queue: at most {worst_group_bytes(tiny_config, 32, 32, greedy_twin=False)} bytes a group" in out
    assert out.splitlines()[-1] == "# ok"
    assert main([*seeing, "advantage.name=gae", "objective.ratio=token", f"critic.model={policy}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "# ok"


OWN_CODE = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", None],
}


@pytest.mark.models
@pytest.mark.parametrize(
    "command", ["check", "train", "reward-model train", "policy-states", "eval generate", "reward-model eval"]
)
def test_a_model_that_comes_with_code_of_its_own_is_refused_and_the_code_not_run(
    capsys, monkeypatch, tiny, tiny_file, pairs_file, tmp_path, command
):
    model = tmp_path / "with-code"
    shutil.copytree(tiny("qwen2", False), model)
    config = json.loads((model / "config.json").read_text()) | {"auto_map": OWN_CODE, "model_type": "mine"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    empty, questions = str(tmp_path / "empty.yaml"), str(tmp_path / "questions.jsonl")
    Path(empty).touch()
    Path(questions).write_text(
        json.dumps({"question_id": 1, "category": "writing", "turns": ["the old river", "and ?"]})
    )
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask, and run it
    words = {
        "check": ["check", tiny_file, f"model.policy={model}"],
        "train": ["train", tiny_file, f"reward.model={model}"],
        "reward-model train": ["reward-model", "train", empty, f"model.start={model}", f"data.preferences={pairs_file}"],
        "reward-model eval": ["reward-model", "eval", str(model), "--pairs", str(pairs_file)],
        "policy-states": ["policy-states", str(model), "--pairs", str(pairs_file)],
        "eval generate": ["eval", "generate", str(model), "--prompts", questions, "--format", "mt_bench", "--out", "out"],
    }[command]  # fmt: skip
    assert main(words) == 2
    err = capsys.readouterr().err
    assert str(model) in err and "Python code of its own" in err and "--trust-remote-code" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.models
def test_files_beside_the_config_are_found_by_their_names_and_stand_for_no_others(tiny_file, tmp_path):
    for name in ("queue", "types", "statistics", "datasets", "transformers", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} was taken from beside the config')")
    (tmp_path / "my_reward.py").write_text(
        "import statistics, queue\ndef length(prompt, response): return len(response)"
    )
    command = "import sys; from r2m_async.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["check", tiny_file, "reward.functions=[my_reward:length]"]
    done = subprocess.run([sys.executable, "-P", "-c", command, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "# ok"


# plan


def test_plan_at_the_quickstarts_age_reaches_the_bound(capsys):
    plan = planned(capsys, QUICKSTART, "--generate", "1", "--train", "8")
    assert plan["step"][:2] == [8.0, 8.0]
    assert plan["bound"] == [8.0, 100]
    assert plan["synchronous"] == [16.0, 2.0]
    assert plan["policy age"][1:] == [1, 1]
    assert plan["head age"] == [1, 1]


def test_plan_with_age_zero_is_the_synchronous_schedule(capsys):
    zero = ["scheduling.max_policy_age=0", "scheduling.max_head_age=0"]
    plan = planned(capsys, QUICKSTART, *zero, "--generate", "1", "--train", "8")
    assert plan["step"][:2] == [16.0, 4.0]
    assert plan["bound"] == [8.0, 50]
    assert plan["synchronous"] == [16.0, 1.0]
    assert plan["policy age"] == [0, 0, 0]


def test_plan_counts_actors_replicas_and_every_stages_own_time(capsys):
    """8 groups: 4 s of generation and 0.5 s of loading on two actors, 2.5 s of embedding and scoring, 3.75 s of learning."""
    times = ["--generate", "1", "--load-weights", "0.5", "--embed", "0.25", "--score", "0.5"]
    times += ["--proximal", "0.75", "--train", "3", "--weights", "0.25", "--update", "0.125"]
    plan = planned(capsys, QUICKSTART, "rollouts.num_actors=2", "scheduling.max_policy_age=4", *times)
    assert plan["stage times"] == [1, 0.5, 0.25, 0.75, 0.5, 3, 0.25, 0.125, 0, 0, 0]
    assert plan["bound"][0] == 4.0, "loading is not in it: how often an actor loads is the schedule's doing"
    assert plan["synchronous"][0] == 4.5 + 2.5 + 3.75 + 0.25 + 0.125
    assert plan["step"][0] == pytest.approx(4.5, rel=0.01)


def test_plan_lets_weights_be_copied_beside_the_proximal_pass_except_where_zero_gathers_them(capsys):
    times = ["--generate", "0.1", "--proximal", "1", "--train", "3", "--weights", "1"]
    assert planned(capsys, QUICKSTART, *times)["step"][0] == pytest.approx(4.0, rel=0.01)
    gathered = planned(capsys, QUICKSTART, "learner.backend=deepspeed", "learner.zero_stage=3", *times)
    assert gathered["step"][0] == pytest.approx(5.0, rel=0.01) and gathered["bound"][0] == 5.0


def test_plan_lets_stages_share_cores(capsys):
    """16 s of work in each step: 4 s are possible on many cores, 8 s on two, and 16 s on one, whatever the schedule."""
    times = [
        "scheduling.max_policy_age=4",
        "rollouts.num_actors=2",
        "--generate",
        "1",
        "--embed",
        "0.5",
        "--train",
        "4",
    ]
    # Actors, annotators and learner have 4 s of work each, so that each waits for another now and then.
    assert planned(capsys, QUICKSTART, *times)["bound"] == [4.0, pytest.approx(88, abs=2)]
    two = planned(capsys, QUICKSTART, *times, "--cores", "2")
    assert two["bound"] == [8.0, 2, pytest.approx(100, abs=5)]
    one = planned(capsys, QUICKSTART, *times, "--cores", "1")
    assert one["bound"] == [16.0, 1, pytest.approx(100, abs=5)]
    calm = ["scheduling.max_policy_age=0", "scheduling.max_head_age=0", *times[1:]]
    # In a synchronous step two actors generate while what they have generated is embedded, but for the last two groups.
    assert planned(capsys, QUICKSTART, *calm, "--cores", "3")["step"][0] == pytest.approx(4 + 1 + 4, abs=0.01)
    assert planned(capsys, QUICKSTART, *calm, "--cores", "1")["step"][0] == pytest.approx(16, abs=0.01)
    err = mistake(capsys, "plan", QUICKSTART, "--cores", "0")
    assert "--cores is 0.0; expected a number above 0" in err


def test_plan_counts_the_calls_of_the_queue(capsys):
    """8 groups are put twice, and their parts are got in three calls and freed in one."""
    plan = planned(capsys, QUICKSTART, "--train", "1", "--generate", "0", "--queue", "0.1")
    assert plan["synchronous"][0] == 1 + 20 * 0.1


def trace_of(tmp_path: Path, *intervals: tuple[str, int, float], tail: str = "") -> str:
    run = tmp_path / "run"
    run.mkdir()
    records = [
        {"stage": "s", "method": method, "step": step, "start": 10.0, "end": 10.0 + seconds}
        for method, step, seconds in intervals
    ]
    (run / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(run)


def test_plan_takes_the_mean_times_of_a_run_without_its_evaluations_and_a_flag_wins(capsys, tmp_path):
    run = trace_of(
        tmp_path,
        ("generate", 0, 0.5),
        ("generate", 1, 1.5),
        ("generate", -1, 99.0),
        ("train", 0, 8.0),
        ("restart", 0, 5.0),
    )
    plan = planned(capsys, QUICKSTART, "--times", run)
    assert plan["stage times"] == [1, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0]
    assert plan["bound"][0] == 8.0
    assert planned(capsys, QUICKSTART, "--times", run, "--train", "4")["stage times"] == [
        1,
        0,
        0,
        0,
        0,
        4,
        0,
        0,
        0,
        0,
        0,
    ]


def test_plan_does_not_take_the_start_of_processes_for_work(capsys, tmp_path):
    """A stage's first call waits for its process."""
    calls = [("weights", step, 0.55 if step == 0 else 0.01) for step in range(9)]
    calls += [("generate", step, 0.1 if step % 2 else 0.3) for step in range(9) for _ in range(2)]
    plan = planned(capsys, QUICKSTART, "--times", trace_of(tmp_path, *calls), "--train", "2")
    assert plan["stage times"] == [0.3, 0, 0, 0, 0, 2, 0.01, 0, 0, 0, 0]


def test_plan_reads_the_trace_of_a_run_that_was_killed_while_it_wrote(capsys, tmp_path):
    run = trace_of(tmp_path, ("generate", 0, 0.5), ("train", 0, 8.0), tail='{"stage": "s", "met')
    assert planned(capsys, QUICKSTART, "--times", run)["stage times"] == [0.5, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0]


def test_plan_refuses_a_directory_without_a_trace(capsys, tmp_path):
    err = mistake(capsys, "plan", QUICKSTART, "--times", str(tmp_path / "absent"))
    assert "absent: has no readable trace.jsonl (No such file or directory)" in err


# Mistakes


@pytest.mark.parametrize("command", ["train", "plan", "check"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.num_step=3", "run.num_step: no such key; did you mean run.num_steps?"),
        ("run.num_steps", "'run.num_steps' is not of the form section.key=value, e.g. run.num_steps=20"),
        ("run.num_steps=none", "run.num_steps: input should be a valid integer"),
        ("run.num_steps=[3", "run.num_steps=[3"),
        ("learner.warmup=80", "learner.warmup is 80 and run.num_steps is 80"),
    ],
)
def test_a_bad_override_ends_every_command_with_one_line_and_code_2(capsys, command, override, message):
    assert message in mistake(capsys, command, QUICKSTART, override)


def test_a_config_that_is_not_there_ends_with_one_line_and_code_2(capsys):
    assert "absent.yaml: cannot be read: No such file or directory" in mistake(capsys, "check", "absent.yaml")


@pytest.mark.models
def test_missing_and_bad_data_end_a_training_run_before_it_starts(capsys, tiny_file, tmp_path):
    err = mistake(capsys, "train", tiny_file, "data.prompts=absent.jsonl")
    assert "absent.jsonl" in err
    (tmp_path / "bad.jsonl").write_text('{"prompt": "the river"}\n{"prompt": 3}\n')
    assert "bad.jsonl, line 2: prompt = 3" in mistake(capsys, "train", tiny_file, "data.prompts=bad.jsonl")
    assert not (tmp_path / "runs").exists()


@pytest.mark.models
@pytest.mark.parametrize("key", ["model.policy", "model.reference", "reward.model"])
def test_a_model_that_is_not_there_ends_a_training_run_by_its_key(capsys, tiny_file, key):
    err = mistake(capsys, "train", tiny_file, f"{key}=./absent")
    assert key in err
    assert "./absent" in err


@pytest.mark.parametrize(
    "command",
    [
        ["study", "study.yaml"],
        ["export", "run"],
        ["bon", "embedded", "--out"],
        ["reward-model", "eval", "embedded", "--out"],
        ["policy-states", "embedded", "--out"],
        ["eval", "judge", "outputs.json", "--judge", "embedded", "--out"],
        ["eval", "win-rate", "annotations.json", "--out"],
    ],
)
def test_a_file_where_results_would_go_is_refused_before_anything_is_computed(capsys, tmp_path, command):
    (tmp_path / "there").write_text("dear")
    for out in (tmp_path / "there", tmp_path / "there" / "within"):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(out)])
        assert ended.value.code == 2 and f"{tmp_path / 'there'} is a file; name a directory" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "dear"


def test_a_command_that_is_none_is_refused_with_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian", QUICKSTART])
    assert end.value.code == 2
    assert "train" in capsys.readouterr().err


def test_the_installed_command_says_its_mistake_on_stderr_without_a_traceback():
    r2m = Path(sys.executable).with_name("r2m")
    good = subprocess.run([r2m, "plan", QUICKSTART, "--train", "8"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[2].startswith("bound         8.000 s")
    bad = subprocess.run([r2m, "check", QUICKSTART, "run.num_step=3"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "r2m: run.num_step: no such key; did you mean run.num_steps?\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(["trian", "x.yaml"], "train"), (["reward-model", "evla", "x"], "eval"), (["eval", "genrate"], "generate")],
)
def test_of_a_mistyped_command_the_nearest_one_is_named(capsys, typed, meant):
    with pytest.raises(SystemExit) as left:
        main(typed)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


@pytest.mark.models
def test_a_run_in_one_process_starts_no_ray_and_takes_overrides_behind_its_flag(tiny_config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(tiny_config.run(output_dir=str(tmp_path / "runs")).to_yaml())
    command = [sys.executable, "-c", IN_PROCESS, "train", str(file), "--in-process", "run.num_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ray was not imported" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


IN_PROCESS = """
import sys
from r2m_async.cli import main

status = main(sys.argv[1:])
print("ray was", "imported" if "ray" in sys.modules else "not imported")
sys.exit(status)
"""


def test_what_no_option_takes_is_still_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "config.yaml", "--in-processes", "run.num_steps=2"])
    assert left.value.code == 2 and "unrecognized arguments: --in-processes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "run", "out", "run.num_steps=2"])
    assert "unrecognized arguments: run.num_steps=2" in capsys.readouterr().err


@pytest.mark.parametrize("where", [["--traceback", "check"], ["check", "--traceback"]])
def test_where_an_error_arose_is_shown_if_asked_for(where, tmp_path, capsys):
    place = where.index("check") + 1
    path = str(tmp_path / "absent.yaml")
    assert main([*where[:place], path, *where[place:]]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "read_yaml" in shown
    assert shown.endswith("absent.yaml: cannot be read: No such file or directory\n")
    assert main(["check", path]) == 2
    assert capsys.readouterr().err == f"r2m: {path}: cannot be read: No such file or directory\n"

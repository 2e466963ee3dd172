"""`r2m eval generate` and `r2m eval judge`: the files that judges read, by real engines on tiny models."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import SHARED_DATA, WORDS, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.cli import main
from r2m_async.data.prompts import policy_reads
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation import answering as offline_generation
from r2m_async.evaluation.answering import GenerationSettings, generate_answers
from r2m_async.evaluation.answers import Answer, read_outputs, write_answers
from r2m_async.evaluation.best_of_n import load_pool
from r2m_async.evaluation.judging import judge
from r2m_async.evaluation.questions import load_questions
from r2m_async.from_scratch.language import gold_reward
from r2m_async.models.generator import TransformersGenerator
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.whole import only_writer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Two heads of 32, the least that vLLM has on a CPU; with a chat template, and sampling settings of its own."""
    directory = tmp_path_factory.mktemp("policy") / "walker"
    save_tiny_model(directory, "qwen2", False, WORDS, seed=1, width=64)
    shape = AutoConfig.from_pretrained(directory)
    shape.max_position_embeddings = 1024
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.update(do_sample=True, repetition_penalty=50.0, top_k=1)  # not used
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return str(directory)


def lines_of(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompt files in the form that the stored ones have."""
    folder = tmp_path_factory.mktemp("prompts")
    asked = ["the old river sings", "a warm stone", "two or three", "the wind moves softly"]
    alpaca = [
        {"id": f"alpaca_eval-{n:03}", "dataset": "koala", "prompt": [{"role": "user", "content": text}]}
        for n, text in enumerate(asked)
    ]
    categories = ["writing", "math", "stem", "unheard of"]
    mt_bench = [
        {"id": f"mt_bench-{81 + n}", "category": category, "turns": [text, "and not one"]}
        for n, (text, category) in enumerate(zip(asked, categories, strict=True))
    ]
    posts = [
        {
            "id": f"tldr-{n}",
            "prompt": [{"role": "user", "content": f"POST: {text}\n\nTL;DR:"}],
            "reference_summary": "warm wind",
        }
        for n, text in enumerate(asked)
    ]
    named = {"alpaca_eval": alpaca, "mt_bench": mt_bench, "tldr": posts}
    return {name: lines_of(folder / f"{name}.jsonl", records) for name, records in named.items()}


def settings_of(form, **options):
    return GenerationSettings(format=form, **({"engine": "transformers", "max_new_tokens": 12} | options))


def read_back(path):
    text = Path(path).read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def without_time(records):
    return [{key: value for key, value in record.items() if key != "tstamp"} for record in records]


# Pools


@pytest.mark.models
def test_a_pool_has_several_samples_of_each_prompt_and_best_of_n_reads_it(policy, files, tmp_path):
    arguments = [
        "eval",
        "generate",
        policy,
        "--prompts",
        str(files["tldr"]),
        "--format",
        "pool",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--engine", "transformers", "--max-new-tokens", "12", "--num", "2", "--samples", "3"]
    assert main(arguments) == 0
    records = read_back(tmp_path / "pool.jsonl")
    asked = [one["prompt"] for one in read_back(files["tldr"])][:2]
    assert [one["prompt"] for one in records] == asked
    assert all(len(set(one["responses"])) == 3 for one in records)  # each with a seed of its own
    pool = load_pool(tmp_path / "pool.jsonl")
    assert [[response.text for response in one.responses] for one in pool] == [one["responses"] for one in records]
    # A sample is the answer that its prompt, its place and its seed give, as for every other format.
    again = lines_of(tmp_path / "again.jsonl", [{"prompt": prompt} for prompt in asked for _ in range(3)])
    alone = generate_answers(policy, again, tmp_path / "alone.jsonl", settings_of("pool"))
    for key in ("responses", "finished"):
        assert [one[key] for one in read_back(alone)] == [[value] for one in records for value in one[key]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "alpaca_eval", "samples": 2}, "--samples 2: alpaca_eval has one answer to a prompt"),
        ({"format": "pool", "samples": 0}, "--samples 0: must be at least 1"),
        ({"format": "pool", "samples": 2, "temperature": 0.0}, "they would all be the same"),
    ],
)
def test_samples_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**options)


# Prompt files


def test_each_judges_own_prompt_files_say_the_same_as_the_stored_ones(tmp_path, files):
    own = tmp_path / "alpaca_eval.json"
    own.write_text(json.dumps([{"dataset": "koala", "instruction": "a warm stone", "output": "?", "generator": "x"}]))
    (question,) = load_questions(own, "alpaca_eval")
    stored = load_questions(files["alpaca_eval"], "alpaca_eval")[1]
    assert (question.content, question.record) == (stored.content, stored.record)
    assert question.content == (("user", "a warm stone"),)
    fastchat = {"question_id": 82, "category": "math", "turns": ["a warm stone", "and not one"], "reference": ["4"]}
    (question,) = load_questions(lines_of(tmp_path / "question.jsonl", [fastchat]), "mt_bench")
    stored = load_questions(files["mt_bench"], "mt_bench")[1]
    assert (question.content, question.later_turns, question.record, question.temperature) == (
        stored.content,
        stored.later_turns,
        {"question_id": 82},
        0.0,
    )
    trl = {"prompt": "POST: a warm stone\n\nTL;DR:", "completion": " warm wind"}
    (question,) = load_questions(lines_of(tmp_path / "tldr.jsonl", [trl]), "tldr")
    stored = load_questions(files["tldr"], "tldr")[1]
    assert question.content == stored.content == "POST: a warm stone\n\nTL;DR:"
    assert question.record["reference_summary"] == stored.record["reference_summary"] == "warm wind"


def test_mt_benchs_temperatures_are_fastchats_by_category(files):
    assert [one.temperature for one in load_questions(files["mt_bench"], "mt_bench")] == [0.7, 0.0, 0.1, 0.7]


def test_prompts_are_turns_or_raw_text(files, policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)

    def read(form, **options):
        return policy_reads(load_questions(files[form], form, limit=1, **options)[0].content, tokenizer)[0]

    assert read("alpaca_eval") == "<user>the old river sings\n<assistant>"
    assert read("alpaca_eval", chat=False) == "the old river sings"
    assert read("tldr") == "POST: the old river sings\n\nTL;DR:"
    assert read("tldr", chat=True) == "<user>POST: the old river sings\n\nTL;DR:\n<assistant>"


@pytest.mark.parametrize(
    ("form", "name", "count"),
    [
        ("alpaca_eval", "alpaca_eval_prompts", 805),
        ("mt_bench", "mt_bench_questions", 80),
        ("tldr", "tldr_prompts", 900),
    ],
)
def test_the_stored_prompt_files_are_read_whole_where_they_are(form, name, count):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    questions = load_questions(path, form)
    assert len(questions) == count
    if form == "mt_bench":
        assert [one.record["question_id"] for one in questions] == list(range(81, 161))
    if form == "tldr":
        assert all(str(one.content).endswith("TL;DR:") and one.record["reference_summary"] for one in questions)


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("alpaca_eval", {"text": "a"}, r"line 1: prompt: missing, the record has 'text'; add it$"),
        ("alpaca_eval", {"prompt": [{"role": "user", "content": "a"}] * 2}, r"2 turns, and this format takes one text"),
        ("alpaca_eval", {"instruction": 3}, r"instruction = 3: int, not text"),
        ("mt_bench", {"id": "81", "turns": []}, r"turns = \[\]: not a list of one or more texts; write one per turn$"),
        ("mt_bench", {"id": "a", "turns": ["b"]}, r"id = 'a': does not end with the number that FastChat has"),
        ("mt_bench", {"question_id": "81", "turns": ["b"]}, r"question_id = '81': not a whole number"),
        ("tldr", {"prompt": "  "}, r"prompt = '  ': no text"),
    ],
)
def test_a_record_that_is_no_question_is_refused_with_its_line(tmp_path, form, record, message):
    with pytest.raises(DataError, match=message):
        load_questions(lines_of(tmp_path / "prompts.jsonl", [record]), form)


# Generation


@pytest.mark.models
def test_alpaca_evals_file_has_what_it_merges_on_and_greedy_answers_are_the_models_own(policy, files, tmp_path):
    path = generate_answers(policy, files["alpaca_eval"], tmp_path, settings_of("alpaca_eval", temperature=0.0))
    assert path == tmp_path / "model_outputs.json"
    records = read_back(path)
    assert [list(one) for one in records] == [["dataset", "instruction", "output", "generator", "finish_reason"]] * 4
    assert records[0]["instruction"] == "the old river sings" and records[0]["dataset"] == "koala"
    assert {one["generator"] for one in records} == {"walker"}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model_outputs.json"]  # nothing else is left
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    for record in records:
        ids = tokenizer(f"<user>{record['instruction']}\n<assistant>", return_tensors="pt")["input_ids"]
        said = []
        while len(said) < 12 and (not said or said[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                said.append(
                    model(torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)).logits[0, -1].argmax().item()
                )
        assert record["output"] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert record["finish_reason"] == ("stop" if said[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.models
def test_mt_benchs_second_turn_is_asked_on_the_first_answer(policy, files, tmp_path, monkeypatch):
    asked = []
    generate = TransformersGenerator.generate

    def watched(self, requests):
        asked.append(requests)
        return generate(self, requests)

    monkeypatch.setattr(TransformersGenerator, "generate", watched)
    path = generate_answers(policy, files["mt_bench"], tmp_path, settings_of("mt_bench", batch=4), name="org/walker")
    assert path == tmp_path / "model_answer" / "org__walker.jsonl"  # as FastChat's `load_model_answers` finds it
    records, (first, second) = read_back(path), asked
    tokenizer = AutoTokenizer.from_pretrained(policy)
    questions = load_questions(files["mt_bench"], "mt_bench")
    for record, question, before, after in zip(records, questions, first, second, strict=True):
        assert list(record) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        (choice,) = record["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2
        text = f"<user>{question.content[0][1]}\n<assistant>"
        assert tokenizer.decode(before.token_ids) == text
        expected = f"<user>{question.content[0][1]}\n<assistant>{choice['turns'][0]}\n<user>and not one\n<assistant>"
        assert after.token_ids == tuple(tokenizer(expected)["input_ids"])
    assert [one.temperature for one in first] == [one.temperature for one in second] == [0.7, 0.0, 0.1, 0.7]
    assert len({one.seed for one in (*first, *second)}) == 8
    assert [one["question_id"] for one in records] == [81, 82, 83, 84]
    assert len({one["answer_id"] for one in records}) == 4


@pytest.mark.models
def test_tldr_keeps_the_text_as_generated_beside_the_summary(policy, files, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    arguments = ["eval", "generate", policy, "--prompts", str(files["tldr"]), "--format", "tldr", "--out", str(out)]
    assert main([*arguments, "--engine", "transformers", "--temperature", "1", "--max-new-tokens", "12"]) == 0
    assert f"answered 4/4\nanswers: {out}\n" in capsys.readouterr().out
    for record in read_back(out):
        assert record["prompt"].endswith("TL;DR:") and record["reference_summary"] == "warm wind"
        assert record["summary"] == record["response"].strip() and record["id"].startswith("tldr-")
    answer = Answer(texts=(" warm wind\n",), finish_reasons=("stop",), time=0.0)
    write_answers(tmp_path / "by_hand.jsonl", "tldr", load_questions(files["tldr"], "tldr", limit=1), [answer], "me")
    (record,) = read_back(tmp_path / "by_hand.jsonl")
    assert (record["response"], record["summary"]) == (" warm wind\n", "warm wind")
    outputs = read_outputs(out)
    assert outputs.format == "tldr" and outputs.texts[0].response == read_back(out)[0]["response"]


@pytest.mark.models
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.ring)])
def test_an_interrupted_command_ends_with_the_answers_of_one_that_was_not(policy, files, tmp_path, monkeypatch, engine):
    generator = TransformersGenerator
    if engine == "vllm":
        from actors.vllm_offline import OfflineVLLM as generator
    settings = settings_of("mt_bench", batch=2, temperature=1.0, engine=engine)
    whole = read_back(generate_answers(policy, files["mt_bench"], tmp_path / "whole", settings))
    generate, calls = generator.generate, []

    def fails_at_the_fourth(self, requests):
        calls.append(len(requests))
        if len(calls) == 4:
            raise InterruptedError
        if engine == "vllm":
            assert not self._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        return generate(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "generate", fails_at_the_fourth)
        with pytest.raises(InterruptedError) as cut:
            generate_answers(policy, files["mt_bench"], tmp_path / "cut", settings)
    assert "2 of 4 questions are answered, in " in cut.value.__notes__[0]
    partial = tmp_path / "cut" / "model_answer" / ".walker.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 1 + 2
    assert not partial.with_name("walker.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"texts": ["half a li')
    with pytest.raises(ConfigError, match=r"partial: was begun with seed = 0 and now it is 1; repeat the command"):
        generate_answers(
            policy,
            files["mt_bench"],
            tmp_path / "cut",
            settings_of("mt_bench", batch=2, seed=1, temperature=1.0, engine=engine),
        )
    calls.clear()
    monkeypatch.setattr(generator, "generate", fails_at_the_fourth)
    done = generate_answers(policy, files["mt_bench"], tmp_path / "cut", settings)
    assert without_time(read_back(done)) == without_time(whole) and calls == [2, 2] and not partial.exists()


@pytest.mark.models
def test_two_commands_do_not_write_one_file_of_answers_and_a_damaged_one_is_named(policy, files, tmp_path):
    settings = settings_of("tldr", max_new_tokens=2)
    partial = tmp_path / ".walker.jsonl.partial"
    partial.touch()
    with only_writer(partial) as alone:
        assert alone
        with pytest.raises(ConfigError, match="partial: another process writes into this file of answers"):
            generate_answers(policy, files["tldr"], tmp_path / "walker.jsonl", settings)
    done = generate_answers(policy, files["tldr"], tmp_path / "walker.jsonl", settings)
    fingerprint = offline_generation._fingerprint(
        policy, "walker", load_questions(files["tldr"], "tldr", chat=None, limit=None), settings
    )
    done.unlink()
    lines_of(partial, [fingerprint, {"texts": ["said"], "finish_reasons": "stop", "time": 1.0}])
    with pytest.raises(DataError, match="partial:2: is no answer"):
        generate_answers(policy, files["tldr"], tmp_path / "walker.jsonl", settings)


@pytest.mark.models
def test_answers_are_a_function_of_the_seed_and_the_first_of_them_do_not_depend_on_the_rest(policy, files, tmp_path):
    def answers(name, **options):
        settings = settings_of("alpaca_eval", temperature=1.0, **options)
        return [
            one["output"]
            for one in read_back(generate_answers(policy, files["alpaca_eval"], tmp_path / name, settings))
        ]

    first = answers("a")
    assert (
        answers("b", num=2) == first[:2]
        and answers("d", batch=4) == first
        and answers("c", seed=1) != first
        and len(set(first)) > 1
    )


@pytest.mark.models
def test_what_does_not_fit_is_refused_first_and_cut_later(policy, files, tmp_path, capsys, monkeypatch):
    lengths, generate = [], TransformersGenerator.generate

    def watched(self, requests):
        lengths.extend(len(one.token_ids) for one in requests)
        return generate(self, requests)

    monkeypatch.setattr(TransformersGenerator, "generate", watched)
    longest = "wind " * 1030
    long = lines_of(tmp_path / "long.jsonl", [{"instruction": "the old river"}, {"instruction": longest}])
    for path, options, message in (
        (
            files["alpaca_eval"],
            {"max_prompt_tokens": 3},
            r"line 1: .* \d+ tokens and --max-prompt-tokens is 3; raise it",
        ),
        (
            files["alpaca_eval"],
            {"max_new_tokens": 1020},
            r"1024 positions, and --max-new-tokens is 1020; lower that to at",
        ),
        (
            long,
            {"max_new_tokens": 12},
            r"line 2: .* and the model 1024 positions, which leave none to answer; use another",
        ),
        (long, {"max_prompt_tokens": 1, "max_new_tokens": 1020}, r"line 1: .* and --max-prompt-tokens is 1; raise it"),
    ):
        with pytest.raises(DataError, match=message):
            generate_answers(policy, path, tmp_path, settings_of("alpaca_eval", **options))
    generate_answers(policy, files["mt_bench"], tmp_path, settings_of("mt_bench", max_prompt_tokens=50))
    assert "4 conversations were longer than 50 tokens and lost their beginning" in capsys.readouterr().out
    assert max(lengths) == 50


@pytest.mark.models
def test_the_default_of_new_tokens_is_what_the_model_leaves_after_the_longest_prompt(
    policy, tmp_path, capsys, monkeypatch
):
    told, generate = [], TransformersGenerator.generate

    def watched(self, requests):
        told.extend(answers := generate(self, requests))
        return answers

    monkeypatch.setattr(TransformersGenerator, "generate", watched)
    prompts = lines_of(tmp_path / "prompts.jsonl", [{"instruction": "the old river"}, {"instruction": "wind " * 500}])
    tokenizer = AutoTokenizer.from_pretrained(policy)
    longest = max(len(policy_reads(one.content, tokenizer)[1]) for one in load_questions(prompts, "alpaca_eval"))
    left = f"--max-new-tokens is {1024 - longest}, not the 2048 of alpaca_eval: the longest prompt has {longest} tokens"
    generate_answers(policy, prompts, tmp_path / "out", settings_of("alpaca_eval", max_new_tokens=None))
    assert left in capsys.readouterr().out
    assert max(len(one.token_ids) for one in told) == 1024 - longest


@pytest.mark.models
def test_an_export_is_its_policy_and_a_run_is_told_to_be_exported(policy, files, tmp_path):
    shutil.copytree(policy, tmp_path / "exported" / "policy")
    path = generate_answers(str(tmp_path / "exported"), files["tldr"], tmp_path / "out", settings_of("tldr", num=1))
    assert read_back(path)[0]["generator"] == "exported"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"is a run, not a model; write its policy with `r2m export"):
        generate_answers(str(tmp_path / "run"), files["tldr"], tmp_path / "out2", settings_of("tldr"))


def test_a_mistake_on_the_command_line_is_told_in_one_line(tmp_path, files, capsys, policy, monkeypatch):
    common = ["eval", "generate", policy, "--prompts", str(files["mt_bench"]), "--format", "mt_bench", "--num", "1"]
    common += ["--engine", "transformers", "--max-new-tokens", "9"]
    (tmp_path / "there.jsonl").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "there.jsonl")], "is there already; name another or remove it"),
        (["--out", str(tmp_path / "a.jsonl"), "--name", "b"], "FastChat takes the model's name from its file"),
        (["--out", str(tmp_path), "--no-chat"], "--no-chat: MT-Bench has a second turn"),
        (["--out", str(tmp_path), "--temperature", "-1"], "--temperature -1.0: must be a number from 0"),
        (["--out", str(tmp_path), "--batch", "0"], "--batch 0: must be at least 1"),
    ):
        assert main([*common, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", "generate", str(tmp_path / "no"), *common[3:], "--out", str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    monkeypatch.setattr(offline_generation.importlib.util, "find_spec", lambda name: None)
    assert main([*common, "--out", str(tmp_path / "new"), "--engine", "vllm"]) == 2
    assert "vLLM is not installed: pip install" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.ring
def test_vllm_answers_all_three_formats_as_transformers_does(policy, files, tmp_path, monkeypatch):
    """Greedy to the letter, in one engine; seeded sampling repeats itself, batched otherwise too."""
    from actors.vllm_offline import OfflineVLLM

    engines = {}
    options_of = offline_generation.GeneratorOptions

    def roomy(**options):
        return options_of(**(options | {"context": 400, "max_new_tokens": 12}))

    def shared(name, options):
        if name == "transformers":
            return TransformersGenerator(options)
        if "vllm" not in engines:
            engines["vllm"] = OfflineVLLM(options)
            monkeypatch.setattr(OfflineVLLM, "close", lambda self: None)
        return engines["vllm"]

    close = OfflineVLLM.close
    monkeypatch.setattr(offline_generation, "GeneratorOptions", roomy)
    monkeypatch.setattr(offline_generation, "_engine", shared)
    try:
        for form in ("alpaca_eval", "mt_bench", "tldr"):
            greedy = [
                without_time(
                    read_back(
                        generate_answers(
                            policy, files[form], tmp_path / engine, settings_of(form, engine=engine, temperature=0.0)
                        )
                    )
                )
                for engine in ("vllm", "transformers")
            ]
            assert greedy[0] == greedy[1], form
        sampled = [
            read_back(
                generate_answers(
                    policy,
                    files["alpaca_eval"],
                    tmp_path / f"{number}",
                    settings_of("alpaca_eval", engine="vllm", seed=seed, temperature=1.0, batch=batch),
                )
            )
            for number, (seed, batch) in enumerate([(0, 4), (0, 4), (0, 1), (1, 4)])
        ]
        assert sampled[0] == sampled[1] == sampled[2] != sampled[3]
        # More than vLLM takes in one step: prompts are split, and still have seeds of their own.
        asked = [{"instruction": f"{number} " + "the wind " * 60} for number in range(120)]
        many = lines_of(tmp_path / "many.jsonl", asked)
        settings = settings_of("alpaca_eval", engine="vllm", temperature=1.0)
        answers = read_back(generate_answers(policy, many, tmp_path / "many", settings))
        assert len({one["output"] for one in answers}) > 100
        assert {one["finish_reason"] for one in answers} == {"stop", "length"}
    finally:
        close(engines["vllm"])


# Judging


@pytest.fixture
def answered(tmp_path):
    """Two answer files on one prompt file in each format, with one more prompt in the second."""
    alpaca = [
        [{"instruction": f"the {word}", "output": f"{text} {word}", "generator": name} for word in words]
        for text, name, words in (("warm", "ours", WORDS[:6]), ("cold cold", "theirs", WORDS[6::-1]))
    ]
    paths = []
    for name, records in zip(("ours.json", "theirs.json"), alpaca, strict=True):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(records))
    return paths


@pytest.mark.models
def test_a_reward_model_judges_as_it_scores_and_its_annotations_give_the_same_win_rate(
    tiny, answered, tmp_path, capsys
):
    model, out = tiny("llama", True), tmp_path / "out"
    ours, theirs = answered
    assert main(["eval", "judge", str(ours), "--judge", model, "--against", str(theirs), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    ensemble = RewardEnsemble(model)
    rewards = [
        [ensemble.score((("user", f"the {w}"),), [f"{text} {w}"]).item() for w in WORDS[:6]]
        for text in ("warm", "cold cold")
    ]
    mine = torch.tensor(rewards[0], dtype=torch.float64)
    assert results["reward"]["value"] == pytest.approx(mine.mean().item(), abs=1e-5)
    half = 2.570582 * mine.std().item() / math.sqrt(6)  # t with 5 degrees of freedom
    assert results["reward"]["half_width"] == pytest.approx(half, rel=1e-4)
    wins = [(a > b) + (a == b) / 2 for a, b in zip(*rewards, strict=True)]
    comparison = results["comparison"]
    assert comparison["win_rate"]["value"] == pytest.approx(sum(wins) / 6)
    assert (comparison["generator"], comparison["against"]) == ("ours", "theirs")
    assert comparison["length"] == pytest.approx(sum(len(f"warm {w}") for w in WORDS[:6]) / 6)
    told = capsys.readouterr().out
    assert (out / "table.md").read_text() in told and "length-controlled win rate" in told
    assert len((out / "rewards.jsonl").read_text().splitlines()) == 6
    assert main(["eval", "win-rate", str(out / "annotations.json")]) == 0
    assert json.loads((out / "annotations-win-rate" / "results.json").read_text()) == comparison


@pytest.mark.models
def test_mt_bench_is_judged_turn_by_turn_and_summaries_against_their_authors(tiny, files, tmp_path):
    model = tiny("llama", True)
    answers = [
        {"question_id": 81 + n, "model_id": "m", "choices": [{"index": 0, "turns": [f"warm {n}", "cold"]}]}
        for n in range(4)
    ]
    answers[0]["choices"][0]["finish_reason"] = ["length", "stop"]
    path = lines_of(tmp_path / "m.jsonl", answers)
    results, records, compared = judge(path, model, str(path), files["mt_bench"])
    ensemble = RewardEnsemble(model)
    first = (("user", "the old river sings"),)
    whole = (*first, ("assistant", "warm 0"), ("user", "and not one"))
    expected = [ensemble.score(first, ["warm 0"], False).item(), ensemble.score(whole, ["cold"]).item()]
    assert [one["reward"] for one in records[:2]] == pytest.approx(expected, abs=1e-5)
    assert (results["num_prompts"], results["num_answers"], results["reward"]["num_groups"]) == (4, 8, 4)
    assert results["comparison"]["win_rate"] | {"half_width": 0} == {
        "value": 0.5,
        "standard_error": 0.0,
        "half_width": 0,
        "num_groups": 4,
    }
    assert {(one["question_id"], one["turn"]) for one in compared} == {
        (81 + n, turn) for n in range(4) for turn in (1, 2)
    }
    with pytest.raises(ConfigError, match="answers do not repeat the questions; give their file as --prompts"):
        judge(path, model)
    post = {"prompt": "POST: the wind\n\nTL;DR:", "summary": "wind", "reference_summary": "old wind"}
    results, records, compared = judge(lines_of(tmp_path / "s.jsonl", [post]), model, "reference")
    assert records[0]["reward"] == pytest.approx(ensemble.score(post["prompt"], [" wind"]).item(), abs=1e-5)
    assert compared[0]["reward_1"] == pytest.approx(ensemble.score(post["prompt"], [" old wind"]).item(), abs=1e-5)


def test_a_program_judges_by_its_name(tmp_path):
    prompt, good, bad = "write something warm about the river :", " the gentle river follows a house .", " river river"
    records = [
        {"prompt": prompt, "response": text, "finish_reason": end} for text, end in ((good, "stop"), (bad, "length"))
    ]
    path = lines_of(tmp_path / "answers.jsonl", records)
    _, told, _ = judge(path, "r2m_async.from_scratch.language:gold_reward")
    assert (
        [one["reward"] for one in told]
        == [gold_reward(prompt, good, True), gold_reward(prompt, bad, False)]
        == [1.0, -1.0]
    )
    with pytest.raises(ConfigError, match="no callable 'gold_rewar'; did you mean 'gold_reward'"):
        judge(path, "r2m_async.from_scratch.language:gold_rewar")
    path = lines_of(tmp_path / "other.jsonl", [{"prompt": "POST", "response": "a"}])
    with pytest.raises(
        ConfigError,
        match=r"cannot judge the answer to 'POST' \(.*other.jsonl, line 1\): ValueError: not a prompt of the",
    ):
        judge(path, "r2m_async.from_scratch.language:gold_reward")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("of_a_table", r"cannot judge the answer to 'two' \(.*, line 2\): KeyError: 'b'; correct the judge"),
        (
            "not_a_number",
            r"its reward for the answer to 'two' \(.*, line 2\) is nan, which compares with none; correct",
        ),
    ],
)
def test_a_judge_that_fails_is_told_with_the_first_answer_that_it_cannot_judge(tmp_path, capsys, program, message):
    answers = [{"prompt": prompt, "response": text} for prompt, text in (("one", "a"), ("two", "b"), ("three", "b"))]
    path = lines_of(tmp_path / "answers.jsonl", answers)
    arguments = ["--judge", f"{__name__}:{program}", "--against", str(path), "--out", str(tmp_path / "out")]
    assert main(["eval", "judge", str(path), *arguments]) == 2
    assert re.search(rf"^r2m: --judge {__name__}:{program}: {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_whose_reward_is_nan_is_told(tiny, tmp_path):
    broken = AutoModelForSequenceClassification.from_pretrained(tiny("llama", True))
    with torch.no_grad():
        broken.score.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny("llama", True)).save_pretrained(tmp_path / "broken")
    path = lines_of(tmp_path / "answers.jsonl", [{"prompt": "one", "response": "a"}])
    with pytest.raises(ConfigError, match=r"broken: its reward for the answer to 'one' \(.*, line 1\) is nan"):
        judge(path, str(tmp_path / "broken"))


def test_annotations_of_an_earlier_comparison_do_not_outlive_it(tmp_path):
    path = lines_of(tmp_path / "answers.jsonl", [{"prompt": "one", "response": "a"}])
    out = tmp_path / "out"
    arguments = ["eval", "judge", str(path), "--judge", f"{__name__}:length_of", "--out", str(out)]
    assert main([*arguments, "--against", str(path)]) == 0 and (out / "annotations.json").is_file()
    assert main(arguments) == 0
    assert sorted(one.name for one in out.iterdir()) == ["results.json", "rewards.jsonl", "table.md"]


def test_answers_that_cannot_be_compared_are_refused(tmp_path, answered):
    gold = "r2m_async.from_scratch.language:gold_reward"
    ours, theirs = answered

    def against(text, other, message, kind=DataError):
        with pytest.raises(kind, match=message):
            judge(text, f"{__name__}:length_of", str(other))

    against(theirs, ours, r"has no answer to 1 of 7 prompts, the first 'the \w+'; generate both from one prompt file")
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(json.loads(ours.read_text()) * 2))
    against(ours, twice, "two answers to the prompt 'the the'")
    post = lines_of(tmp_path / "s.jsonl", [{"prompt": "a", "summary": "b"}])
    against(ours, post, "is of format tldr and OUTPUTS of alpaca_eval", ConfigError)
    against(post, "reference", "has no reference_summary; name a file of answers")
    wrong = tmp_path / "wrong.json"
    for record, message in (
        ({"instruction": "a", "output": None}, "record 1: output = None: NoneType, not text"),
        ({"instruction": "a", "output": "b", "finish_reason": "eos"}, "finish_reason = 'eos': neither stop nor length"),
        ({"question": "a"}, "record 1: prompt: missing, the record has 'question'"),
    ):
        wrong.write_text(json.dumps([record]))
        with pytest.raises(DataError, match=message):
            judge(wrong, gold)


def length_of(prompt, response, finished):
    return len(response)


def of_a_table(prompt, response, finished):
    return {"a": 1.0}[response]


def not_a_number(prompt, response, finished):
    return 1.0 if response == "a" else math.nan

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_async.data.reward_text import reward_input_ids
from r2m_async.errors import DataError
from r2m_async.from_scratch.cache import NotCached, cached_directory, only_cached
from r2m_async.from_scratch.pretraining import score
from r2m_async.from_scratch.text_models import TextPolicySettings, TextRewardSettings, text_policy, text_reward_model

DATA = Path(__file__).parents[2].parent / "shared" / "data"
ANIMALS = ("fox", "owl", "hen", "cat", "dog", "rat", "bee", "ant")
SMALL_POLICY = TextPolicySettings(vocabulary=320, width=32, layers=1, steps=150, batch_size=4, lr=1e-2)
SMALL_REWARD = TextRewardSettings(
    vocabulary=300, width=32, layers=1, language_steps=60, language_lr=1e-2, epochs=12, lr=3e-3, max_tokens=64
)

pytestmark = pytest.mark.models


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def user(text):
    return [{"role": "user", "content": text}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def posts(tmp_path):
    """A post about an animal, summed up by the animal."""
    return write(
        tmp_path / "posts.jsonl",
        [
            {"prompt": user(f"POST: today number {i} the {animal} was here\n\nTL;DR:"), "reference_summary": animal}
            for i in range(8)
            for animal in ANIMALS
        ],
    )


@pytest.fixture
def pairs(tmp_path):
    """What is kind is preferred to what is rude and exactly as long."""
    return write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": user(f"{i} {animal}?"), "chosen": f"kind {animal} {i}", "rejected": f"rude {animal} {i}"}
            for i in range(20)
            for animal in ANIMALS
        ],
    )


def measurements(directory):
    return json.loads((directory / "measurements.json").read_text())


def weights(directory, kind):
    return kind.from_pretrained(directory).state_dict()


def end_probability(policy, tokenizer, *texts):
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    with torch.no_grad():
        return policy(torch.tensor([ids])).logits[0, -1].softmax(-1)[tokenizer.eos_token_id].item()


def test_the_policy_ends_its_text_after_a_summary_and_not_after_a_post(posts):
    directory = text_policy(posts, SMALL_POLICY)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    post = "POST: today number 3 the owl was here\n\nTL;DR:\n"
    assert end_probability(policy, tokenizer, post) < 0.05
    assert end_probability(policy, tokenizer, post, "owl") > 0.8
    assert policy.config.model_type == "qwen2"
    assert policy.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == policy.config.pad_token_id
    assert measurements(directory)["nats_per_token"] < 1.0


def test_any_text_survives_the_tokenizers(posts, pairs):
    for directory in (text_policy(posts, SMALL_POLICY), text_reward_model(pairs, SMALL_REWARD)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = "  ein Füchslein 🦊 ,\n\tthe  end ."
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_reward_model_learns_what_is_preferred_and_is_measured_on_pairs_it_never_saw(pairs):
    directory = text_reward_model(pairs, SMALL_REWARD)
    measured = measurements(directory)
    assert measured["num_held_out"] == 32
    assert measured["reward_accuracy"] > 0.9
    assert measured["pick_the_longer_accuracy"] == 0.5
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.model_type == "llama"
    ids = [reward_input_ids(tokenizer, "99 owl?\n", f"{word} owl 99", True) for word in ("kind", "rude")]
    kind, rude = score(model, ids).tolist()
    assert kind > rude


def test_the_reward_models_backbone_was_a_language_model_first(pairs):
    def embedding(language_steps):
        frozen = {"vocabulary": 300, "width": 16, "layers": 1, "epochs": 0.1, "lr": 0.0, "held_out": 0.0}
        directory = text_reward_model(pairs, TextRewardSettings(language_steps=language_steps, **frozen))
        return weights(directory, AutoModelForSequenceClassification)["model.embed_tokens.weight"]

    assert not torch.allclose(embedding(1), embedding(5))


def test_a_second_call_finds_the_first_ones_model_and_other_text_or_settings_make_another(posts, tmp_path):
    quick = TextPolicySettings(vocabulary=300, width=16, layers=1, steps=2)
    first = text_policy(posts, quick)
    stages = []
    assert text_policy([posts], quick, on_progress=lambda *stage: stages.append(stage)) == first
    assert stages == []
    other_seed = text_policy(posts, TextPolicySettings(vocabulary=300, width=16, layers=1, steps=2, seed=1))
    other_text = text_policy(write(tmp_path / "other.jsonl", [{"prompt": "just a post, no summary"}]), quick)
    assert len({first, other_seed, other_text}) == 3


def test_the_same_text_and_settings_make_the_same_bits_whatever_the_callers_random_state(
    posts, pairs, tmp_path, monkeypatch
):
    quick_policy = TextPolicySettings(vocabulary=300, width=16, layers=1, steps=3)
    quick_reward = TextRewardSettings(vocabulary=300, width=16, layers=1, language_steps=2, epochs=0.2)
    built = []
    for place in ("one", "two"):
        monkeypatch.setenv("R2M_CACHE", str(tmp_path / place))
        torch.manual_seed(len(built))
        state = torch.random.get_rng_state()
        policy, reward_model = text_policy(posts, quick_policy), text_reward_model(pairs, quick_reward)
        assert torch.equal(torch.random.get_rng_state(), state)
        built.append(weights(policy, AutoModelForCausalLM) | weights(reward_model, AutoModelForSequenceClassification))
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


def test_bad_records_are_refused_or_counted_in_the_measurements(posts, pairs):
    policy = TextPolicySettings(vocabulary=300, width=16, layers=1, steps=1)
    reward = TextRewardSettings(vocabulary=300, width=16, layers=1, language_steps=1, epochs=0.1)
    for path, build, quick in ((posts, text_policy, policy), (pairs, text_reward_model, reward)):
        path.write_text(path.read_text() + '{"prompt": ""}\n')
        with pytest.raises(DataError, match=r"line \d+: prompt = '': no text"):
            build(path, quick)
        assert measurements(build(path, quick, on_bad_record="skip"))["skipped"] == {"empty": 1}


def test_both_models_come_out_of_real_posts_where_they_are_there(posts, pairs, tmp_path):
    sources = []
    for name, made in (("tldr_prompts.jsonl", posts), ("tldr_sample.jsonl", pairs)):
        lines = (DATA / name if (DATA / name).exists() else made).read_bytes().splitlines(keepends=True)[:40]
        sources.append(tmp_path / f"few-{name}")
        sources[-1].write_bytes(b"".join(lines))
    quick = TextPolicySettings(vocabulary=500, width=32, layers=1, steps=20, lr=1e-2)
    assert measurements(text_policy(sources, quick))["num_documents"] == 80
    quick = TextRewardSettings(vocabulary=400, width=32, layers=1, language_steps=5, epochs=1)
    directory = text_reward_model(sources[1], quick)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    ids = [reward_input_ids(tokenizer, "A post.\n\nTL;DR:\n", text, True, 128) for text in ("short", "not so short")]
    assert score(model, ids).isfinite().all()
    assert score(model, ids).unique().numel() == 2


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_starts_afresh(cache):
    def failing(directory):
        (directory / "half").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        cached_directory("thing", "key", failing)
    assert list(cache.iterdir()) == []
    made = cached_directory("thing", "key", lambda directory: (directory / "whole").write_text("whole"))
    assert sorted(path.name for path in made.iterdir()) == ["manifest.json", "whole"]


@pytest.mark.parametrize(
    "hurt",
    [
        lambda file: file.write_text("wholE"),
        lambda file: file.write_text(""),
        lambda file: file.unlink(),
        lambda file: file.with_name("other").touch(),
        lambda file: file.with_name("manifest.json").write_text("{"),
    ],
)
def test_what_was_damaged_in_the_cache_is_made_anew_and_named(cache, caplog, hurt):
    def build(directory):
        (directory / "whole").write_text("whole")

    made = cached_directory("thing", "key", build)
    hurt(made / "whole")
    with pytest.raises(NotCached), only_cached():
        cached_directory("thing", "key", build)
    assert cached_directory("thing", "key", build) == made
    assert (made / "whole").read_text() == "whole" and not (made / "other").exists()
    assert str(made) in caplog.text and "is made anew" in caplog.text
    caplog.clear()
    assert cached_directory("thing", "key", lambda _: pytest.fail("built again")) == made and not caplog.text


def test_what_an_older_version_has_built_without_a_manifest_is_taken(cache):
    made = cached_directory("thing", "key", lambda directory: (directory / "whole").touch())
    (made / "manifest.json").unlink()
    assert cached_directory("thing", "key", lambda _: pytest.fail("built again")) == made


def test_an_operating_system_error_inside_a_builder_is_not_swallowed(cache):
    def failing(directory):
        (directory / "no" / "where").write_text("x")

    with pytest.raises(FileNotFoundError):
        cached_directory("thing", "key", failing)


def test_concurrent_builders_agree_on_one_whole_directory(cache):
    barrier = threading.Barrier(3, timeout=10)
    found = []

    def build(directory):
        barrier.wait()  # all three are building before any may finish
        (directory / "whole").write_text("whole")

    threads = [threading.Thread(target=lambda: found.append(cached_directory("x", "key", build))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert list(cache.iterdir()) == [found[0]] == [*set(found)]
    assert (found[0] / "whole").read_text() == "whole"


def test_a_key_depends_on_where_its_parts_end(cache):
    made = {cached_directory("x", key, lambda _: None) for key in ("ab", ["ab"], ["a", "b"], [b"a", "b"], ["", "ab"])}
    assert len(made) == 3

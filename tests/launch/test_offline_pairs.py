"""Pairs of `labels.offline` are read before a run, by `r2m check` too, and refused by file and line."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from r2m_async.cli import main
from r2m_async.errors import DataError
from r2m_async.launch.workload import resolve

pytestmark = pytest.mark.models

PAIR = {"prompt": "the river :", "chosen": " warm", "rejected": " cold"}


@pytest.fixture
def config(tiny_config, tmp_path):
    """A run with the pairs of `pairs.jsonl`, whose policy has a chat template without a system's turn."""
    policy = tmp_path / "policy"
    shutil.copytree(tiny_config.model.policy, policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refuses + "{{ m.content }}{% endfor %}"
    tokenizer.add_tokens(["beyondrows"])
    tokenizer.save_pretrained(policy)
    return tiny_config.model(policy=str(policy)).labels(offline=str(tmp_path / "pairs.jsonl"), self_weight=0.0)


def written(config, *records) -> str:
    Path(config.labels.offline).write_text("".join(json.dumps(one) + "\n" for one in records))
    path = Path(config.labels.offline).with_name("config.yaml")
    path.write_text(config.to_yaml())
    return str(path)


SYSTEM = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the river"}]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (PAIR | {"prompt": SYSTEM}, "chat template refuses it"),
        (PAIR | {"chosen": " beyondrows"}, r"'beyondrows' \(\d+\) has no embedding in model.policy"),
        (PAIR | {"rejected": 3}, "int, neither text nor a list"),
    ],
)
def test_a_pair_that_a_model_cannot_read_is_refused_or_left_out_before_the_run(config, bad, told, capsys):
    file = written(config, PAIR, bad)
    with pytest.raises(DataError, match=rf"pairs.jsonl, line 2: .*{told}"):
        resolve(config)
    assert main(["check", file]) == 2
    assert "pairs.jsonl, line 2" in capsys.readouterr().err
    skipping = config.data(on_bad_record="skip")
    assert len(resolve(skipping).offline) == 1
    assert main(["check", written(skipping, PAIR, bad)]) == 0
    assert "labels.offline: 1 pairs, 1 left out" in capsys.readouterr().out


def test_pairs_that_are_too_long_are_left_out_and_the_others_numbered_without_a_gap(config):
    written(config, PAIR | {"chosen": " river stone" * 9}, PAIR, PAIR | {"chosen": " old"})
    workload = resolve(config)
    first, second = (one.ticket.group_id for one in workload.offline)
    assert second == first + 1 and workload.skipped == {"labels.offline: longer than rollouts allow": 1}

"""What models read and write is the same text under every kind of tokenizer, whatever that adds to a text by itself."""

import json

import pytest
import torch
from tokenizer_kinds import KINDS, SCORER_WIDTH, TEMPLATE, save_scorer, save_writer, tokenizer_of, written_after
from transformers import LlamaModel

from r2m_async.cli import main
from r2m_async.data.prompts import policy_reads
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.data.special_tokens import ids_after, token_ids
from r2m_async.launch.ring import Ring
from r2m_async.models.generation import sample_groups
from r2m_async.models.loading import load_policy
from r2m_async.models.pretrained import pretrained_tokenizer
from r2m_async.models.tokens import ResponseText, response_ids
from r2m_async.trajectories import Prompt, Ticket

pytestmark = pytest.mark.models

PROMPT, RESPONSE, OTHER = "the old river", "wind", "stone"
of_every_kind = pytest.mark.parametrize("kind", KINDS)
with_all_additions = pytest.mark.parametrize(
    ("bos", "eos"),
    [
        (True, True),
        *(pytest.param(*one, marks=pytest.mark.cross) for one in ((True, False), (False, True), (False, False))),
    ],
    ids=["both", "bos", "eos", "none"],
)
in_both_forms = pytest.mark.parametrize("turns", [True, False], ids=["turns", "raw"])


class Folder:
    """A policy that answers every prompt with RESPONSE, a reward model, and data, in both forms for all commands."""

    def __init__(self, path, kind, bos, eos, turns, side="right"):
        self.path, self.turns, self.bos = path, turns, bos
        tokenizer = tokenizer_of(kind, bos, eos, side, TEMPLATE if turns else None)
        content = (("user", PROMPT),) if turns else PROMPT
        self.prompt = [{"role": "user", "content": PROMPT}] if turns else PROMPT
        # Raw text goes on with a space, and a turn begins without one.
        self.said = RESPONSE if turns else f" {RESPONSE}"
        # Word pieces have no space of their own: between two words there is always one.
        self.written = f" {RESPONSE}" if kind == "word pieces" else self.said
        self.text, _ = policy_reads(content, tokenizer)
        self.policy = save_writer(path / "policy", tokenizer, written_after(tokenizer, self.text, self.said))
        self.reward = save_scorer(path / "reward", tokenizer)
        self.tokenizer = pretrained_tokenizer("model", self.policy)
        other = self.said.replace(RESPONSE, OTHER)
        pair = {"prompt": self.prompt, "chosen": self.said, "rejected": other}
        pool = {"prompt": self.prompt, "responses": [self.said, other], "golds": [0, 1]}
        for name, record in (("pairs", pair), ("pool", pool), ("prompts", {"prompt": self.prompt})):
            (path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 2)
        (path / "rm.yaml").write_text(
            f"run: {{name: rm, device: cpu, output_dir: {path}}}\nmodel: {{start: {self.policy}}}\nlogging: {{live: false}}\n"
            f"data: {{preferences: {path}/pairs.jsonl, held_out: 0.0}}\noptimizer: {{batch_size: 2}}\n"
        )

    def plain(self, ids):
        """The text of tokens without special ones. A space before the first word is the tokenizer's own."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip(" ")

    def run(self, command):
        assert main([word.replace("IN", str(self.path)) for word in command.split()]) == 0, command

    def check_prompt(self, ids):
        """A prompt begins once, does not end, and is the text."""
        self._check_beginning(ids)
        assert self.tokenizer.eos_token_id not in (ids[-1:] if self.turns else ids)
        assert self.plain(ids) == self._as_read(self.text)

    def check_text(self, ids):
        """A prompt with a finished response begins once and ends once. Returns the response."""
        self._check_beginning(ids)
        assert ids.count(self.tokenizer.eos_token_id) == 1 + self.turns
        said = self.said if RESPONSE in self.plain(ids) else self.said.replace(RESPONSE, OTHER)
        # A template writes a line break after a turn.
        assert self.plain(ids).rstrip(" \n") == self._as_read(self.text + said)
        return said

    def _as_read(self, text):
        return self.plain(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_beginning(self, ids):
        bos = self.tokenizer.bos_token_id
        assert ids.count(bos) == (self.bos or self.turns)
        assert (ids[0] == bos) == (self.bos or self.turns)


@pytest.fixture
def read(monkeypatch):
    """The texts that models read: a model's width, and token ids without padding. Of a generation the prompt alone."""
    rows, forward = [], LlamaModel.forward

    def listened(self, input_ids=None, attention_mask=None, **others):
        if others.get("past_key_values") is None or not others["past_key_values"].get_seq_length():
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows.extend(
                (self.config.hidden_size, ids[seen.bool()].tolist()) for ids, seen in zip(input_ids, mask, strict=True)
            )
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **others)

    monkeypatch.setattr(LlamaModel, "forward", listened)
    return rows


@of_every_kind
@in_both_forms
@with_all_additions
def test_every_command_reads_and_writes_the_same_text(kind, turns, bos, eos, tmp_path, read):
    folder = Folder(tmp_path, kind, bos, eos, turns, side="left" if bos else "right")
    texts = {folder.said, folder.said.replace(RESPONSE, OTHER)}
    for command in (
        "reward-model train IN/rm.yaml",
        "reward-model eval IN/reward --pairs IN/pairs.jsonl --out IN/evaluation",
        "bon IN/reward --pool IN/pool.jsonl --n 2 --out IN/bon",
        "policy-states IN/policy --pairs IN/pairs.jsonl --out IN/states",
    ):
        read.clear()
        folder.run(command)
        assert texts == {folder.check_text(ids) for _, ids in read}, command
    read.clear()
    asked = "--prompts IN/prompts.jsonl --format pool --temperature 0" + " --no-chat" * (not turns)
    folder.run(f"eval generate IN/policy {asked} --engine transformers --out IN/said.jsonl")
    for _, ids in read:
        folder.check_prompt(ids)
    answers = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [one["responses"] for one in answers] == [[folder.written]] * 2


@of_every_kind
@pytest.mark.parametrize("turns", [False, pytest.param(True, marks=pytest.mark.cross)], ids=["raw", "turns"])
def test_in_a_ring_the_reward_model_reads_what_the_policy_wrote(kind, turns, tmp_path, read, tiny_config):
    folder = Folder(tmp_path, kind, True, True, turns)
    config = tiny_config.model(policy=folder.policy).reward(model=folder.reward)
    config = config.data(prompts=str(tmp_path / "prompts.jsonl")).rollouts(prompts_per_step=1, max_prompt_tokens=64)
    with Ring.of(config, in_process=True) as ring:
        ring.step()
    scored = [ids for width, ids in read if width == SCORER_WIDTH]
    assert scored and {folder.check_text(ids) for ids in scored} == {folder.said}


def test_a_text_that_loses_its_start_keeps_its_beginning_of_text(tmp_path, read):
    folder = Folder(tmp_path, "bytes", True, False, False)
    bos, limit = folder.tokenizer.bos_token_id, 3
    folder.run(f"policy-states IN/policy --pairs IN/pairs.jsonl --max-tokens {limit} --out IN/states")
    assert read and all(len(ids) == limit and ids[0] == bos for _, ids in read)
    read.clear()
    asked = {"question_id": 1, "category": "math", "turns": [PROMPT, PROMPT]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked))
    _, first = policy_reads((("user", PROMPT),), folder.tokenizer)
    how = f"--format mt_bench --max-prompt-tokens {len(first)} --engine transformers"
    folder.run(f"eval generate IN/policy --prompts IN/asked.jsonl {how} --out IN/said.jsonl")
    assert [ids[0] for _, ids in read] == [bos, bos] and len(read[1][1]) == len(first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_one_batch_have_the_positions_that_each_has_alone(side, tmp_path, tiny_config, monkeypatch):
    folder = Folder(tmp_path, "pieces, first", True, True, False, side)
    model = load_policy(folder.policy, tiny_config)
    tickets = []
    for number, content in enumerate((PROMPT, f"{PROMPT} sings softly and the cold wind falls .")):
        text, ids = policy_reads(content, folder.tokenizer)
        prompt = Prompt(prompt_id="", content=content, text=text, token_ids=tuple(ids))
        tickets.append(Ticket(group_id=number, due_step=0, seed=number, attempt=0, prompt=prompt))
    passes, forward = [], LlamaModel.forward

    def listened(self, *args, position_ids=None, **others):
        passes.append(position_ids)
        return forward(self, *args, position_ids=position_ids, **others)

    monkeypatch.setattr(LlamaModel, "forward", listened)
    config = tiny_config.rollouts(group_size=2, max_new_tokens=4).head(variant="vanilla")
    sample_groups(model, folder.tokenizer, tickets, config, greedy_twin=False, version=0)
    short, long = (len(ticket.prompt.token_ids) for ticket in tickets)
    assert passes[0][0, long - short :].tolist() == list(range(short)) and passes[0][1].tolist() == list(range(long))
    assert passes[1].flatten().tolist() == [short, short, long, long]


@of_every_kind
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_beginning_of_text_that_raw_text_spells_out_is_not_doubled(kind, bos, eos):
    tokenizer = tokenizer_of(kind, bos, eos)
    _, prompt = policy_reads(f"<s>{PROMPT}", tokenizer)
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    for finished in (True, False):
        ids = reward_input_ids(tokenizer, f"<s>{PROMPT}", f" {RESPONSE}", finished)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert (ids[-1] == tokenizer.eos_token_id) == finished and ids.count(tokenizer.eos_token_id) == finished


@of_every_kind
@pytest.mark.parametrize("prompt", ["the old river", "the old ", "who are you ?\n", "a : "])
@pytest.mark.parametrize("response", [" wind", "wind", " one two\nthree", "\none two"])
def test_a_response_given_as_text_is_read_as_that_text(kind, prompt, response):
    tokenizer = tokenizer_of(kind, True, True)
    text, ids = policy_reads(prompt, tokenizer)
    tokens = response_ids(tokenizer, text, ids, response, finished=True)
    read = ResponseText(tokenizer, ids)(tokens)
    # Word pieces and Unigram have no tokens for the white space between words.
    assert read.split() == response.split()
    if kind not in ("word pieces", "unigram"):
        assert read == response


@of_every_kind
def test_a_special_token_that_a_text_spells_out_stays_text(kind):
    tokenizer = tokenizer_of(kind, True, True)
    before = token_ids(tokenizer, PROMPT)
    for text in ("<|end|>", " wind<|end|>wind", "</s>\nwind"):
        ids = ids_after(tokenizer, before, text, special_tokens=False)
        assert not set(ids) & {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
        if kind not in ("word pieces", "unigram"):  # which have no tokens for these signs
            assert ResponseText(tokenizer, before)(ids) == text
        asked = ids_after(tokenizer, before, text)
        assert set(asked) & {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}

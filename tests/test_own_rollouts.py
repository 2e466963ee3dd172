"""Rings whose responses a user's function drives: exact, resumed, aborted, and refused where they cannot run."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import plays
import pytest
import torch
from test_exactness_in_process import assert_same_bits, run_in_process
from transformers import AutoTokenizer

from actors.rollout_actor import RolloutActor
from actors.transformers_engine import TransformersEngine
from r2m_async import reference
from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.data.seeds import ENVIRONMENT, turn_seed
from r2m_async.errors import ConfigError, FunctionFailed, GenerationFailed, NonFiniteStep
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import TicketOffice, resolve, worst_group_bytes
from r2m_async.models import plays as playing
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import token_logprobs
from r2m_async.models.tokens import ResponseText
from r2m_async.models.turns import SampledTurn

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def own(tiny_config):
    config = tiny_config.rollouts(function="plays:in_turns", max_new_tokens=12, max_prompt_tokens=16)
    return config.run(num_steps=2)


def engine_of(config, twin=False) -> tuple[TransformersEngine, list]:
    """An engine and tickets."""
    workload = resolve(config)
    tokenizer = AutoTokenizer.from_pretrained(workload.policy)
    office = TicketOffice(config, workload)
    engine = TransformersEngine(load_policy(workload.policy, config), tokenizer, config, twin)
    return engine, [office.group(group_id, 0) for group_id in range(3)]


def group_of(config, twin=False):
    engine, tickets = engine_of(config, twin)
    return engine.generate(tickets[0])[0]


# Exact


@pytest.mark.parametrize("function", ["in_turns", "once", "mixed", "over_the_limit"])
def test_a_ring_with_a_function_of_the_users_is_algorithm_1_bit_for_bit(own, function):
    assert_same_bits(own.rollouts(function=f"plays:{function}"))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.scheduling(max_policy_age=2, max_head_age=1, lag="exact").rollouts(num_actors=2),
        lambda c: c.advantage(name="gae").objective(ratio="token", num_minibatches=2).learner(packing=True),
        lambda c: c.advantage(name="remax").feedback(source="learner").learner(tokens_per_microbatch=30),
        lambda c: c.head(variant="vanilla").reward(
            model=None, functions={"noted": {"function": "plays:length_of_notes"}}
        ),
    ],
    ids=["exact lag", "gae", "remax", "functions"],
)
def test_it_is_so_with_delays_critics_twins_and_rewards_of_what_was_noted(own, change):
    assert_same_bits(change(own.rollouts(function="plays:mixed")))


def test_a_run_in_which_the_policy_never_writes_ends_as_it_began(own):
    config = own.rollouts(function="plays:writes_alone")
    assert_same_bits(config)
    trained = reference.train(config).policy
    begun = load_policy(config.model.policy, config).state_dict()
    assert all(torch.equal(trained.tensors[name], begun[name]) for name in trained.tensors)


def test_a_resumed_run_ends_with_the_same_bits(own, tmp_path):
    config = own.run(num_steps=4).scheduling(max_policy_age=1, lag="exact")
    with reference.one_thread():
        with Ring.of(config, in_process=True) as ring:
            ring.step()
            ring.step()
            ring.save(tmp_path / "checkpoint")
        with Ring.of(config, in_process=True, resume=tmp_path / "checkpoint") as ring:
            while not ring.finished:
                ring.step()
            policy = ring.policy_weights()
    expected = reference.train(config).policy
    assert all(torch.equal(policy.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_step_tells_the_lengths_of_both_and_the_turns(own):
    config = own.rollouts(function_options={"turns": 2, "tokens": 1}).run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        metrics = ring.step()
    assert metrics["length/mean"] == 2 and metrics["length/turns"] == 2
    assert metrics["length/environment"] > 2 and metrics["throughput/tokens"] == 12


# What a group is


def test_each_token_has_its_writer_its_log_prob_and_its_version(own):
    config = own.rollouts(temperature=0.7, function="plays:mixed")
    engine, tickets = engine_of(config, twin=True)
    engine._version = 5
    group, feedback = engine.generate(tickets[0])
    expected = token_logprobs(engine._model, group.trajectories, config)
    for one, row, states in zip(group.trajectories, expected, feedback.hidden_states, strict=True):
        places = one.written.nonzero().flatten()
        assert one.behaviour_logprobs[places].tolist() == pytest.approx(row[: len(places)].tolist(), abs=1e-4)
        assert not one.behaviour_logprobs[~one.written].any()
        assert one.policy_versions[places].tolist() == [5] * len(places)
        assert (one.policy_versions[~one.written] == -1).all()
        assert len(states) == len(one.token_ids) - 1
    turns, single, alone = group.trajectories
    assert turns.num_turns > 1 and single.num_turns == 1 and alone.num_policy_tokens == 0
    assert alone.text == " one two" and alone.finish_reason == "stop"
    assert single.written[single.prompt_len :].all()
    tokenizer = AutoTokenizer.from_pretrained(config.model.policy)
    prompt, response = turns.token_ids[: turns.prompt_len].tolist(), turns.token_ids[turns.prompt_len :].tolist()
    assert turns.text == ResponseText(tokenizer, prompt)(response)
    assert turns.info.keys() == {"turn 0", "turn 1", "turn 2"}
    # The greedy twin has the index after the last: `mixed` gives it several turns.
    greedy = token_logprobs(engine._model, [group.greedy], config)
    assert group.greedy.num_turns > 1 and greedy.shape[1] == group.greedy.num_policy_tokens
    again, _ = engine.generate(tickets[0])
    assert again.greedy.token_ids.tolist() == group.greedy.token_ids.tolist()


def test_a_group_depends_on_its_ticket_and_not_on_those_before(own):
    engine, tickets = engine_of(own)
    first = [engine.generate(ticket)[0] for ticket in tickets]
    for ticket, before in zip(reversed(tickets), reversed(first), strict=True):
        again, _ = engine.generate(ticket)
        for one, other in zip(again.trajectories, before.trajectories, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert torch.equal(one.behaviour_logprobs, other.behaviour_logprobs)
    assert len({tuple(one.token_ids.tolist()) for one in first[0].trajectories}) == 3


def test_turns_draw_numbers_of_their_own():
    seeds = {turn_seed(2**62, response, turn) for response in range(8) for turn in (*range(20), ENVIRONMENT)}
    assert len(seeds) == 8 * 21 and all(0 <= seed < 2**63 for seed in seeds)
    # Frozen: another derivation would give the runs of old configs other responses.
    assert turn_seed(1, 2, 3) == 2790657571971337169


def test_the_limit_holds_for_both_together_and_ends_the_response(own):
    for limit in (1, 2, 3, 4, 5):
        for one in group_of(own.rollouts(function="plays:over_the_limit", max_new_tokens=limit)).trajectories:
            assert one.num_response_tokens <= limit and one.finish_reason == "length"
            assert one.info == {"ended": True, "finally": True}


@pytest.mark.parametrize(("room", "fits"), [(3, True), (2, False)])
def test_an_append_at_the_limit_fits_whole_or_not_at_all(own, room, fits, monkeypatch):
    async def play(rollout):
        await rollout.generate(max_new_tokens=4)
        plays.SEEN.append(rollout.num_tokens_left)
        rollout.append(" one two three")

    plays.SEEN.clear()
    monkeypatch.setattr(plays, "nothing", play)
    config = own.rollouts(function="plays:nothing", max_new_tokens=4 + room, group_size=2)
    for one in group_of(config).trajectories:
        whole = one.num_policy_tokens < 4 or fits
        assert one.finish_reason == ("length" if one.num_policy_tokens == 4 or not whole else "stop")
        assert (one.num_response_tokens - one.num_policy_tokens) == (3 if whole else 0)
    assert room in plays.SEEN


def test_a_response_may_be_empty(own):
    (one, *_) = group_of(own.rollouts(function="plays:nothing")).trajectories
    assert (one.num_response_tokens, one.text, one.finish_reason, one.num_turns) == (0, "", "stop", 0)


def test_a_stop_string_ends_a_turn_and_its_tokens_are_kept(own, monkeypatch):
    async def play(rollout):
        plays.SEEN.append(await rollout.generate(stop=["zz", "i", "o"]))

    plays.SEEN.clear()
    monkeypatch.setattr(plays, "nothing", play)
    group = group_of(own.rollouts(function="plays:nothing", group_size=8, max_new_tokens=40))
    assert any(turn.stop for turn in plays.SEEN)
    for turn, one in zip(plays.SEEN, group.trajectories, strict=True):
        assert one.token_ids[one.prompt_len :].tolist() == list(turn.token_ids) and one.text == turn.text
        found = [stop for stop in ("i", "o") if stop in turn.text]
        assert (turn.stop in found) if found else turn.stop is None
        if turn.stop:
            tokenizer = AutoTokenizer.from_pretrained(own.model.policy)
            before = tokenizer.decode(turn.token_ids[:-1])
            assert not {"i", "o"} & set(before) and turn.finish_reason == one.finish_reason == "stop"


def test_what_was_sampled_is_never_tokenised_anew(own, monkeypatch):
    """The policy's last token and the text after it would be one token together."""
    tokenizer = AutoTokenizer.from_pretrained(own.model.policy)
    (river,) = tokenizer(" river")["input_ids"]
    letters = [tokenizer(letter)["input_ids"][0] for letter in ("\u0120", "r", "i")]

    async def play(rollout):
        turn = await rollout.generate(max_new_tokens=1)
        plays.SEEN.append((turn.token_ids, turn.text))
        rollout.append("ver")
        rollout.append("")

    plays.SEEN.clear()
    monkeypatch.setattr(plays, "nothing", play)
    for (ids, text), one in zip(
        plays.SEEN, group_of(own.rollouts(function="plays:nothing")).trajectories, strict=False
    ):
        response = one.token_ids[one.prompt_len :].tolist()
        assert response == [*ids, *tokenizer("ver")["input_ids"]] and one.text == text + "ver"
    assert letters and river not in letters


def test_a_special_token_of_an_environment_is_text_unless_it_is_asked_for(own):
    tokenizer = AutoTokenizer.from_pretrained(own.model.policy)
    spelled = tokenizer("</s>", split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in spelled
    for one in group_of(own.rollouts(function="plays:repeats_an_end")).trajectories:
        written = one.token_ids[one.prompt_len :][~one.written[one.prompt_len :]]
        assert written.tolist() == [*spelled, tokenizer.eos_token_id] and one.text.endswith("</s>")


# Evaluations, samples, rewards


def test_an_evaluation_uses_the_function_and_reads_what_it_says(own, tmp_path):
    config = own.rollouts(function="plays:says_its_own").run(num_steps=1, output_dir=str(tmp_path), name="own")
    config = config.head(variant="vanilla").reward(model=None, functions={"noted": {"function": "plays:noted"}})
    config = config.evaluation(every=1, num_prompts=2).logging(live=False, tensorboard=False)
    from r2m_async.launch.training import train

    directory = train(config, in_process=True)
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert samples and {sample["response"] for sample in samples} == {"warm wind"}
    assert {sample["reward"] for sample in samples} == {0.25}
    (first, *_) = [json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    assert first["reward"] == pytest.approx((0.25 + 1.25 + 2.25) / 3)


# Abort


def aborted_once_begun(engine, ticket):
    """What the engine makes of a group that is aborted after its function has begun."""
    made = []
    thread = threading.Thread(target=lambda: made.append(engine.generate(ticket)))
    thread.start()
    assert plays.STARTED.wait(60)
    engine.abort(ticket.group_id, ticket.attempt)
    thread.join(60)
    assert made, "the engine did not return"
    return made[0]


def test_an_abort_ends_a_function_that_waits_and_lets_its_finally_run(own):
    plays.STARTED.clear()
    plays.SEEN.clear()
    engine, tickets = engine_of(own.rollouts(function="plays:hangs"))
    group, feedback = aborted_once_begun(engine, tickets[0])
    assert plays.SEEN == ["finally"] and feedback is None
    assert [one.finish_reason for one in group.trajectories] == ["abort"] * 3
    assert [one.num_response_tokens for one in group.trajectories] == [1, 0, 0]
    report, cut, _ = RolloutActor(engine, 4)._reported(tickets[0], group, None)
    assert report.num_responses == 0 and report.num_tokens == 1 and cut.trajectories == ()


def test_a_function_that_blocks_the_loop_is_left_behind(own):
    for event in (plays.STARTED, plays.GO_ON):
        event.clear()
    plays.SEEN.clear()
    engine, tickets = engine_of(own.rollouts(function="plays:blocks"))
    group, _ = aborted_once_begun(engine, tickets[0])
    assert group.trajectories[0].num_response_tokens == 1 and plays.SEEN == []
    plays.GO_ON.set()
    # The loop is free again, and what was left behind can write nothing more.
    once = engine_of(own.rollouts(function="plays:once"))
    assert once[0].generate(once[1][0])[0].trajectories[0].num_policy_tokens > 0
    assert plays.SEEN[0] == "went on" and group.trajectories[0].num_response_tokens == 1


def test_an_abort_within_a_turn_keeps_the_tokens_that_there_are(own, monkeypatch):
    engine, tickets = engine_of(own.rollouts(function="plays:once", max_new_tokens=64))
    drawn = []

    def aborted(ticket):
        drawn.append(ticket)
        return len(drawn) > 4

    monkeypatch.setattr(engine, "_is_aborted", aborted)
    group, _ = engine.generate(tickets[0])
    (first, *_) = group.trajectories
    assert first.finish_reason == "abort" and 0 < first.num_policy_tokens < 5


def test_a_function_may_change_the_columns_and_the_options_that_it_is_given(own):
    plays.SEEN.clear()
    config = own.rollouts(function="plays:changes_its_columns", function_options={"words": []})
    engine, (ticket, *_) = engine_of(config)
    ticket = replace(ticket, prompt=replace(ticket.prompt, columns={"cases": []}))
    engine.generate(ticket)
    assert [([0], [index]) for index in range(3)] == plays.SEEN and ticket.prompt.columns == {"cases": []}


def test_a_turn_that_comes_after_its_group_has_ended_is_not_written(own, monkeypatch):
    """The engine may still sample it while the trajectory is made."""
    monkeypatch.setattr(playing, "_LAST_WORDS", 0.05)
    plays.SEEN.clear()
    config, asked = own.rollouts(function="plays:shows_itself"), []
    engine, tickets = engine_of(config)
    playing.play_group(
        playing.rollout_function(config),
        tickets[0],
        lambda request, tell: asked.append(tell),
        tokenizer=engine._tokenizer,
        ends=[1],
        twin=False,
        config=config,
        aborted=lambda: bool(asked),
    )
    asked[0](SampledTurn(token_ids=[40], logprobs=[-1.0], versions=[0], finish_reason="stop", stop=None))
    assert plays.SEEN[0].response == "" and plays.SEEN[0].num_tokens_left == config.rollouts.max_new_tokens


# Failures


def test_a_turn_that_is_cut_off_though_nobody_aborted_it_fails_its_group(own):
    """Else the function would wait for ever for a turn that has ended."""
    config = own.rollouts(function="plays:shows_itself")
    engine, tickets = engine_of(config)
    cut = SampledTurn(token_ids=[], logprobs=[], versions=[], finish_reason="abort", stop=None)
    with pytest.raises(GenerationFailed, match="response 0: the engine ended a turn that nobody had aborted"):
        playing.play_group(
            playing.rollout_function(config),
            tickets[0],
            lambda request, tell: tell(cut),
            tokenizer=engine._tokenizer,
            ends=[1],
            twin=False,
            config=config,
        )


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", r"raised KeyError: 'my tool broke'\nTraceback .*\n  File .*plays.py.*, in raises\n"),
        ("leaves", "raised SystemExit: 3"),
        ("cancels_itself", "was cancelled by itself"),
        ("returns", r"returned 0.5 \(float\): it must return nothing; note what you have found in rollout.info"),
        (
            "notes_what_is_no_json",
            r"left <object object at 0x.*> \(object\) in rollout.info\['tool'\]\['a'\]\[0\]: it may",
        ),
        ("notes_too_much", "left 2.... bytes in rollout.info: it may have 16384; keep less"),
        ("notes_itself", "left something in rollout.info that cannot be kept: RecursionError"),
        ("writes_too_long_a_text", "set a rollout.text of 20000 characters: it may have 3072 bytes"),
        ("two_turns_at_once", "raised RuntimeError: generate was called while a turn is being generated: await"),
        ("leaves_a_turn_alone", "returned while a turn was being generated: await rollout.generate"),
        (
            "with_messages",
            "raised ValueError: append_messages was called and the prompt is raw text, which has no turns",
        ),
    ],
)
def test_a_function_that_fails_ends_the_run_with_place_key_and_the_users_traceback(own, function, says):
    with pytest.raises(
        FunctionFailed, match=rf"(?s)^step 0, group 0 .*, response 0: rollouts.function 'plays:.*{says}"
    ):
        group_of(own.rollouts(function=f"plays:{function}"))


def test_a_failure_on_the_way_reaches_the_rings_caller(own):
    with pytest.raises(FunctionFailed, match="response 0: rollouts.function 'plays:raises' raised KeyError"):
        run_in_process(own.rollouts(function="plays:raises"))


def test_a_function_that_takes_too_long_is_told_of_and_what_the_policy_samples_is_not_counted(own):
    with pytest.raises(FunctionFailed, match="took longer than rollouts.function_timeout 0.1 s, what the policy"):
        group_of(own.rollouts(function="plays:takes_its_time", function_timeout=0.1))
    engine, tickets = engine_of(own.rollouts(function="plays:once", function_timeout=0.25))
    generate = engine._model.generate

    def slowly(*args, **kwargs):
        threading.Event().wait(0.3)
        return generate(*args, **kwargs)

    engine._model.generate = slowly
    assert engine.generate(tickets[0])[0].trajectories[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("hangs", r"response 0: .* took longer .*; it waits at \S+plays.py:(\d+); raise it"),
        (
            "blocks",
            r"response \d: .* took longer .*; step 0, group 0 .*, response 0 holds the event loop at \S+plays.py:(\d+);",
        ),
    ],
)
def test_a_function_that_takes_too_long_is_told_of_with_the_line_at_which_it_stands(own, function, says):
    for event in (plays.STARTED, plays.GO_ON):
        event.clear()
    with pytest.raises(FunctionFailed, match=says) as failed:
        group_of(own.rollouts(function=f"plays:{function}", function_timeout=0.3))
    plays.GO_ON.set()
    line = Path(plays.__file__).read_text().splitlines()[int(re.search(says, str(failed.value))[1]) - 1]
    assert line.strip() == {"hangs": "await asyncio.Event().wait()", "blocks": "GO_ON.wait()"}[function]


def test_a_policy_without_probabilities_is_told_of_with_its_place_in_the_whole_response(own):
    engine, tickets = engine_of(own.rollouts(function="plays:in_turns"))
    generate, turns = engine._model.generate, []

    def broken(*args, **kwargs):
        turns.append(kwargs["input_ids"].shape[1])
        if len(turns) == 2:
            engine._model.get_output_embeddings().weight.data.fill_(float("nan"))
        return generate(*args, **kwargs)

    engine._model.generate = broken
    with pytest.raises(NonFiniteStep) as failed:
        engine.generate(tickets[0])
    place = turns[1] - len(tickets[0].prompt.token_ids)
    assert f"response 0: the policy (version 0) gives no finite probability at response token {place}:" in str(
        failed.value
    )


# What is refused before anything starts


@pytest.mark.parametrize(
    ("rollouts", "says"),
    [
        ({"function": "plays:plain"}, "'plays:plain' is no coroutine function: .*define it with `async def`"),
        ({"function": "plays:absent"}, "module 'plays' has no callable 'absent'"),
        ({"function": "nowhere:play"}, "cannot import module 'nowhere'"),
        (
            {"function": "plays:in_turns", "function_options": {"turn": 2}},
            r"rollouts.function_options.turn is unknown to plays:in_turns; did you mean 'turns'\?. It accepts: turns,",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_by_check_and_train_alike(own, tmp_path, capsys, rollouts, says):
    config = own.rollouts(**rollouts)
    with pytest.raises(ConfigError, match=says):
        Ring.of(config, in_process=True)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert main(["check", str(path)]) != 0
    assert "rollouts.function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rollouts", "says"),
    [
        ({"function_options": {"turns": 1}}, "rollouts.function_options is .* and rollouts.function is None"),
        ({"function_timeout": 5.0}, "rollouts.function_timeout is 5.0 and rollouts.function is None"),
        ({"function": "m:f", "hang_after": 600.0}, "function_timeout is 600 and rollouts.hang_after is 600: an actor"),
        ({"function": "m:f", "concurrent_groups": 2}, "concurrent_groups is 2 and rollouts.function is 'm:f'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(rollouts, says):
    with pytest.raises(ConfigError, match=says):
        R2MConfig().rollouts(**rollouts)


def test_a_reward_function_may_ask_for_what_was_noted_only_if_somebody_notes(own):
    functions = {"noted": {"function": "plays:noted"}}
    resolve(own.reward(functions=functions))
    with pytest.raises(ConfigError, match="asks for 'info', and .* has no such column"):
        resolve(own.rollouts(function=None).reward(functions=functions))


def test_check_shows_the_first_prompt_and_room_is_kept_for_what_is_noted(own, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(own.to_yaml())
    assert main(["check", str(path)]) == 0
    assert "the policy reads" in capsys.readouterr().out
    more = worst_group_bytes(own, 32, 48, False) - worst_group_bytes(own.rollouts(function=None), 32, 48, False)
    assert more == 3 * (16384 + 28)

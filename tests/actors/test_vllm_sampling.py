"""What a vLLM engine samples: from which distribution, with which log-probabilities, and where responses end."""

import dataclasses
import json
from collections import Counter
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import config_of, logprob_error, running, ticket_of

from r2m_async.models.loading import load_policy


def decoded(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
def pair_probabilities(model, tokens, ends, temperature):
    """[V, V + 1] float64: of the first two tokens; in the last column of those that end with the first."""
    prompt = torch.tensor([tokens])
    first = (model(prompt).logits[0, -1].double() / temperature).softmax(-1)
    both = torch.cat([prompt.repeat(len(first), 1), torch.arange(len(first))[:, None]], 1)
    second = (model(both).logits[:, -1].double() / temperature).softmax(-1)
    table = torch.cat([first[:, None] * second, torch.zeros(len(first), 1)], 1)
    for end in ends:
        table[end] = 0
        table[end, -1] = first[end]
    return table


def p_value(counts, probabilities):
    """Of chi-square; cells that expect fewer than 5 draws count as one."""
    from scipy.stats import chisquare

    expected, observed = (probabilities * counts.sum()).flatten(), counts.flatten().double()
    expected, order = expected.sort(descending=True)
    observed = observed[order]
    cells = int((expected >= 5).sum())
    assert cells >= 2, "too few draws to tell anything"
    expected, observed = (torch.cat([x[:cells], x[cells:].sum()[None]]).numpy() for x in (expected, observed))
    if expected[-1] < 5:
        expected, observed = (np.append(x[:-2], x[-2:].sum()) for x in (expected, observed))
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.ring
@pytest.mark.parametrize(
    "temperature", [pytest.param(0.3, marks=pytest.mark.cross), 0.7, pytest.param(1.3, marks=pytest.mark.cross)]
)
def test_tokens_are_drawn_from_the_distribution_whose_log_probs_are_reported(checkpoint, temperature):
    ends = (1, 40)
    config = config_of(
        checkpoint(spread=3.0, ends=ends), group_size=128, max_new_tokens=2, temperature=temperature
    ).rollouts(concurrent_groups=2)
    model, prompt = load_policy(config.model.policy, config), ticket_of(0).prompt
    table = pair_probabilities(model, prompt.token_ids, ends, temperature)
    counts = torch.zeros_like(table)
    with running(config, model=model) as engine:
        for group_id in range(40):
            whole, _ = engine.generate(dataclasses.replace(ticket_of(group_id), prompt=prompt))
            for trajectory in whole.trajectories:
                first, second = [*trajectory.token_ids[5:].tolist(), -1][:2]
                counts[first, second] += 1
                reported = trajectory.behaviour_logprobs[5:].double().sum().item()
                assert reported == pytest.approx(table[first, second].log().item(), abs=1e-4)
    assert counts.sum() == 40 * 128
    for merge in (lambda x: x.sum(1), lambda x: x.sum(0), lambda x: x):
        assert p_value(merge(counts), merge(table)) > 1e-4
    warmer = pair_probabilities(model, prompt.token_ids, ends, 1.3 * temperature)
    for merge in (lambda x: x.sum(1), lambda x: x):  # these draws would have told
        assert p_value(merge(counts), merge(warmer)) < 1e-9


@pytest.mark.ring
def test_log_probs_are_transformers_and_responses_end_where_they_say(checkpoint):
    ends = (1, 40, 90, 170, 230)
    config = config_of(checkpoint(ends=ends), group_size=8, max_new_tokens=40, temperature=1.3)
    model, reasons, num_ends = load_policy(config.model.policy, config), Counter(), Counter()
    with running(config, model=model) as engine:
        for group_id in range(4):
            whole, _ = engine.generate(ticket_of(group_id))
            assert whole.ticket == ticket_of(group_id)
            assert logprob_error(model, whole.trajectories, config) < 1e-5
            for one in (*whole.trajectories, whole.greedy):
                response = one.token_ids[one.prompt_len :].tolist()
                assert tuple(one.token_ids[: one.prompt_len].tolist()) == whole.ticket.prompt.token_ids
                assert not set(response[:-1]) & set(ends)
                assert one.finish_reason == ("stop" if response[-1] in ends else "length")
                assert one.finish_reason == "stop" or len(response) == 40
                read, start = (
                    decoded(engine._tokenizer, ids) for ids in (one.token_ids, one.token_ids[: one.prompt_len])
                )
                assert read == commonprefix([read, start]) + one.text  # noqa: RUF071 (by characters is meant)
                assert one.behaviour_logprobs[: one.prompt_len].eq(0).all()
                reasons[one.finish_reason] += 1
                num_ends[response[-1]] += response[-1] in ends
            assert len({tuple(one.token_ids.tolist()) for one in whole.trajectories}) == 8, "siblings drew the same"
    assert reasons["stop"] > 3 and reasons["length"] > 3
    assert sum(count > 0 for count in num_ends.values()) > 2, "every end-of-text token counts, not only the first"


@pytest.mark.ring
def test_the_twin_takes_the_likeliest_token_every_time(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, _ = engine.generate(ticket_of(0))
    with torch.no_grad():
        logits = model(whole.greedy.token_ids[None]).logits[0, 4:-1]
    assert torch.equal(logits.argmax(-1), whole.greedy.token_ids[5:])
    assert not torch.equal(whole.greedy.token_ids, whole.trajectories[0].token_ids)


@pytest.mark.ring
def test_a_checkpoints_own_sampling_settings_change_nothing(checkpoint, tmp_path):
    plain = checkpoint()
    spiced = tmp_path / "spiced"
    spiced.mkdir()
    for file in Path(plain).iterdir():
        (spiced / file.name).write_bytes(file.read_bytes())
    settings = {"repetition_penalty": 5.0, "top_k": 2, "top_p": 0.5, "temperature": 0.1, "do_sample": True}
    own = json.loads((spiced / "generation_config.json").read_text())
    (spiced / "generation_config.json").write_text(json.dumps(own | settings))
    drawn = []
    for path in (plain, str(spiced)):
        config = config_of(path)
        model = load_policy(path, config)
        with running(config, model=model) as engine:
            whole, _ = engine.generate(ticket_of(0))
        assert logprob_error(model, whole.trajectories, config) < 1e-5
        drawn.append([one.token_ids.tolist() for one in (*whole.trajectories, whole.greedy)])
    assert drawn[0] == drawn[1]


@pytest.mark.ring
def test_the_same_tickets_give_the_same_bits_whatever_came_before(checkpoint):
    config = config_of(checkpoint(), group_size=4)
    model = load_policy(config.model.policy, config)

    def bits(group_ids):
        with running(config, model=model) as engine:
            found = {group_id: engine.generate(ticket_of(group_id, 3 + group_id)) for group_id in group_ids}
        return {
            group_id: [
                *(one.token_ids for one in (*whole.trajectories, whole.greedy)),
                *(one.behaviour_logprobs for one in (*whole.trajectories, whole.greedy)),
                *(*feedback.hidden_states, feedback.greedy),
            ]
            for group_id, (whole, feedback) in found.items()
        }

    first = bits([0, 1, 2, 3])
    for other in (bits([0, 1, 2, 3]), bits([3, 1]), bits([2])):
        for group_id, tensors in other.items():
            assert len(tensors) == len(first[group_id]) == 15
            assert all(torch.equal(one, two) for one, two in zip(tensors, first[group_id], strict=True)), group_id
    assert not torch.equal(first[0][0][3:], first[1][0][4:])

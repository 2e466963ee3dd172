"""A run with labels on disk: its files, its end and its resumption, and its labels as pairs for a reward model."""

import os
import shutil
import signal

import pytest
from rings import assert_same_bits

from r2m_async import reference
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, StageLost
from r2m_async.launch.ring import Ring
from r2m_async.launch.training import resume, train
from r2m_async.launch.workload import check_functions
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import given_pairs
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.records import read_records

STEPS = 5


def wants_more(first, second, answer, colour="red"): ...


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    config = tiny_config.run(num_steps=STEPS, output_dir=str(tmp_path_factory.mktemp("runs")))
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag="exact").checkpoint(every=1, keep=STEPS)
    config = config.labels(source="labelled:longer", budget=2, wait=True, max_age=2, replay=2)
    with one_thread():
        return train(config, in_process=True)


@pytest.mark.ring
@pytest.mark.parametrize("step", [1, 3])
def test_resumed_with_labels_under_way_a_run_ends_with_the_same_bits_and_the_same_labels(finished, tmp_path, step):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for checkpoint in checkpoints(run)[step:]:
        shutil.rmtree(checkpoint)
    with one_thread():
        resume(run, [], in_process=True)
    ends = [checkpoint_path(one, STEPS) for one in (run, finished)]
    assert len({(end / "head_learner.msgpack").read_bytes() for end in ends}) == 1
    assert len({(end / "labeller.msgpack").read_bytes() for end in ends}) == 1
    for name in ("labels.jsonl", "labels_void.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    cut = (run / "labels_cut.jsonl").read_text().splitlines()
    assert cut == (run / "labels.jsonl").read_text().splitlines()[-len(cut) :] and cut
    counts = [
        {key: value for key, value in record.items() if key.startswith(("labels/", "age/label"))}
        for one in (run, finished)
        for record in read_records(one / "metrics.jsonl")
    ]
    assert counts[:STEPS] == counts[STEPS:]


@pytest.mark.ring
def test_every_pair_that_was_asked_about_is_in_one_file_with_its_age_and_who_labelled_it(finished):
    labels, void = (read_records(finished / name) for name in ("labels.jsonl", "labels_void.jsonl"))
    assert labels and void
    assert {record["age"] for record in (*labels, *void)} == {2.0} and {one["who"] for one in labels} == {
        "labelled:longer"
    }
    assert {record["reason"] for record in void} == {"tie"}
    assert all(len(one["chosen"].split()) > len(one["rejected"].split()) for one in labels)
    last = read_records(finished / "metrics.jsonl")[-1]
    head = read_records(finished / "metrics.jsonl")[-1]["head/step"]
    assert last["labels/asked"] == last["labels/used"] + last["labels/waiting"] + last["labels/voided"] == 2 * head
    # The metrics of a step are those of the newest update that has ended; the files have the last one's, too.
    assert len(labels) + len(void) == 2 * (STEPS - 2)


@pytest.mark.ring
def test_a_reward_model_is_trained_on_the_labels_of_a_run(finished):
    config = RewardModelConfig.from_dict({"data": {"preferences": "embedded"}})
    pairs = given_pairs(str(finished / "labels.jsonl"), config)
    labels = read_records(finished / "labels.jsonl")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (label["prompt"], label["chosen"], label["rejected"]) for label in labels
    ]
    assert [pair.chosen_finished for pair in pairs] == [label["chosen_finished"] for label in labels]


def test_a_source_that_cannot_be_asked_is_refused_before_the_run(tiny_config):
    for source, options, message in (
        (f"{__name__}:nobody", {}, f"module '{__name__}' has no callable 'nobody'"),
        ("labelled:longer", {"second": "x"}, "labels.options has 'second', which the source is given for each pair"),
        (
            "labelled:longer",
            {"sekond": 1},
            "labels.options has 'sekond' and labelled:longer has no such parameter",
        ),
        ("r2m_async.labels:by_score", {"score": f"{__name__}:nothing"}, f"labels.options.score = '{__name__}:nothing'"),
        ("r2m_async.labels:by_score", {}, "missing 1 required positional argument: 'score'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_functions(tiny_config.labels(source=source, options=options, budget=2))


@pytest.mark.models
def test_a_column_that_the_source_asks_for_and_the_data_does_not_have_is_refused(tiny_config):
    from r2m_async.launch.workload import resolve

    config = tiny_config.labels(source=f"{__name__}:wants_more", budget=2)
    with pytest.raises(ConfigError, match="asks for 'answer', and .*prompts.jsonl:1 has no such column"):
        resolve(config)
    resolve(config.labels(options={"answer": "yes"}))


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_on_ray_late_labels_are_the_references_bit_for_bit_and_a_lost_labeller_ends_the_run_by_name(tiny_config):
    config = tiny_config.run(num_steps=5).scheduling(max_policy_age=1, max_head_age=1, lag="exact")
    config = config.labels(source="labelled:longer", budget=2, wait=True, max_age=1, replay=2)
    with Ring.of(config) as ring:
        while not ring.finished:
            ring.step()
        ring.drain()
        assert_same_bits(ring, reference.train(config))
        records = ring.controller.take_labels()
        assert {record["age"] for record in records} == {1} and len(records) == 8
    with Ring.of(config) as ring:
        ring.step()
        os.kill(ring.process_ids()["labeller"][0], signal.SIGKILL)
        with pytest.raises(StageLost, match="labeller was lost during"):
            while not ring.finished:
                ring.step()
            ring.drain()

"""How policy versions reach vLLM: the choice of a transport, channels and their deadlines, and a ring that uses gloo."""

import os
import signal
import socket
import threading
import types

import psutil
import pytest
import torch

from learners.weight_sender import WeightSender
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.export import export
from r2m_async.launch.gpus import gpu_share, placed
from r2m_async.launch.ring import Ring
from r2m_async.models.loading import load_policy
from r2m_async.models.weights import tensor_digest


def config_of(**rollouts) -> R2MConfig:
    return R2MConfig.from_dict({"rollouts": {"engine": "vllm", **rollouts}, "run": {"device": "auto"}})


@pytest.mark.parametrize(
    ("gpus", "available", "transport"),
    [(0.0, 0, "object_store"), (0.33, 1, "ipc"), (0.5, 2, "object_store"), (1.0, 8, "nccl")],
)
def test_auto_takes_what_the_gpus_allow(gpus, available, transport):
    assert placed(config_of(), gpus, available).weights.transport == transport


@pytest.mark.parametrize(("gpus", "available", "transport"), [(0.0, 0, "nccl"), (0.5, 2, "ipc"), (0.33, 1, "nccl")])
def test_a_transport_that_the_gpus_do_not_have_is_refused(gpus, available, transport):
    with pytest.raises(ConfigError, match=f"weights.transport is '{transport}', and each stage has {gpus:g} of"):
        placed(config_of().weights(transport=transport), gpus, available)


@pytest.mark.parametrize(("available", "share"), [(1, 0.33), (2, 0.5), (3, 1.0)])
def test_parts_of_gpus_fill_whole_ones(available, share):
    """Three users: an actor, the annotator, the learner."""
    assert gpu_share(config_of(), available) == share


def test_auto_keeps_to_the_object_store_where_old_versions_are_needed_or_nothing_receives():
    assert placed(config_of().scheduling(lag="exact"), 1.0, 8).weights.transport == "object_store"
    assert placed(config_of(engine="transformers"), 1.0, 8).weights.transport == "object_store"


def test_a_chosen_transport_stays_and_a_shared_gpu_bounds_vllms_memory():
    config = config_of().weights(transport="gloo")
    assert placed(config, 1.0, 8).weights.transport == "gloo"
    assert placed(config, 0.5, 2).rollouts.engine_options == {"gpu_memory_utilization": 0.45}
    chosen = config.rollouts(engine_options={"gpu_memory_utilization": 0.2})
    assert placed(chosen, 0.5, 2).rollouts.engine_options == {"gpu_memory_utilization": 0.2}


def test_an_engine_of_several_ranks_needs_whole_gpus():
    config = config_of(num_actors=2, tensor_parallel=2)
    assert gpu_share(config, 6) == 1.0
    with pytest.raises(
        ConfigError, match=r"rollouts.tensor_parallel is 2 and the cluster has 4 GPUs: .* needs 6 GPUs; lower"
    ):
        gpu_share(config, 4)


def test_a_learner_of_several_ranks_needs_whole_gpus_and_a_load_that_can_be_taken_off():
    config = R2MConfig(learner={"backend": "deepspeed", "num_ranks": 4, "zero_stage": 3})
    assert gpu_share(config, 6) == 1.0
    with pytest.raises(ConfigError, match=r"learner.num_ranks is 4 and the cluster has 5 GPUs: .* needs 6 GPUs; lower"):
        gpu_share(config, 5)
    with pytest.raises(ConfigError, match=r"learner.offload is 'params' and the run has no GPU"):
        placed(config.learner(offload="params"), 0.0, 0)
    assert placed(config.learner(offload="params"), 1.0, 8).learner.offload == "params"


def test_direct_transports_are_refused_where_they_cannot_work(tiny_config):
    with pytest.raises(
        ConfigError,
        match="weights.transport is 'gloo' and rollouts.engine is 'transformers': with this transport the learner sends weights to the engine itself, and only vLLM",
    ):
        tiny_config.weights(transport="gloo")
    with pytest.raises(
        ConfigError, match="scheduling.lag is 'exact': lag 'exact' generates with older versions, and with this"
    ):
        config_of().scheduling(lag="exact").weights(transport="nccl")


@pytest.mark.models
def test_in_one_process_a_direct_transport_is_refused(vllm_config):
    with pytest.raises(ConfigError, match="weights.transport is 'gloo' and all stages run in one process"):
        Ring.of(vllm_config.weights(transport="gloo"), in_process=True)


# The learner's end alone


def sender(timeout: float, **scheduling) -> WeightSender:
    return WeightSender(config_of().weights(transport="gloo", timeout=timeout).scheduling(**scheduling))


def test_a_peer_that_never_joins_is_an_error_after_the_deadline():
    alone = sender(timeout=1.0)
    alone.open(0)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        alone.connect(0)


def tied(vocabulary: int, width: int) -> torch.nn.Module:
    """An embedding and a head with one weight, which is one parameter of two modules."""
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary, width), torch.nn.Linear(width, vocabulary))
    model[1].weight = model[0].weight
    return model


MODELS = {
    "one small layer": lambda: torch.nn.Linear(3, 2),
    "many tiny parameters": lambda: torch.nn.ParameterList(torch.randn(1 + index % 7) for index in range(300)),
    "one larger than a bucket between small ones": lambda: torch.nn.ParameterList(
        torch.randn(*shape) for shape in [(5,), (3,), (41, 31), (1,), (64,), (65,)]
    ),
    "tied weights": lambda: tied(37, 5),
    "bfloat16 of odd sizes": lambda: torch.nn.Sequential(*(torch.nn.Linear(7, 9) for _ in range(9))).bfloat16(),
}


@pytest.fixture(params=[pytest.param(1 << 10, id="small buckets"), pytest.param(32 << 20, id="one bucket")])
def bucket(request, monkeypatch) -> None:
    monkeypatch.setattr("r2m_async.models.weights._BUCKET", request.param)


class Taker:
    """A model that keeps what it is given to load."""

    def __init__(self):
        self.taken = {}

    def load_weights(self, weights):
        self.taken |= {name: tensor.clone() for name, tensor in weights}


def transferred(ours: WeightSender, layout: dict, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    """Sends version 7 to an engine's end of the transport in another thread. Returns what its model was given."""
    from actors.vllm_weights import GlooInit, GlooTransfer, GlooUpdate

    end = GlooTransfer.__new__(GlooTransfer)  # what vLLM's constructor asks of a device is not needed here
    end.model, end.parallel_config = Taker(), types.SimpleNamespace(rank=0)
    channel = ours.open(0)

    def send():
        ours.connect(0)
        ours.send(0, 7)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        end.init_transfer_engine(GlooInit(**channel))
        end.receive_weights(GlooUpdate(**layout, digests=digests))
    finally:
        sending.join(20)
    assert not end._missing
    return end.model.taken


@pytest.mark.models
@pytest.mark.parametrize("kind", MODELS)
def test_an_engine_receives_every_parameter_as_it_was_staged(kind, bucket):
    ours, model = sender(timeout=20.0), MODELS[kind]()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layout = ours.stage(model, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # training goes on; what was staged does not move
    taken = transferred(ours, layout, {name: tensor_digest(tensor) for name, tensor in before.items()})
    assert list(taken) == list(before)
    for name, tensor in before.items():
        assert taken[name].dtype == tensor.dtype and torch.equal(taken[name], tensor), name


@pytest.mark.models
def test_a_bit_that_flips_in_a_bucket_is_refused_by_the_name_of_its_parameter(bucket):
    model = MODELS["one larger than a bucket between small ones"]()
    for name, parameter in model.named_parameters():
        ours = sender(timeout=20.0)
        layout = ours.stage(model, 7)
        digests = {one: tensor_digest(tensor) for one, tensor in ours.staged(7).items()}
        ours.staged(7)[name].view(-1).view(torch.uint8)[parameter.nbytes - 1] ^= 1
        with pytest.raises(RuntimeError, match=f"^{name} did not arrive as it was sent$"):
            transferred(ours, layout, digests)


def test_as_many_versions_stay_staged_as_an_evaluation_may_lag_behind():
    ours = sender(timeout=1.0, max_policy_age=1)
    for version in range(5):
        ours.stage(torch.nn.Linear(1, 1), version)
    with pytest.raises(
        RuntimeError, match=r"policy version 1 is no longer kept for sending; the versions kept are \[2, 3, 4\]"
    ):
        ours.send(0, 1)


def test_a_version_that_is_dropped_while_it_is_looked_up_is_still_sent_or_an_error_of_the_engine():
    """Training stages versions from another thread than sends."""
    ours, sent = sender(timeout=1.0), []
    ours._channels[0] = types.SimpleNamespace(send=lambda tensors: sent.append(tensors) or {})

    class SwappedMeanwhile(dict):
        def __contains__(self, version):
            found = super().__contains__(version)
            for later in range(100, 105):
                ours.stage(torch.nn.Linear(1, 1), later)
            return found

    for version in (7, 8):
        ours._staged = SwappedMeanwhile({7: {"w": torch.ones(1)}})
        if version == 7:
            assert ours.send(0, 7) == {} and sent == [{"w": torch.ones(1)}]
        else:
            with pytest.raises(
                RuntimeError, match=r"policy version 8 is no longer kept for sending; the versions kept are \[7\]"
            ):
                ours.send(0, 8)
    with pytest.raises(
        RuntimeError, match=r"policy version 7 is no longer kept for sending; the versions kept are \[103, 104\]"
    ):
        ours.staged(7)


@pytest.mark.models
def test_the_port_of_an_nccl_channel_is_held_from_its_announcement_until_all_have_met_there():
    from vllm.distributed.utils import StatelessProcessGroup

    ours = WeightSender(config_of().weights(transport="nccl", timeout=30.0))
    info = ours.open(0)
    place = (info["master_address"], info["master_port"])
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(place)
    told = []

    def join():
        peer = StatelessProcessGroup.create(*place, rank=1, world_size=2, store_timeout=30)
        told.append(peer.broadcast_obj(None, src=0))

    joining = threading.Thread(target=join)
    joining.start()
    meeting = ours._channels[0]._meet()
    meeting.broadcast_obj("met", src=0)
    joining.join(30)
    assert told == ["met"]
    again = ours.open(0)  # the engine was started anew: the old channel's port is free
    assert again["master_port"] != info["master_port"]


@pytest.mark.models
def test_a_channel_that_nobody_joined_lets_its_port_go_and_misses_its_deadline():
    ours = WeightSender(config_of().weights(transport="nccl", timeout=1.0))
    info = ours.open(0)
    ours.open(0)
    with socket.socket() as other:
        other.bind((info["master_address"], info["master_port"]))
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        ours._channels[0]._meet()


@pytest.mark.models
def test_what_the_learner_tells_nccl_and_ipc_engines_is_what_vllms_engines_take():
    from actors.vllm_weights import CheckedIPC, CheckedNCCL

    layout = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]], "digests": {"w": "0"}}
    nccl = WeightSender(config_of(tensor_parallel=2).weights(transport="nccl"))
    info = CheckedNCCL.init_info_cls(**nccl.open(0))
    assert (info.world_size, info.rank_offset, info.packed) == (3, 1, True)
    assert CheckedNCCL.update_info_cls(**layout).shapes == [[2, 3]]
    ipc = WeightSender(config_of().weights(transport="ipc"))
    assert CheckedIPC.init_info_cls(**ipc.open(0)).packed is False
    assert CheckedIPC.update_info_cls(**layout, ipc_handles=[{}]).digests == {"w": "0"}


@pytest.mark.ring
def test_an_engine_of_two_ranks_takes_weights_and_gives_states_as_one_does(vllm_config):
    """Real tensor parallelism, two workers on the CPU; the learner's end stands in another thread."""
    from transformers import AutoTokenizer

    from actors.vllm_engine import VLLMEngine
    from r2m_async.models.loading import load_policy
    from r2m_async.models.policy import group_feedback, token_logprobs
    from r2m_async.models.weights import weight_probe
    from r2m_async.trajectories import Prompt, Ticket, Weights

    config = (
        vllm_config.rollouts(tensor_parallel=2).scheduling(max_policy_age=1).weights(transport="gloo", timeout=60.0)
    )
    path = config.model.policy
    model, ours = load_policy(path, config), WeightSender(config)
    engine = VLLMEngine(path, AutoTokenizer.from_pretrained(path), 64, config, True)
    try:
        connecting = threading.Thread(target=engine.join, args=(ours.open(0),))
        connecting.start()
        ours.connect(0)
        connecting.join()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        header = Weights(version=1, tensors={}, probe=weight_probe(model), layout=ours.stage(model, 1))
        sending = threading.Thread(target=ours.send, args=(0, 1))
        sending.start()
        engine.load(header)
        sending.join()
        prompt = Prompt(prompt_id="x", content="x", text="x", token_ids=(5, 6, 7, 8, 9))
        group, feedback = engine.generate(Ticket(group_id=0, due_step=0, seed=1, attempt=0, prompt=prompt))
        expected = group_feedback(model, group, config, 1)
        for states, others in zip(feedback.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(states, others, atol=1e-4, rtol=0)
        logprobs = token_logprobs(model, group.trajectories, config)
        for row, one in zip(logprobs, group.trajectories, strict=True):
            own = one.behaviour_logprobs[one.prompt_len :]
            torch.testing.assert_close(row[: len(own)], own, atol=1e-5, rtol=0)
    finally:
        engine.close()


# The whole ring


def engine_core_of(ring) -> psutil.Process:
    actor = psutil.Process(ring.process_ids()["rollout-0"][0])
    return next(
        child for child in actor.children(recursive=True) if "EngineCore" in " ".join([child.name(), *child.cmdline()])
    )


@pytest.mark.ring
def test_a_gloo_ring_runs_resumes_and_survives_a_dead_actor_and_a_stopped_engine(vllm_config, ray_session, tmp_path):
    config = vllm_config.run(num_steps=9).scheduling(max_policy_age=1, max_head_age=1)
    config = config.rollouts(concurrent_groups=2, in_flight_updates=True, hang_after=8.0).weights(
        transport="gloo", timeout=6.0
    )
    with Ring.of(config) as ring:
        for _ in range(2):
            metrics = ring.step()
        assert metrics["weights/mb_per_s"] > 0
        ring.save(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")  # the learner keeps the weights to itself, but for a checkpoint
    saved = decode((tmp_path / "checkpoint" / "policy_learner.msgpack").read_bytes())["weights"].tensors
    exported = load_policy(str(tmp_path / "out" / "policy"), config)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in exported.named_parameters())
    with Ring.of(config, resume=tmp_path / "checkpoint") as ring:
        assert ring.step()["step"] == 3
        actors = ring.process_ids()["rollout-0"]
        os.kill(actors[0], signal.SIGKILL)
        for _ in range(3):  # two may come from the queue (age 1): the third needs the new actor's engine
            metrics = ring.step()
        actors += ring.process_ids()["rollout-0"]
        engine = engine_core_of(ring)
        engine.send_signal(signal.SIGSTOP)  # its next transfer meets nobody
        while not ring.finished:
            metrics = ring.step()
        ring.drain()
        schedule = ring.controller.schedule
        actors += ring.process_ids()["rollout-0"]
        assert len(set(actors)) == 3, "each time another process takes the actor's place"
        assert metrics["step"] == 9 and schedule.policy_ledger.trained == 18 == schedule.policy_ledger.admitted
        assert not engine.is_running()


@pytest.mark.ring
def test_a_synchronous_gloo_ring_gives_the_bits_of_the_object_stores(vllm_config, ray_session):
    final = []
    for transport in ("gloo", "object_store"):
        with Ring.of(vllm_config.weights(transport=transport)) as ring:
            while not ring.finished:
                ring.step()
            ring.drain()
            final.append([bytes(encode(ring.learner_state(name))) for name in ("policy", "head")])
    assert final[0] == final[1]

"""A step that cannot be taken is named with its groups, and the checkpoint before it is whole."""

import pytest
import torch

from learners import passes, policy_learner
from r2m_async import reference
from r2m_async.cli import main
from r2m_async.errors import LearnerOutOfMemory, NonFiniteStep
from r2m_async.launch.ring import Ring

pytestmark = pytest.mark.models


def too_large(*_, **__):
    return torch.empty(2**60)  # this process's allocator says no


def too_large_for_a_gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.fixture
def ring(tiny_config):
    with Ring.of(tiny_config, in_process=True) as ring:
        yield ring


def too_large_for_cuda_itself(*_, **__):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


@pytest.mark.parametrize("fails", [too_large, too_large_for_a_gpu, too_large_for_cuda_itself])
@pytest.mark.parametrize("during", ["proximal", "train"])
def test_out_of_memory_names_the_step_its_groups_and_what_would_help(ring, monkeypatch, fails, during):
    ring.step()
    where, name = (passes, "policy_pass") if during == "proximal" else (policy_learner, "microbatch_loss")
    monkeypatch.setattr(where, name, fails)
    with pytest.raises(LearnerOutOfMemory) as caught:
        ring.step()
    assert str(caught.value).startswith("step 1 (groups [2, 3]): the policy learner is out of memory. Lower ")
    assert "learner.tokens_per_microbatch" in str(caught.value) and "ALLOC" in str(caught.value).upper()


def test_another_error_stays_what_it_is(ring, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(passes, "policy_pass", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong") as caught:
        ring.step()
    assert not isinstance(caught.value, LearnerOutOfMemory)


@pytest.mark.parametrize("failure", ["memory", "nan"])
def test_the_last_checkpoint_stays_whole_and_goes_on_as_if_nothing_had_been(
    tiny_config, tmp_path, monkeypatch, failure
):
    with reference.one_thread():
        expected = reference.train(tiny_config)
        with Ring.of(tiny_config, in_process=True) as ring:
            ring.step()
            ring.save(tmp_path / "good")
            files = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
            with monkeypatch.context() as broken:
                if failure == "memory":
                    broken.setattr(policy_learner, "microbatch_loss", too_large)
                else:
                    real = policy_learner.step_advantages
                    broken.setattr(policy_learner, "step_advantages", lambda *args: (real(*args)[0] * torch.inf, None))
                with pytest.raises(
                    LearnerOutOfMemory if failure == "memory" else NonFiniteStep, match=r"step 1 \(groups \[2, 3\]\): "
                ):
                    ring.step()
        assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == files
        with Ring.of(tiny_config, in_process=True, resume=tmp_path / "good") as ring:
            while not ring.finished:
                ring.step()
            ring.drain()
            policy = ring.policy_weights()
    assert all(torch.equal(policy.tensors[name], tensor) for name, tensor in expected.policy.tensors.items())


def test_the_command_line_names_the_step_its_groups_and_the_last_checkpoint(tiny_config, tmp_path, monkeypatch, capsys):
    """Through `r2m train`, the learner's third step failing."""
    config = tiny_config.run(output_dir=str(tmp_path / "runs")).checkpoint(every=1).logging(live=False)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    real = policy_learner.microbatch_loss

    def third(*args):
        return too_large() if len(list((tmp_path / "runs").glob("*/checkpoints/step-*2"))) else real(*args)

    monkeypatch.setattr(policy_learner, "microbatch_loss", third)
    assert main(["train", str(tmp_path / "config.yaml"), "--in-process"]) == 1
    said = capsys.readouterr().err
    assert "r2m: the run ended: step 2 (groups [4, 5]): the policy learner is out of memory." in said
    (saved,) = (tmp_path / "runs").glob("*/checkpoints/step-*2")
    assert said.rstrip().endswith(
        f"The last whole checkpoint is {saved}: `r2m resume {saved.parents[1]}` goes on from it."
    )

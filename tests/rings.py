"""Configs cut down to what a test can run, and rings compared with their reference."""

from pathlib import Path

import torch

from r2m_async.config import R2MConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def reduced(path: Path, policy: str, reward_model: str, prompts: str, num_steps: int) -> R2MConfig:
    """The file's config with other models, other data and fewer, shorter responses; all else is the file's."""
    config = R2MConfig.from_yaml(path)
    config = config.run(num_steps=num_steps, device="cpu").model(policy=policy).reward(model=reward_model)
    config = config.data(prompts=prompts).evaluation(every=None, gold=None).head(width=min(config.head.width, 16))
    return config.rollouts(prompts_per_step=2, num_actors=1, max_prompt_tokens=8, max_new_tokens=6)


def weights_of(ring):
    """(policy, head) weights as they are now."""

    return ring.policy_weights(), ring.learner_state("head")["weights"]


def record_groups(ring):
    """Listens to the learner's batches and the annotator's rewards, decoded, by step."""
    from r2m_async.codec import decode

    stages, seen = ring.controller.stages, {"tokens": {}, "rewards": {}}
    proximal, score = stages.policy.carrier.call, stages.annotators[0].carrier.call

    async def listen_policy(method, *args):
        if method.name == "proximal":
            groups = [decode(await stages.to_bytes(payload)) for payload in args[1]]
            seen["tokens"][args[0]] = [t.token_ids.tolist() for group in groups for t in group.trajectories]
        return await proximal(method, *args)

    async def listen_annotator(method, *args):
        result = await score(method, *args)
        if method.name == "score":
            rewards = decode(await stages.to_bytes(result[1]))
            seen["rewards"][args[0]] = [reward for group in rewards for reward in group.rewards.tolist()]
        return result

    stages.policy.carrier.call, stages.annotators[0].carrier.call = listen_policy, listen_annotator
    return seen


def assert_same_bits(ring, expected, seen=None):
    policy, head = weights_of(ring)
    for ours, theirs in ((policy, expected.policy), (head, expected.head)):
        for name, tensor in theirs.tensors.items():
            assert torch.equal(ours.tensors[name], tensor), name
    if seen is not None:
        assert list(seen["tokens"].values()) == expected.tokens
        assert list(seen["rewards"].values()) == expected.rewards


SHARDED = {"stage3_param_persistence_threshold": 0}
"""Else stage 3 leaves parameters as small as a test's whole on every rank."""

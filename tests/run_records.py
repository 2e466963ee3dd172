"""What a small run has measured, as its files hold it."""

from r2m_async.ring.step_metrics import Interval

EVALUATIONS = [
    {"step": 0.0, "head_version": 0.0, "proxy": -1.0, "proxy_se": 0.1, "frozen": -1.0, "frozen_se": 0.1, "gold": 1.5},
    {"step": 2.0, "head_version": 2.0, "proxy": 0.25, "proxy_se": 0.2, "frozen": -0.5, "frozen_se": 0.1, "gold": 1.25},
]
SAMPLES = [
    {"step": step, "prompt_id": name, "prompt": f"say {name} :", "response": f" {name} {step}", "finished": step > 0}
    | {"reward": step / 4, "gold": 0.5}
    for step in (0.0, 2.0)
    for name in ("a", "b")
]


def step_metrics(step, **changes):
    return {
        "step": float(step),
        "time/step": 2.0,
        "reward/mean": step / 8,
        "reward/gold": 2 - step / 4,
        "kl/sequence": 3.0 * step,
        "policy/loss": -0.5 * step,
        "head/loss": 0.75,
        "age/policy_mean": 0.5,
        "age/policy_max": 1.0,
        "age/head": 0.0,
        "idle/rollouts": 0.37,
    } | changes


def interval(stage, method, step, start, end):
    return Interval(stage=stage, method=method, step=step, start=start, end=end)


def trace(num_steps):
    """Rollouts one step ahead of training; each step takes 2 s."""
    intervals = []
    for step in range(num_steps):
        start = 2.0 * step
        intervals += [
            interval("rollout-10", "generate", step, start, start + 1.9),
            interval("rollout-2", "load_weights", step, start, start + 0.1),
            interval("annotator-0", "embed", step, start + 1.9, start + 2),
            interval("policy-learner", "train", step, start + 2, start + 4),
        ]
    return [*intervals, interval("annotator-0", "evaluate", -1, 2.0 * num_steps, 2.0 * num_steps + 1)]

"""The stages that learn: the policy learner with its backends and its critic, and the head learner.

policy_learner.py     one policy step: log-probabilities, advantages, and the epochs of updates
step_batch.py         the groups of a step, with what the first pass computed of them; learner and sampler compared
passes.py             the forward passes of a rank over a step
publication.py        policy versions, as tensors or sent to engines
head_learner.py       one update of the reward head per policy step
critic.py             the critic, which trains beside the policy for estimators that need values
backend.py            what a learner asks of a backend: the protocol
torch_backend.py      a backend on plain PyTorch, in one process
deepspeed_backend.py  a backend on DeepSpeed, one rank of several
shares.py             which rank computes which part of a step
kept_states.py        hidden states on their way off the device
step_statistics.py    the metrics of a policy step
weight_sender.py      the learner's end when it sends weights to engines itself
optimizer_state.py    an optimizer's state, in and out of checkpoints
memory.py             running out of memory, as an error that says in which step
"""

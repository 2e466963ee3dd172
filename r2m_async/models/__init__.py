"""The networks, and everything that is computed with one: the policy, the reward model, its head and the critic.

loading.py           how a model is loaded: checks, device, threads, what a pass keeps
weight_files.py      the files of a checkpoint, checked before they are loaded
weights.py           parameters as they travel: copies, digests, a probe; float32 masters
policy.py            log-probabilities and hidden states of given trajectories
policy_objective.py  Eq. 2 of given trajectories: the loss of one microbatch
generation.py        sampling groups of responses with transformers
generator.py         answers of a policy that does not change: the protocol, and transformers
reward.py            the reward model: backbone, first head phi, and the user's reward functions
heads.py             the R2M head on groups: its scores, its losses, its update
critic.py            values of tokens, for estimators that need them
adapters.py          LoRA
"""

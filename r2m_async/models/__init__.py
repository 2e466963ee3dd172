"""This folder holds the networks (policy, reward model, reward head, critic) and everything that is computed with them.

loading.py           loads a model: checks, device, threads, activation checkpointing
pretrained.py        loads models, configs and tokenizers that others have trained, whole or not at all
attention.py         checks that an attention has its package, its device and its number format
liger.py             lets norms and gated layers compute with the kernels of liger-kernel
tokens.py            what a tokenizer and a model must agree on; the text of response tokens
weight_files.py      checks the weight files of a model before they are loaded
weights.py           copies parameters, fingerprints them for the way to an engine, and keeps float32 masters
batches.py           forms batches of texts: which go together, and how they are padded
padding.py           decides which sequences go through a model in one pass
policy.py            computes log-probabilities and hidden states of given trajectories
pairs.py             reads labelled pairs with the present policy
policy_objective.py  computes the advantages of a step and the policy loss (Eq. 2) of one microbatch
generation.py        samples groups of responses with transformers
conversation.py      holds the tokens of one response, which a policy and an environment write in turns
plays.py             generates a group with the user's rollout function
turns.py             defines what such a function's turn asks of an engine, and what the engine answers
generator.py         defines what an engine for a fixed policy is asked and returns, and has one on transformers
reward.py            splits the reward model into backbone and scoring head, and adds the user's reward functions
reward_probe.py      predicts the reward of a prompt from the policy's states, for estimators that need that
reward_scale.py      centres and normalises the rewards of a step
heads.py             builds the reward head, scores groups with it, and updates it
critic.py            predicts values of response tokens, for advantage estimators that need them
adapters.py          adds LoRA adapters and merges them into the base model's weights
"""

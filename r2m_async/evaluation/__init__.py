"""This folder measures how good reward models and policies are.

text_scorer.py    rewards and hidden states of texts, by a reward model or an ensemble
reward_models.py  `r2m reward-model eval`: accuracy, Kendall's tau, RM-Bench, and hidden states of a reward model
ranked_prompts.py prompts whose responses have a known order
best_of_n.py      `r2m bon`: proxy and gold reward of the best of n samples
policy_states.py  `r2m policy-states`: a policy's hidden states, set against preferences
text_states.py    hidden states of whole texts, layer by layer
questions.py      the prompts of three benchmarks: AlpacaEval, MT-Bench, TL;DR
answering.py      `r2m eval generate`: a policy's answers to those prompts
answers.py        the files that answers are written to and read from
judging.py        `r2m eval judge` and `r2m eval win-rate`: which of two answers is better
win_rate.py       win rates, with and without control for length
alpaca_length_control.py  AlpacaEval's own length-controlled win rate
plots.py          the figures
"""

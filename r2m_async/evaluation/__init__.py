"""How good something is: reward models on pairs and splits, policies by best-of-n, by judges, by their states.

text_scorer.py    texts scored by a reward model or an ensemble
reward_models.py  `r2m reward-model eval`: accuracies, RM-Bench, similarities
ranked_prompts.py prompts whose responses somebody has ordered
best_of_n.py      `r2m bon`: gold and proxy of the best of n
policy_states.py  `r2m policy-states`: hidden states against preferences
text_states.py    mean hidden states of texts
questions.py      what a judge's benchmark asks: AlpacaEval, MT-Bench, TL;DR
answering.py      `r2m eval generate`: a policy's answers to them
answers.py        the files that answers are written to
judging.py        `r2m eval judge`: which answer is better
win_rate.py       win rates, with and without control for length
plots.py          the figures
"""

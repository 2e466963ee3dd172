"""Reward models trained offline on preference pairs: `r2m reward-model train`.

config.py           the configuration of such a training
preferences.py      pairs, tokenized and in batches
trainee.py          the model that trains
trainer.py          one model's training, step by step
training.py         the run: directories, seeds, resuming
training_states.py  what is measured of the hidden states meanwhile
ensemble.py         trained models as one
process_group.py    training on several ranks
plots.py            the figures
"""

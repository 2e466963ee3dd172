"""This folder holds what goes into a run: prompts, preference pairs, the texts that models read, and random seeds.

records.py      reads the records of a data source, and refuses a bad one by its file and line
prompts.py      loads the prompts and preference pairs of a run, and deals the prompts to groups
reward_text.py  turns a prompt and its response into the token ids that a reward model reads
seeds.py        names the random streams of a run, and derives seeds from them
"""

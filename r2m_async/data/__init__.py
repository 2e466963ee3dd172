"""This folder holds what goes into a run: prompts, preference pairs, the texts that models read, and random seeds.

sources.py         finds the rows of files, folders and data sets, and names a format that is not read
records.py         checks the fields of a record, and refuses a bad one by its file and line
pairs.py           reads a preference pair in the forms in which data sets have it
prompts.py         loads the prompts and preference pairs of a run, and deals the prompts to groups
chat.py            puts turns through a tokenizer's chat template
special_tokens.py  keeps special tokens that contents spell out from becoming tokens
raw_text.py        turns text that went through no chat template into token ids
reward_text.py     turns a prompt and its response into the token ids that a reward model reads
seeds.py           names the random streams of a run, and derives seeds from them
"""

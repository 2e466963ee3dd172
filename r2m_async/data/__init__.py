"""What goes in: prompts, preference pairs, the texts that models read, and the seeds of everything random.

records.py      records of a data source, each refused by its file and line
prompts.py      the prompts and pairs of a run, and the order in which groups get them
reward_text.py  a prompt and its response as the text that a reward model reads
seeds.py        the random streams of a run
"""

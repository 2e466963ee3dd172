"""This folder makes many runs, over a grid of configs and over seeds, to answer one question: `r2m study`.

study.py          a grid of configs and seeds: runs that are missing are made, and all are compared
cells.py          the numbers of each cell of the grid, over its seeds
reward_models.py  the numbers of each of the study's reward models, over its seeds
intervals.py      confidence intervals over seeds, and tables of them
jobs.py           jobs in processes of their own, several at a time
"""

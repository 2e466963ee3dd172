"""Many runs of one question: `r2m study` and `r2m reward-study`.

study.py          a grid of configs and seeds, run where runs are missing, and reported
cells.py          the numbers of a cell of the grid over its seeds
reward_models.py  the same for reward models
intervals.py      confidence intervals
jobs.py           jobs in processes of their own, several at a time
"""

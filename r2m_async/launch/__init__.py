"""A ring with its real stages: what it needs is found, its processes are started, watched and ended.

workload.py        a config resolved: models, prompts, tickets, the schedule's plan
makers.py          how each stage is made; alone knows actors and learners
ring.py            `Ring`: one run, step by step, saved and restored
training.py        `r2m train`: a ring into a run directory
ray_stages.py      stages in Ray processes
ray_connection.py  Ray itself: started or joined, watched, left in time
loop_thread.py     the event loop that a ring runs on
"""

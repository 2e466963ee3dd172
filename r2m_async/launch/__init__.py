"""This folder makes a ring with its real stages: it finds what a run needs, and starts, watches and ends its processes.

workload.py        resolves a config: finds models and prompts, and makes tickets and the schedule's plan
prompts.py         reads the prompts of a config, and checks its data
makers.py          makes each stage; no other file here imports actors and learners
ring.py            holds `Ring`, one run that is taken step by step, saved and restored
training.py        does what `r2m train` does: runs a ring to its end, into a run directory
memory.py          estimates the memory of each process, by part
initial_config.py makes a first config for models and hardware
preflight.py       says which ages a run can reach, and what it needs of memory, disk, versions and ports
cluster_check.py   compares what a config asks of a cluster with what the cluster has
gpus.py            shares out the GPUs of a cluster to the processes of a ring
placement.py       says what each process asks of a cluster, and reserves its room there
ray_stages.py      runs stages in Ray processes
stacks.py          shows what the processes of stages are doing
arguments.py       takes payloads out of the arguments of a call to a Ray process, and puts them back there
model_checks.py    what the models of a run must be, asked before anything starts
forked_workers.py  forks Ray's workers from a process that has made their imports
ray_connection.py  starts or joins Ray, watches it, and ends it in time
loop_thread.py     runs the event loop of a ring in a thread
prometheus.py      publishes what a run measures among the metrics of Ray
"""

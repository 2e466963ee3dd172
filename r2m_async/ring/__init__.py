"""This folder holds the loops of a run, which call the stages as the schedule decides; it knows neither torch nor Ray.

controller.py    the whole ring, and the loops that train policy and head
queue.py         the replay queue as the loops use it, which remembers what a new process of it must be given again
rollouts.py      the loops of rollout actors: from a ticket to a group with its embeddings
overage.py       the loop that ends groups which are late
evaluations.py   evaluates versions of the policy during a run
delivery.py      brings versions of the policy into the engines of rollout actors
stages.py        declares the methods of every stage as the controller sees them, and runs stages in this process
state.py         what all loops share
labels.py        the clock and the book of labels, and their way to the head's update
journal.py       keeps finished groups between two checkpoints, and takes them up in a resumed run
progress.py      how far a run has come, as a checkpoint keeps it
status.py        what the ring is doing at one moment
calls.py         makes the calls of stages, gives each wait a name, and records each call in the trace
tasks.py         runs the tasks of a ring, so that the first one that fails ends the run
versions.py      keeps the weights of the versions of policy and head that may still be needed
waiting.py       keeps account of who waits for what, wakes those who wait, and notices when nothing moves any more
step_metrics.py  computes the metrics of a step, and keeps the trace of calls
simulator.py     runs the controller on a virtual clock, over stages that only take time
"""

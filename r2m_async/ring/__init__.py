"""This folder holds the loops of a run, which call the stages as the schedule decides; it knows neither torch nor Ray.

controller.py    the loops of a run
stages.py        declares the methods of every stage as the controller sees them, and runs stages in this process
calls.py         makes the calls of stages, gives each wait a name, and records each call in the trace
delivery.py      brings versions of the policy into the engines of rollout actors
waiting.py       keeps account of who waits for what, wakes those who wait, and notices when nothing moves any more
step_metrics.py  computes the metrics of a step, and keeps the trace of calls
simulator.py     runs the controller on a virtual clock, over stages that only take time
"""

"""The schedule at work: loops that call stages, on whatever carries them. Without torch and without Ray.

controller.py    the loops of a run
stages.py        what a stage is to the controller; stages in this process
waiting.py       who waits for what, and the clock that ends a run in which nothing moves
step_metrics.py  the metrics and the trace of a step
simulator.py     the controller over stages that only take time, on a clock that costs none
"""

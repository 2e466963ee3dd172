"""The schedule at work: loops that call stages, on whatever carries them, without torch and without Ray.

controller.py    the loops of a run
stages.py        what a stage is to the controller: its methods and their types; stages in this process
calls.py         a call of a stage, as a wait with a name and an interval of the trace
delivery.py      how weights come into engines
waiting.py       who waits for what, whom a change wakes, and the clock that ends a run in which nothing moves
step_metrics.py  the metrics and the trace of a step
simulator.py     the controller over stages that only take time, on a clock that costs none
"""

"""Reward functions: how those of the user are called, and those that come with this package.

arguments.py  what a reward function can be given, and what its signature asks for
calls.py      calls of reward functions: at the same time, with deadlines, and again if they fail
"""

"""Reward functions: those that come with this package, and how all of them are called. docs/rewards.md shows them.

arguments.py    what a reward function can be given, and what its signature asks for
calls.py        calls of reward functions: at the same time, with deadlines, and again if they fail
mathematics.py  whether a mathematical answer is right
math_worker.py  the process that compares mathematical answers
texts.py        the form, the length and the words of a response
judge.py        a language model on a server as a judge
classifier.py   a reward model on a server
servers.py      requests to servers
packages.py     what to install for them
"""

from r2m_async.rewards.classifier import remote_reward as remote_reward
from r2m_async.rewards.judge import judge as judge
from r2m_async.rewards.mathematics import math_answer as math_answer
from r2m_async.rewards.texts import json_schema as json_schema
from r2m_async.rewards.texts import keywords as keywords
from r2m_async.rewards.texts import length_window as length_window
from r2m_async.rewards.texts import matches_regex as matches_regex
from r2m_async.rewards.texts import tagged as tagged

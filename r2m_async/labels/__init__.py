"""Labels: which of two responses is better, asked while the run goes on. docs/labels.md shows them.

pairs.py      which pairs are asked about, and which labelled pairs are used once more
questions.py  what a source of labels is asked, and what it answers
sources.py    finds the source that a config names
functions.py  a user's function as a source
scored.py     labels from a function that scores one response
judge.py      a language model on a server compares two responses
people.py     a web page on which people choose
files.py      labels that somebody writes into a file
"""

from r2m_async.labels.scored import by_score as by_score

"""What a run leaves on disk: its directory, checkpoints, records and figures.

directory.py    the directory of one run, and what is written into it while it goes on
checkpoints.py  checkpoints: their files, their manifest, and the check before anything in them is used
resuming.py     which keys of the config a resumed run may change
records.py      records, a JSON object a line, and the columns of numbers in them
results.py      the results of a command as JSON and as a table
plots.py        the figures of a run, and of several runs compared
drawing.py      what all figures share
live.py         the progress that a terminal shows while a run goes on
progress.py     the progress of a reward model's training
"""

"""This folder holds what a run shows and leaves on disk: its directory, checkpoints, records, figures and progress.

directory.py    makes the directory of one run, and appends to its files while the run goes on
checkpoints.py  writes and reads checkpoints: their files, their manifest, and the check before anything is used
resuming.py     says which keys of the config a resumed run may change
records.py      writes and reads JSON records, one per line, and takes columns of numbers from them
results.py      writes the results of a command as JSON and as a table
plots.py        draws the figures of a run, and of several runs compared
report.py       writes one HTML file that shows a run, or compares several
panels.py       makes the panels of that file
trace.py        arranges a trace for people
model_cards.py  writes the model cards of an export
samples.py      reads what a run answered to held-out prompts
drawing.py      holds what all figures share: colours, panels, lines
live.py         shows a run in the terminal while it goes on, and keeps its status.json
view.py         lays out what a terminal shows of a run
trackers.py     sends what a run measures to W&B, MLflow and trackio
status.py       what a run is doing now, as its directory has it
watching.py     watches a run that another process drives
progress.py     shows the training of a reward model in the terminal
"""

"""This folder has the commands of `r2m`: for each its options, and what it does with them.

ring.py           train, plan, check
config.py         config
init.py           init
samples.py        samples
watch.py          watch
report.py         report
export.py         export
study.py          study
reward_model.py   reward-model train, resume, eval
policy_states.py  policy-states
best_of_n.py      bon
answers.py        eval generate, judge, win-rate
completion.py     completions of the shell
arguments.py      arguments that several commands take
results.py        the results of commands as JSON
"""

"""`python -m sweeps ...`: looking after runs. One command a file.

selection.py  the runs that the arguments of a command name
status.py     state, step and loss of every run; changes nothing
watch.py      a live table of the runs, until they have ended
logs.py       what a run prints
cancel.py     end runs that are queued or running; they keep their checkpoints
retry.py      launch failed and lost runs again; they resume from their newest checkpoint
plan.py       the stored plan of a sweep, and the commands that made it
diff.py       what two runs differ in: config, code, environment, results
eval.py       evaluate checkpoints again or with other evals, without training
report.py     write the results of a sweep: page, figures, tables, data
compare.py    compare two sweeps on their common arms and seeds
gc.py         remove old checkpoints (and code snapshots); without --yes only say which
sync.py       bring MLflow up to date from the runs' records
ui.py         MLflow's pages, and links that open right
search.py     results of a search: trials, the best, importances, plots
"""

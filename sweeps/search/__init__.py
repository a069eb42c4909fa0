"""A sweep that chooses its next run (Optuna).

launch.py     plans a search and starts its processes
config.py     `search.*`, checked
space.py      dimensions, conditions, configs at a point
spec.py       a search as a file
growth.py     a space that grows within its study
arms.py       settings that are each tuned alone
learn.py      what a new study learns from earlier sweeps
samplers.py   Optuna's samplers and pruners by name
journal.py    the study's file: locks, damage
study.py      which worker has which trial, and the trials' results
trial.py      one point of the space and its runs
draws.py      new points, and which of them are not run
objective.py  the value of a trial
processes.py  starts the processes, here or on SLURM
process.py    what each process does: take a trial, run its seeds, report
reads.py      data and eval texts of a search that have changed
results.py    trials, the best of them, tables
recipe.py     a config as a command line or experiment file
plots.py      Optuna's own plots
response.py   how each arm responds to its rate, and edges
response_files.py  tables and plot of the response
tuned.py      each arm's best, for a sweep
"""

"""A sweep that chooses its next run (Optuna).

launch.py     check, price, write, start processes
config.py     `search.*`, checked
space.py      what can be drawn: choices, integers, numbers, conditions
spec.py       a search as a file
growth.py     a space that grows within its study
arms.py       settings that are tuned each alone
learn.py      what a new study learns from earlier sweeps
samplers.py   Optuna's samplers and pruners by name
journal.py    the study's storage: locks, damage
study.py      who may take which trial, and what trials came to
trial.py      one point of the space and its runs
draws.py      new points: which, and which not to run
objective.py  what a trial's runs are worth
processes.py  its processes, started here or on SLURM
process.py    what each process does: take a trial, run its seeds, report
reads.py      what a search's trials read, and what of it has changed
results.py    the best, the front, tables
recipe.py     a config as a command line or experiment file
plots.py      Optuna's own pictures
response.py   how arms respond to their rate
response_files.py  its tables and its picture
tuned.py      each arm's best, for a sweep
"""

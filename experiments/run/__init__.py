"""Doing one run: complete its config, train, stop, evaluate.

single.py    `python run.py`: one run in this process
complete.py  a config filled in from data and evals, with notes
runner.py    one attempt of a run: lock, sinks, training, result
sinks.py     heartbeat, system metrics and console
stopping.py  whether a run is to end early: signals, time limit, cancel
timing.py    some steps of a config timed, in place of a run
foreign.py   a model that was not trained here, as a run
evaluate.py  evaluations of checkpoints, apart from training
"""

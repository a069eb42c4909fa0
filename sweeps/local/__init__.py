"""Runs in processes of this machine.

launcher.py   `hydra/launcher=local`
slots.py      how many workers at once, and their threads and GPUs
pool.py       the runs of a sweep: which starts next, how it ended
processes.py  worker processes: started, watched, stopped; Ctrl-C
progress.py   the live table
warm.py       workers forked from a process that has imported torch
"""

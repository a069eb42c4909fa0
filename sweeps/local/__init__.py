"""Runs in processes of this machine.

launcher.py   `hydra/launcher=local`
slots.py      how many workers at once, and their threads and GPUs
pool.py       the workers of a sweep, started and settled
processes.py  a warm parent, Ctrl-C, waiting times
progress.py   the live table
warm.py       workers forked from a process that has imported torch
"""

"""The files of an output folder: where they lie, and what they hold.

output_dir.py   where runs, sweeps, studies and caches lie
run_dir.py      a run's folder: its files, lock, status and record
event_log.py    events.jsonl, written and parsed
process.py      is a process still the one that a file names
flock.py        locks of the kernel, which end with their process
presence.py     does a process live, in a container of this machine too
states.py       the states of a run, and how one attempt ends
state.py        what is true of a run, from its own files
evaluations.py  stored results of evaluations
plans.py        stored plans, and where each run is shown
named.py        the runs that an argument of a command names
frozen.py       frozen configs: paths and addresses made absolute
inputs.py       whether a run reads what it was planned with
"""

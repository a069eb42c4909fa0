"""Many runs: planned, launched here or on SLURM, searched, looked after.

planning/     What a sweep consists of and costs, before anything is run
local/        Runs in processes of this machine
slurm/        Runs as SLURM jobs
search/       A sweep that chooses its next run (Optuna)
commands/     `python -m sweeps ...`: looking after runs. One command a file
__main__.py   the command line of `python -m sweeps`
launch.py     `run.py -m`: plans a grid and launches it; also launches runs again
outlook.py    what a command is about to run: checked, written, shown, started
launchers.py  what a launcher is, and the one a sweep was launched with
measure.py    `run.py --plan --measure`: what is worth timing, and its rates
timing.py     configs whose steps are timed, each in a process
job.py        `python -m sweeps.job`: the body of a SLURM job
worker.py     `python -m sweeps.worker RUN_DIR`: the body of one run
attempt.py    around an attempt: its log, MLflow, its end
tracking.py   keeps MLflow up to date while runs are at work
display.py    tables and lines of the terminal
retention.py  which checkpoints may go
snapshot.py   a frozen copy of the code
"""

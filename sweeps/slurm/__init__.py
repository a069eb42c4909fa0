"""Runs as SLURM jobs.

launcher.py    `hydra/launcher=slurm`
batches.py     which runs go into which job array
queue.py       submits one array after another, within max_parallel
submission.py  what was asked of SLURM, and the job that it made
sbatch.py      one call of sbatch: its script, and the job's id
options.py     what a job asks for, and checks of that
cluster.py     questions to SLURM, and its answers
refusal.py     why SLURM refuses a job, and what it would grant
survey.py      the state of runs, by their files and SLURM's answers
evals.py       evaluations as jobs
searches.py    a search's processes as jobs
timings.py     steps that are timed, as one short job
"""

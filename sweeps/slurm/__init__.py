"""Runs as SLURM jobs.

launcher.py    `hydra/launcher=slurm`
batches.py     which runs go into which job array
queue.py       submits one array after another, below max_parallel
submission.py  what was asked of SLURM, and the job that came of it
sbatch.py      one sbatch: its script and its id
options.py     what a job asks for, and what no cluster grants
cluster.py     what SLURM says
survey.py      the state of runs, in the light of SLURM's answers
evals.py       evaluations as jobs
searches.py    a search's processes as jobs
"""

"""One run, made findable and comparable: its config, files, MLflow and reports.

disk/           What lies where in an output folder, and what it says
run/            Doing one run: complete its config, train, stop, evaluate
tracking/       MLflow as a view of the records: nothing here is the only copy of anything
published/      What published checkpoints say of a restart
report/         A sweep's report: data, statistics, tables, page
__main__.py     `describe`, `show`, `export`, `evaluate`, `import-pico`, `tokenizer`, `published`
schema.py       where Hydra meets the dataclasses
typos.py        what a mistyped key, option or value should have been
references.py   values of a config that refer to others, followed after composing
identity.py     run_id and arm_id
colours.py      the colour of an arm, in reports and in MLflow
environment.py  host, packages and code of an attempt
scheduler.py    which SLURM job of ours a process is in, if any
errors.py       an error as one line and an exit code
addresses.py    addresses of tracking stores: checked, absolute, without passwords
json_files.py   JSON of runs and sweeps, checked while it is read
options.py      what the files of conf/ set
labels.py       how keys and values are spelt in names of runs and on the command line
model_card.py   the README.md of an exported model
metrics.py      the metrics that tables, figures and MLflow's pages show
notices.py      what to say of the runs that a command asks for together
stats.py        means, intervals, comparisons on common seeds, seeds needed
"""

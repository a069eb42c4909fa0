"""MLflow as a view of the records: nothing here is the only copy of anything.

tracker.py        brings all sweeps and runs of a folder up to date
store.py          opening, migrating and locking a store
run_view.py       what MLflow is to show of a run, from the run's folder
content.py        what an MLflow run shows and is to show; writes the difference
runs.py           runs brought up to date in MLflow
sweep_view.py     what MLflow shows of a sweep, as data
sweeps.py         sweeps and arms brought up to date in MLflow
note.py           a sweep's note and its table of arms
saved_views.py    saved views of tables and curves, and colours
links.py          links into MLflow's pages
server.py         MLflow's server on loopback
follower.py       a child process that sends runs while they train
artifacts.py      files of MLflow's runs
model.py          an exported model as an MLflow model
mlflow_scorer.py  what that model runs; MLflow imports it by this name
"""

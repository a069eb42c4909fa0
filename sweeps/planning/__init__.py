"""What a sweep consists of and costs, before anything is run.

grid.py     points of a grid, and the sweep's name
plan.py     runs without duplicates, as a file
budget.py   what a plan costs, from what was measured
rates.py    what was measured: how fast runs were
kinds.py    kinds of GPUs by name, and how fast one is beside another
provenance.py  settings from a search, and where they came from
unnamed.py  settings that differ between runs though their names do not say so
"""

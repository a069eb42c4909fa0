"""What a sweep consists of and costs, before anything is run.

grid.py     points of a grid, and the sweep's name
plan.py     runs without duplicates, as a file
budget.py   what a plan costs, from what was measured
provenance.py  settings from a search, and where they came from
unnamed.py  settings that differ between runs though their names do not say so
"""

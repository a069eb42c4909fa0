"""Between Hydra's command line and `sweeps`.

plugins.py   Hydra's sweepers and launchers, which call `sweeps`
_axes.py     Hydra's grammar of axes -> points of a grid, dimensions of a search
_compose.py  composes many points quickly
_drafts.py   the studies that the command line of a search asks for
_habits.py   names of the stock plugins for submitit and Optuna, in ours
_guards.py   our changes to Hydra's own code, and why
"""

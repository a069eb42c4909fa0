"""Between Hydra's command line and `sweeps`.

plugins.py   Hydra's Sweeper and Launcher, a few lines into `sweeps`
_axes.py     Hydra's grammar of axes -> points of a grid, dimensions of a search
_compose.py  composes many points quickly
_guards.py   what is changed in Hydra's own code, and why
"""

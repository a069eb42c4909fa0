"""The command `relora-sweeps`. In a wheel run.py and conf/ are here, too, put there by `setup.py`.

__main__.py   `relora-sweeps COMMAND` is `python run.py`, `python -m experiments` and `-m sweeps`
"""

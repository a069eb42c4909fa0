"""What published checkpoints say of a restart: `python -m experiments published`.

commits.py      the checkpoints of a hub repository, a git repository or a folder, by step
adapters.py     the adapted linears of one checkpoint
measures.py     numbers of two checkpoints, as sums that pool over modules
verdicts.py     questions, thresholds and answers; the JSON to cite
table.py        the answers as lines of text
"""

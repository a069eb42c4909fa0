"""The pictures of a report.

catalogue.py  all figures, and learning curves
arms.py       final numbers, differences, BLiMP
response.py   metrics over numeric axes
fronts.py     what arms reach for what they take
paper.py      the paper's figures, drawn from our runs
curves.py     means and bands over seeds
printed.py    figures as PDF, for one and two columns
canvas.py     style, legends, reproducible files
published.py  the paper's own curves, from a file
"""

"""The pictures of a report.

catalogue.py  which figures there are
arms.py       final numbers, differences, BLiMP
paper.py      the paper's figures from our runs
curves.py     means and bands over seeds
canvas.py     style, legends, files with fixed bytes
published.py  the paper's curves, from a file
"""

"""A sweep's report: data, statistics, tables, page.

figures/        The pictures of a report
data.py         a sweep's runs as tidy data
gather.py       reads that from plan and records
answers.py      what the comparisons say, in sentences
responses.py    metrics over numeric axes
tables.py       tables: means, restarts, cost, runs
comparisons.py  arms against references: pairs, tests, tables
registered.py   comparisons that a file names, tested together
tradeoffs.py    metrics against costs, and Pareto fronts
blimp.py        tables of BLiMP
blimp_tests.py  tests of BLiMP: the paper's own, and those that account for paradigms and seeds
page.py         the report as a whole
index.py        a page over all sweeps
compare.py      two sweeps, arm by arm
notebook.py     a notebook that draws the figures again
redraw.py       what it draws with, without the project
latex.py        tables for a paper
document.py     sections, tables and pictures as HTML, Markdown and CSV
"""

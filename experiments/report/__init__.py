"""A sweep's report: data, statistics, tables, page.

figures/        The pictures of a report
gather.py       reading them from the records
data.py         a sweep's runs as tidy data
tables.py       tables: means, comparisons, restarts, cost
blimp.py        tables of BLiMP
blimp_tests.py  BLiMP: the paper's test, and tests that respect its structure
page.py         the report as a whole
compare.py      two sweeps, arm by arm
document.py     sections, tables and pictures as HTML, Markdown and CSV
"""

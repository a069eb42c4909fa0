"""Tables as LaTeX: what a name holds is printed, and the structure is one that booktabs takes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.document import Table
from experiments.report.latex import escape, to_latex

UNESCAPED = re.compile(r"(?<!\\)[&%$#_{}~^]")


def a_table(*rows: list[str], columns: tuple[str, ...] = ("arm", "p")) -> Table:
    return Table(name="t", title="100 % of a_b", columns=columns, rows=rows, note="See `x_y`.")


def body(text: str) -> list[str]:
    return text.partition("\\midrule\n")[2].partition("\n\\bottomrule")[0].split("\n")


@given(st.text(alphabet=st.sampled_from('ab \\&%$#_{}~^<>|"')))
def test_no_character_of_a_name_is_a_command(name: str) -> None:
    plain = escape(name)
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}"):
        plain = plain.replace(command, "")
    for command in (r"\textless{}", r"\textgreater{}", r"\textbar{}", r"\textquotedbl{}"):
        plain = plain.replace(command, "")
    assert not UNESCAPED.search(plain)
    assert not re.search(r"\\(?![&%$#_{}])", plain)


def test_rows_have_as_many_cells_as_columns_and_environments_close() -> None:
    text = to_latex(a_table(["a & b", "0.004"], ["c_d", "3.4e-04"]), label="mine-t")
    assert all(len(re.split(r"(?<!\\)&", row)) == 2 for row in body(text))
    assert all(row.endswith(r" \\") for row in body(text))
    assert re.findall(r"\\(begin|end)\{(\w+\*?)\}", text) == [
        *(("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"))
    ]
    assert [text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")
    )
    assert r"\begin{tabular}{lr}" in text
    assert r"\caption{100 \% of a\_b. See x\_y.}" in text
    assert r"\label{tab:mine-t}" in text
    inside = re.sub(r"\\[&%$#_{}]", "", text)
    assert inside.count("{") == inside.count("}")
    assert inside.count("$") % 2 == 0


@pytest.mark.parametrize(
    ("cell", "printed"),
    [
        ("3.4e-04", r"$3.4 \times 10^{-4}$"),
        ("-0.02 [-0.03, +0.01]", "$-$0.02 [$-$0.03, $+$0.01]"),
        ("method=relora relora.r=8", "method=relora relora.r=8"),
        ("lr=1e-3", r"lr=$1 \times 10^{-3}$"),
        ("two-fold 3-5", "two-fold 3-5"),
        ("-", "--"),
        ("[1.0, 2.0]", "{}[1.0, 2.0]"),
        ("> 1000", r"\textgreater{} 1000"),
    ],
)
def test_numbers_are_set_as_numbers(cell: str, printed: str) -> None:
    text = to_latex(a_table([cell, "1"], columns=("x", "n")), label="t")
    if cell == "-":
        text = to_latex(a_table(["-", "1"], ["a", "2"], columns=("x", "n")), label="t")
    assert body(text)[0] == rf"{printed} & 1 \\"


def test_a_wide_table_spans_both_columns_and_empty_columns_are_left_out() -> None:
    columns = ("a", "b", "c", "d", "e", "f")
    wide = to_latex(a_table(["1"] * 6, columns=columns), label="t")
    assert r"\begin{table*}" in wide
    assert "\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}" in wide
    assert "\\end{tabular}}\n" in wide
    narrow = to_latex(a_table(["1", "1", "1", "1", "1", ""], columns=columns), label="t")
    assert r"\begin{table}" in narrow
    assert r"\begin{tabular}{rrrrr}" in narrow

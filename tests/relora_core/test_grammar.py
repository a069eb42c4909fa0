"""The embedded data set: exact entropy, unambiguity, random access, minimal pairs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest

from relora_core.data import grammar as g
from relora_core.data.base import DataError

TERMS = {
    "anaphor_agreement",
    "argument_structure",
    "binding",
    "control_raising",
    "determiner_noun_agreement",
    "ellipsis",
    "filler_gap_dependency",
    "irregular_forms",
    "island_effects",
    "npi_licensing",
    "quantifiers",
    "subject_verb_agreement",
}


class Chart:
    """Sums over the derivations of a text, top down. Shares the rules with the sampler, no code."""

    def __init__(self, rules: dict[str, list[g.Rule]]) -> None:
        self.rules = rules
        self.first = cache(self._first)

    def whole(self, symbol: str, words: list[str]) -> tuple[float, int]:
        """(probability, number of derivations) of `words` as a `symbol`."""
        self.words = words
        self.spans = cache(self._spans)
        return self.spans(symbol, 0).get(len(words), (0.0, 0))

    def _first(self, symbol: str) -> frozenset[str]:
        if symbol not in self.rules:
            return frozenset({symbol})
        return frozenset().union(*(self.first(right[0]) for _, right in self.rules[symbol]))

    def _spans(self, symbol: str, start: int) -> dict[int, tuple[float, int]]:
        """End position -> (probability, number of derivations) of `symbol` from `start`."""
        if start == len(self.words) or self.words[start] not in self.first(symbol):
            return {}
        if symbol not in self.rules:
            return {start + 1: (1.0, 1)}
        total: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for weight, right in self.rules[symbol]:
            ends = {start: (weight, 1)}
            for part in right:
                step: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
                for middle, (p, n) in ends.items():
                    for end, (q, k) in self.spans(part, middle).items():
                        step[end] = (step[end][0] + p * q, step[end][1] + n * k)
                ends = step
            for end, (p, n) in ends.items():
                total[end] = (total[end][0] + p, total[end][1] + n)
        return dict(total)


def words_of(text: str) -> list[str]:
    return [g._WORDS[i] for i in g.GrammarTokenizer().encode(text)]


@cache
def all_registers() -> dict[str, list[g.Rule]]:
    """What any register may say; the weights mean nothing."""
    rights: dict[str, dict[tuple[str, ...], None]] = defaultdict(dict)
    for register in g.REGISTERS:
        for left, alternatives in g.grammar(register).rules.items():
            rights[left] |= dict.fromkeys(right for _, right in alternatives)
    return {left: [(1.0, right) for right in symbols] for left, symbols in rights.items()}


def derivable(text: str) -> bool:
    """Whether the text is a sentence of some register."""
    return union_chart().whole("Sentence", words_of(text))[1] > 0


@cache
def union_chart() -> Chart:
    return Chart(all_registers())


def is_ambiguous(rules: dict[str, list[g.Rule]], start: str) -> bool:
    """Whether two leftmost derivations give one string; exact where recursion is on the right only.

    Follows the set of stacks that are possible after each prefix. Every stack can be emptied, so
    the grammar is ambiguous exactly if two derivations of a prefix meet in one stack.
    Words that stand in the same rules everywhere are told apart by nothing, so one of them does.
    """
    alike: dict[str, set[tuple[str, tuple[str, ...]]]] = defaultdict(set)
    for left, alternatives in rules.items():
        assert len({right for _, right in alternatives}) == len(alternatives), left
        for _, right in alternatives:
            for symbol in right:
                if symbol not in rules:
                    alike[symbol].add((left, tuple("_" if s == symbol else s for s in right)))
    chosen = {frozenset(places): word for word, places in alike.items()}
    allowed = set(chosen.values())
    small = {
        left: [right for _, right in alternatives if all(s in rules or s in allowed for s in right)]
        for left, alternatives in rules.items()
    }

    @cache
    def steps(stack: tuple[str, ...]) -> dict[str, list[tuple[str, ...]]]:
        """Next word -> the stacks after it, once per derivation."""
        if not stack:
            return {}
        top, rest = stack[0], stack[1:]
        if top not in rules:
            return {top: [rest]}
        out: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for right in small[top]:
            for word, after in steps((*right, *rest)).items():
                out[word] += after
        return dict(out)

    todo: list[frozenset[tuple[str, ...]]] = [frozenset({(start,)})]
    seen = set(todo)
    while todo:
        reached: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for stack in todo.pop():
            for word, after in steps(stack).items():
                reached[word] += after
        for stacks in reached.values():
            state = frozenset(stacks)
            if len(state) < len(stacks):
                return True
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return False


def sample(register: str, count: int) -> list[list[int]]:
    uniform = g._uniforms(np.random.default_rng(7))
    return [g.grammar(register).expand("Document", uniform) for _ in range(count)]


def test_ambiguity_is_found_where_there_is_one() -> None:
    rules: dict[str, list[g.Rule]] = {
        "S": [(0.5, ("a", "B")), (0.5, ("C", "b"))],
        "B": [(1.0, ("b",))],
        "C": [(0.5, ("a",)), (0.5, ("c",))],
    }
    assert is_ambiguous(rules, "S")
    rules["C"] = [(1.0, ("c",))]
    assert not is_ambiguous(rules, "S")


def test_every_document_has_one_derivation_and_one_register() -> None:
    assert not is_ambiguous(all_registers(), "Document")


def test_a_second_way_to_say_they_would_be_found() -> None:
    rules = dict(g.grammar("news").rules)
    rules["Nominative[pl,masc]"] = [*rules["Nominative[pl,masc]"], (0.1, ("they",))]
    assert is_ambiguous(rules, "Document")


@pytest.mark.parametrize("register", g.REGISTERS)
def test_rules_are_probabilities_and_all_are_defined(register: str) -> None:
    rules = g.grammar(register).rules
    for left, alternatives in rules.items():
        assert sum(p for p, _ in alternatives) == pytest.approx(1), left
        assert min(p for p, _ in alternatives) > 0, left
        for symbol in (symbol for _, right in alternatives for symbol in right):
            assert symbol in rules or symbol in g._WORDS, f"{left}: {symbol}"


@pytest.mark.parametrize("register", g.REGISTERS)
def test_entropy_rate_is_the_mean_code_length_of_samples(register: str) -> None:
    """-log p of a document less rate x tokens has mean 0; p is summed by the chart."""
    chart, rate = Chart(g.grammar(register).rules), g.entropy_rate(register)
    excess = []
    for ids in sample(register, 30):
        p, derivations = chart.whole("Document", [g._WORDS[i] for i in ids])
        assert derivations == 1
        excess.append(-np.log(p) - rate * len(ids))
    assert abs(np.mean(excess)) < 4 * np.std(excess) / len(excess) ** 0.5
    assert np.std(excess) / len(excess) ** 0.5 < 0.05 * rate * 45  # the check has power


def test_entropy_of_a_coin_that_is_tossed_until_heads() -> None:
    """Geometric with p = 1/4: H = h(p) / p, one token per toss and one for the end."""
    toy = object.__new__(g.Grammar)
    toy.rules = {
        "Document": [(1.0, ("Body", g.EOS))],
        "Body": [(0.25, ("a",)), (0.75, ("a", "Body"))],
    }
    toy.symbols = g._IDS | {"Document": g.VOCAB_SIZE, "Body": g.VOCAB_SIZE + 1}
    entropy, counts = toy.expectations()
    assert entropy == pytest.approx(-(np.log(0.25) + 3 * np.log(0.75)))
    assert counts[g._IDS["a"]] == pytest.approx(4)
    assert counts[g.EOS_ID] == pytest.approx(1)


@pytest.mark.parametrize("register", g.REGISTERS)
def test_expected_counts_are_those_of_samples(register: str) -> None:
    documents = sample(register, 1500)
    counts = np.array([np.bincount(ids, minlength=g.VOCAB_SIZE) for ids in documents])
    expected = g.grammar(register).expectations()[1]
    error = counts.std(axis=0) / len(documents) ** 0.5
    frequent = expected * len(documents) > 50
    off = abs(counts.mean(axis=0) - expected)
    assert np.all(off[frequent] <= 5 * error[frequent] + 1e-9)
    assert not counts[:, expected == 0].any()


def test_rate_of_the_mixture_counts_the_choice_of_register() -> None:
    prior = g.REGISTER_PRIOR
    lengths = {r: g.grammar(r).expectations()[1].sum() for r in g.REGISTERS}
    total = sum(prior[r] * (g.entropy_rate(r) * lengths[r] - np.log(prior[r])) for r in g.REGISTERS)
    mean_length = sum(prior[r] * lengths[r] for r in g.REGISTERS)
    assert g.entropy_rate() == pytest.approx(total / mean_length)
    assert g.entropy_rate() < 0.5 * g.unigram_entropy() < g.unigram_entropy() < np.log(g.VOCAB_SIZE)


def test_favourites_are_lemmas() -> None:
    lemmas = {lemma for _, words in g._lexical_rules() for lemma, _ in words}
    assert lemmas >= {word for text in g.FAVOURITES.values() for word in text.split()}


def test_stream_has_the_exact_unigram_distribution() -> None:
    rows = g.GrammarStream(seq_len=64, seed=5).next_rows(64 * 40)[:, :-1]
    share = np.bincount(rows.ravel(), minlength=g.VOCAB_SIZE) / rows.size
    assert abs(share - g.unigram()).sum() < 0.05
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert entropy == pytest.approx(g.unigram_entropy(), abs=0.01)


def test_blocks_begin_anywhere_in_the_text() -> None:
    stream = g.GrammarStream(seq_len=4, seed=3)
    starts = []
    for block in range(600):
        stream.load_state_dict({"row": block * g.BLOCK_ROWS})
        starts.append(stream.next_rows(1)[0, :2])
    share, expected = np.mean(np.array(starts) == g._IDS[":"]), g.unigram()[g._IDS[":"]]
    assert abs(share - expected) < 4 * (expected / 1200) ** 0.5


def test_rows_are_consecutive_windows_with_one_token_in_common() -> None:
    rows = g.GrammarStream(seq_len=16, seed=1).next_rows(g.BLOCK_ROWS + 1)
    assert rows.shape == (g.BLOCK_ROWS + 1, 17)
    assert rows.dtype == np.int64
    assert np.array_equal(rows[:-2, -1], rows[1:-1, 0])
    assert set(rows.ravel()) <= set(range(g.VOCAB_SIZE))


def test_any_row_can_be_reached_without_the_rows_before() -> None:
    straight = g.GrammarStream(seq_len=8, seed=2).next_rows(3 * g.BLOCK_ROWS)
    for row in (0, 1, 63, 64, 100, 191, 17):
        stream = g.GrammarStream(seq_len=8, seed=2)
        stream.load_state_dict(json.loads(json.dumps({"row": row})))
        assert np.array_equal(stream.next_rows(1)[0], straight[row])
        assert stream.state_dict() == {"row": row + 1}


def test_seeds_and_blocks_differ() -> None:
    rows = g.GrammarStream(seq_len=32, seed=0).next_rows(2 * g.BLOCK_ROWS)
    other = g.GrammarStream(seq_len=32, seed=1).next_rows(2 * g.BLOCK_ROWS)
    assert not np.array_equal(rows[0], rows[g.BLOCK_ROWS])
    assert not np.array_equal(rows[0], other[0])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_a_resume_may_change_their_number(world: int) -> None:
    straight = g.GrammarStream(seq_len=8, seed=4).next_rows(20 * world + 5)
    ranks = [g.GrammarStream(seq_len=8, seed=4, rank=i, world=world) for i in range(world)]
    parts = [np.concatenate([r.next_rows(12), r.next_rows(0), r.next_rows(8)]) for r in ranks]
    for i, part in enumerate(parts):
        assert np.array_equal(part, straight[i : 20 * world : world])
    states = [r.state_dict() for r in ranks]
    assert all(state == states[0] for state in states)
    alone = g.GrammarStream(seq_len=8, seed=4)
    alone.load_state_dict(states[0])
    assert np.array_equal(alone.next_rows(5), straight[20 * world :])


@pytest.mark.parametrize("register", g.REGISTERS)
def test_text_survives_the_tokenizer(register: str) -> None:
    tokenizer = g.GrammarTokenizer()
    for text, ids in zip(g.documents(register, 20, seed=0), sample(register, 20), strict=True):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(tokenizer.decode(ids[:-1])) == ids[:-1]
        assert text.isascii()
        assert text[-1] in ".?"


def test_tokenizer_reads_any_case_spacing_and_punctuation() -> None:
    tokenizer = g.GrammarTokenizer()
    ids = tokenizer.encode("The king sleeps in the garden.")
    assert len(ids) == 7
    assert tokenizer.encode_batch([" the KING sleeps in  the garden ."]) == [ids]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([*ids, g.EOS_ID, *ids]).count("\nThe king") == 1
    assert tokenizer.vocab_size == g.VOCAB_SIZE == 1 + max(g._IDS.values())


@pytest.mark.parametrize(("word", "near"), [("gardn", "garden"), ("<eos>", ""), ("zyxw", "")])
def test_unknown_words_are_named_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(DataError) as error:
        g.GrammarTokenizer().encode(f"The {word} sleeps.")
    assert repr(word) in str(error.value)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_every_word_occurs() -> None:
    assert g.unigram().min() > 0


def test_held_out_documents_are_reproducible_and_new() -> None:
    texts = g.documents("story", 30, seed=0)
    assert texts[:5] == g.documents("story", 5, seed=0)
    assert texts != g.documents("story", 30, seed=1)
    stream = g.GrammarStream(seq_len=64, seed=0).next_rows(20 * g.BLOCK_ROWS)
    training = g.GrammarTokenizer().decode(stream[:, :-1].ravel())
    long = [text for text in texts if len(text) > 300]
    assert long
    assert not any(text in training for text in long)


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, object]]:
    return g.minimal_pairs(pairs_per_paradigm=15)


def test_pairs_cover_the_twelve_phenomena_in_blimps_fields(pairs: list[dict[str, object]]) -> None:
    assert {p["linguistics_term"] for p in pairs} == TERMS
    assert {p["field"] for p in pairs} == {"morphology", "syntax", "semantics", "syntax_semantics"}
    per_uid = Counter(p["UID"] for p in pairs)
    assert 15 <= len(per_uid) <= 24
    assert set(per_uid.values()) == {15}
    for uid in per_uid:
        mine = [p for p in pairs if p["UID"] == uid]
        assert [p["pairID"] for p in mine] == [str(i) for i in range(15)]
        assert len({(p["sentence_good"], p["sentence_bad"]) for p in mine}) == 15
        for key in ("field", "linguistics_term", "lexically_identical", "one_prefix_method"):
            assert len({p[key] for p in mine}) == 1
    assert json.loads(json.dumps(pairs)) == pairs


@pytest.mark.slow
def test_good_sentences_are_derivable_and_bad_ones_are_not(pairs: list[dict[str, object]]) -> None:
    for pair in pairs:
        assert derivable(str(pair["sentence_good"])), pair
        assert not derivable(str(pair["sentence_bad"])), pair


def test_one_prefix_pairs_differ_in_one_word(pairs: list[dict[str, object]]) -> None:
    for pair in pairs:
        good, bad = words_of(str(pair["sentence_good"])), words_of(str(pair["sentence_bad"]))
        assert pair["lexically_identical"] == (Counter(good) == Counter(bad))
        if pair["one_prefix_method"]:
            assert [a == b for a, b in zip(good, bad, strict=True)].count(False) == 1
            assert not pair["two_prefix_method"]


def test_pairs_depend_on_the_seed_alone() -> None:
    few = g.minimal_pairs(pairs_per_paradigm=3, seed=1)
    assert few == g.minimal_pairs(pairs_per_paradigm=3, seed=1)
    assert few != g.minimal_pairs(pairs_per_paradigm=3, seed=2)
    assert g.minimal_pairs(pairs_per_paradigm=0) == []

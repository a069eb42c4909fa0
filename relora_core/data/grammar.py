"""English-like text from a probabilistic grammar: training rows, held-out documents, minimal pairs.

The grammar is unambiguous (a document has one derivation; a test decides it exactly), so the
entropy of its text is that of its derivations and has a closed form. Everything is a pure function
of integers: block b of a training stream depends on (seed, b) and on nothing that came before.
Not for: scoring (`evals/`), nor for other people's text (`text.py`, `pretokenized.py`).

Notation of `RULES`: `Left = weight symbols | weight symbols`; lines with the same left side add up.
Capitalised symbols are expanded, the others are words. Features are in brackets; the letters of
`VALUES` are variables that range over them: one on the left makes one rule per value, one that is
only on the right is chosen by `PRIOR`. Preterminals come from the lexicon (`_lexical_rules`).
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

from relora_core.config import nearest
from relora_core.data.base import DataError, RowStream

EOS = "<eos>"
BLOCK_ROWS = 64  # rows generated together; one block is the unit of random access
PHASE_TOKENS = 256  # a block starts up to this far inside its text, so its rows look stationary
TRAIN, HELD_OUT, PAIRS = range(3)  # key spaces of the random generators, disjoint by construction

REGISTER_PRIOR = {
    "news": 0.2,
    "story": 0.22,
    "letter": 0.16,
    "lecture": 0.18,
    "recipe": 0.12,
    "interview": 0.12,
}
REGISTERS: tuple[str, ...] = tuple(REGISTER_PRIOR)

_NUMBER, _GENDER, _TENSE = ("sg", "pl"), ("masc", "fem", "any", "beast"), ("pres", "past")
VALUES: dict[str, tuple[str, ...]] = {
    "n": _NUMBER,
    "m": _NUMBER,
    "g": _GENDER,
    "h": _GENDER,
    "t": _TENSE,
    "v": (*(f"{t},{n}" for t in _TENSE for n in _NUMBER), "base", "part"),
}
PRIOR = {"sg": 0.55, "pl": 0.45, "masc": 0.28, "fem": 0.28, "any": 0.26, "beast": 0.18}
# The k-th word of a class has weight k ** -ZIPF: monotonous registers are easier to predict.
ZIPF = {"news": 1.0, "story": 1.1, "letter": 1.3, "lecture": 1.3, "recipe": 1.8, "interview": 1.5}
PAST = {"news": 0.2, "story": 0.5, "letter": 0.1, "lecture": 0.05, "recipe": 0.1, "interview": 0.2}

# Every noun and adjective begins with a consonant, so `a` is always right.
NOUNS = {
    "masc": "king/kings boy/boys man/men brother/brothers father/fathers prince/princes",
    "fem": "queen/queens girl/girls woman/women sister/sisters mother/mothers lady/ladies",
    "any": "teacher/teachers child/children friend/friends mayor/mayors baker/bakers poet/poets",
    "beast": "cat/cats dog/dogs goose/geese horse/horses mouse/mice wolf/wolves",
}
KIN = {
    "masc": "brother/brothers father/fathers",
    "fem": "sister/sisters mother/mothers",
    "any": "friend/friends",
    "beast": "horse/horses",
}
NAMES = {"masc": "tom peter john hugo", "fem": "mary anna clara rose"}
THINGS = (
    "book/books key/keys hat/hats cup/cups letter/letters picture/pictures cake/cakes bell/bells "
    "knife/knives map/maps potato/potatoes loaf/loaves pear/pears ring/rings"
)
# pres sg / base and pres pl / past / participle / -ing where it is used
INTRANSITIVE = (
    "sleeps/sleep/slept/slept walks/walk/walked/walked laughs/laugh/laughed/laughed "
    "waits/wait/waited/waited smiles/smile/smiled/smiled dances/dance/danced/danced "
    "falls/fall/fell/fallen listens/listen/listened/listened"
)
TRANSITIVE = (
    "finds/find/found/found/finding takes/take/took/taken/taking loses/lose/lost/lost/losing "
    "hides/hide/hid/hidden/hiding steals/steal/stole/stolen/stealing "
    "breaks/break/broke/broken/breaking washes/wash/washed/washed/washing "
    "chooses/choose/chose/chosen/choosing draws/draw/drew/drawn/drawing "
    "tastes/taste/tasted/tasted/tasting bakes/bake/baked/baked/baking"
)
PERSONAL = (
    "likes/like/liked/liked helps/help/helped/helped admires/admire/admired/admired "
    "follows/follow/followed/followed praises/praise/praised/praised trusts/trust/trusted/trusted"
)
SAYING = "says/say/said thinks/think/thought believes/believe/believed"
KNOWING = "knows/know/knew remembers/remember/remembered"
WORDS = {
    "Place": "garden kitchen market castle library forest school",
    "Preposition": "in near behind",
    "How": "quietly today slowly again",
    "Kind": "happy clever tired brave young",
    "Quality": "small red new heavy golden",
    "Hard": "hard fun simple",
    "Likely": "likely sure",
    "Frequency": "often really",
    "Number": "two three four",
    "Before": "before after",
    "Hope[sg]": "hopes tries wants",
    "Hope[pl]": "hope try want",
    "Seem[sg]": "seems appears",
    "Seem[pl]": "seem appear",
}
# Lemmas that come first in their classes, in this order.
FAVOURITES = {
    "news": "mayor lady friend ring map market says steals loses takes poet wolf heavy clara",
    "story": "king queen prince cat horse wolf bell golden castle forest brave says hides sleeps",
    "letter": "sister brother mother friend letter cup mary garden tired likes trusts waits smiles",
    "lecture": "teacher woman man book map library school clever thinks knows draws new listens",
    "recipe": "cake potato pear loaf knife baker girl kitchen washes bakes tastes takes small",
    "interview": "poet child boy lady goose picture hat key knows chooses finds admires peter anna",
}

RULES = """
NP[n,g] = 10 Common[n,g]
NP[sg,masc] = 5 Name[masc]
NP[sg,fem] = 5 Name[fem]
NP[pl,any] = 3 Name[masc] and Name[fem]
Common[n,g] = 8 Det[n] Noun[n,g] | 2 Det[n] Kind Noun[n,g]
Det[n] = 4 the | 3 Weak[n] | 3 Strong[n]
Weak[sg] = 1 a
Weak[pl] = 2 many | 2 some | 2 Number
Strong[sg] = 3 this | 2 every
Strong[pl] = 3 these | 2 all | 1 most
Nominative[n,g] = 10 NP[n,g]
Nominative[sg,masc] = 3 he
Nominative[sg,fem] = 3 she
Nominative[pl,any] = 3 they
Subject[n,g] = 12 Nominative[n,g] | 3 Common[n,g] Relative[n] | 3 Kin[n,g] | 1 Common[n,g] Where
Kin[n,g] = 1 the Kinsman[n,g] of NP[m,h]
Focus[n,g] = 3 the Noun[n,g] | 1 the Kind Noun[n,g]
Focus[sg,masc] = 2 Name[masc]
Focus[sg,fem] = 2 Name[fem]
Relative[n] = 1 who Vp[t,n] NP[m,h] | 1 that NP[m,h] Vp[t,m]
Object = 8 NP[n,g] | 1 him | 1 her | 1 them
It = 1 Item[n]
Item[n] = 6 Det[n] Thing[n] | 2 Det[n] Quality Thing[n] | 2 Det[n] Irregular[part] Thing[n]
Where = 1 Preposition the Place
VP[v] = 4 Vi[v] | 2 Vi[v] Where | 2 Vi[v] How | 4 Vt[v] It | 1 Vt[v] It Where | 3 Vp[v] Object
Refl[sg,masc] = 1 himself
Refl[sg,fem] = 1 herself
Refl[sg,any] = 1 himself | 1 herself
Refl[sg,beast] = 1 itself
Refl[pl,g] = 1 themselves
Pronoun[sg] = 1 he | 1 she
Pronoun[pl] = 1 they
Be[pres,sg] = 1 is
Be[pres,pl] = 1 are
Be[past,sg] = 1 was
Be[past,pl] = 1 were
Have[sg] = 1 has
Have[pl] = 1 have
Do[pres,sg] = 1 does
Do[pres,pl] = 1 do
Do[past,n] = 1 did

Action = 1 Subject[n,g] VP[t,n] .
Reflexive = 1 Subject[n,g] Vp[t,n] Refl[n,g] .
State = 3 Subject[n,g] Be[t,n] Kind . | 3 Item[n] Be[t,n] Quality . | 1 Item[n] Be[t,n] Where .
Perfect = 2 Subject[n,g] Have[n] VP[part] . | 1 Subject[n,g] Have[n] Frequency VP[part] .
Polarity = 3 only Focus[n,g] Have[n] ever VP[part] .
Polarity = 2 even Focus[n,g] Have[n] Frequency VP[part] .
Polarity = 3 Subject[n,g] Have[n] not ever VP[part] . | 1 Subject[n,g] Have[n] not VP[part] .
Polarity = 1 no Noun[sg,g] has ever VP[part] .
Report = 3 Subject[n,g] Say[t,n] that Clause . | 2 Subject[n,g] Know[t,n] that Clause .
Report = 4 Subject[n,g] Know[t,n] what Gap .
Clause = 5 Inner[n,g] VP[t,n] | 1 Inner[n,g] Vp[t,n] Refl[n,g]
Gap = 4 Inner[n,g] Vt[t,n] | 1 Inner[n,g] Vt[t,n] Where
Inner[n,g] = 8 Nominative[n,g] | 1 Common[n,g] Relative[n]
Tough = 1 Item[n] Be[t,n] Hard to Vt[base] .
Raising = 1 Subject[n,g] Be[t,n] Likely to VP[base] . | 1 Subject[n,g] Seem[n] to VP[base] .
Raising = 2 Subject[n,g] Hope[n] to VP[base] .
There = 3 there Be[t,n] Weak[n] Entity[n] Where . | 2 there Seem[n] to be Weak[n] Entity[n] Where .
Entity[n] = 3 Noun[n,g] | 2 Thing[n]
Amount = 2 NP[n,g] Vt[t,n] at least Number Thing[pl] .
Amount = 3 no Noun[sg,g] Vt[t,sg] more than Number Thing[pl] .
Ellipsis = 3 NP[n,g] Vt[t,n] Number Quality Thing[pl] and NP[m,h] Vt[t,m] Number .
Ellipsis = 1 NP[n,g] Vt[t,n] Number Thing[pl] and NP[m,h] Vt[t,m] Number .
Passive = 1 Item[n] Be[t,n] Vt[part] by NP[m,h] .
Question = 3 what Do[t,n] NP[n,g] Vt[base] ? | 2 who Do[t,n] NP[n,g] Vp[base] ?
Question = 3 what did NP[n,g] Vt[base] Before Vt[ing] It ? | 1 who Vt[t,sg] It ?
Question = 3 what did NP[n,g] Say[base] Pronoun[m] Vt[past,m] ? | 2 Do[t,n] NP[n,g] VP[base] ?
Command = 4 Vt[base] It . | 3 then Vt[base] It . | 2 do not Vt[base] It .
Command = 1 Vt[base] It Where . | 2 Vt[base] It Before Vt[ing] It .
First = 3 i Vp[pres,pl] you . | 2 i Hope[pl] to VP[base] . | 2 i am Kind . | 1 i have VP[part] .
First = 2 my Kinsman[n,g] VP[pres,n] .

Opening[news] = 1 news :
Opening[story] = 1 story : once there was a Kind Noun[sg,g] .
Opening[letter] = 1 letter : dear Name[masc] , | 1 letter : dear Name[fem] ,
Opening[lecture] = 1 lecture :
Opening[recipe] = 1 recipe :
Opening[interview] = 1 interview :
"""

# Weights of the sentence types, and the mean number of sentences in a document's body.
SENTENCES = """
            news story letter lecture recipe interview
Action        10    18     10       6      6         6
Reflexive      4     7      4       6      1         2
State          5     6      6       6      5         4
Perfect        7     4      6       3      1         4
Polarity       6     4      4      14      1         4
Report        12    10      8      10      1         8
Tough          3     1      4       6      6         4
Raising        6     6      8       6      1         6
There          6     7      4       6      8         2
Amount         6     3      1      14      4         2
Ellipsis       6     4      3       4      6         3
Passive        9     3      2       3      3         2
Question       2     4      6       4      1        36
Command        0     0      2       0     30         0
First          0     0     16       0      0         0
LENGTH         6     8      5       7      6         5
"""

# Minimal pairs: linguistics_term -> (field, lines of `UID method = template`). The method is `one`
# or `two` (BLiMP's prefix methods) or `none`. A template is a row of symbols as in RULES;
# `good/bad` expands both with the same random numbers, so parallel classes give one lemma in two
# forms; `-` is nothing; `~n` is the other value of n; symbols with one `#label` are drawn alike.
# A line that begins with a space continues the one before.
PARADIGMS = {
    "anaphor_agreement": (
        "morphology",
        """
anaphor_gender_agreement one = NP[sg,masc] Vp[t,sg] himself/herself .
anaphor_gender_agreement one = NP[sg,fem] Vp[t,sg] herself/himself .
anaphor_number_agreement one = NP[n,g] Vp[t,n] Refl[n,g]/Refl[~n,g] .
""",
    ),
    "argument_structure": (
        "syntax",
        """
intransitive one = NP[n,g] Vi[t,n]/Vt[t,n] Where .
transitive one = NP[n,g] Vt[t,n]/Vi[t,n] It .
""",
    ),
    "binding": (
        "syntax_semantics",
        """
principle_A_case_1 one = NP[m,h] Say[t,m] that he/himself Vi[pres,sg] .
principle_A_case_1 one = NP[m,h] Say[t,m] that she/herself Vi[pres,sg] .
principle_A_case_1 one = NP[m,h] Say[t,m] that they/themselves Vi[pres,pl] .
principle_A_c_command one = Common[n,g] who Vp[past,n] NP[~n,h] Vp[past,n] Refl[n,g]/Refl[~n,h] .
""",
    ),
    "control_raising": (
        "syntax_semantics",
        """
existential_there_subject_raising one = there Seem[n]/Hope[n] to be Weak[n] Entity[n] Where .
tough_vs_raising_1 two = Item[n] Be[t,n] Hard/Likely to Vt[base] .
""",
    ),
    "determiner_noun_agreement": (
        "morphology",
        """
determiner_noun_agreement_1 one = NP[m,h] Vp[t,m] Strong[n] Noun[n,g]/Noun[~n,g] .
determiner_noun_agreement_with_adj_1 one = NP[m,h] Vt[t,m] Strong[n] Quality Thing[n]/Thing[~n] .
""",
    ),
    "ellipsis": (
        "syntax",
        """
ellipsis_n_bar_1 none =
    NP[n,g] Vt[t,n] Number Quality#1/- Thing[pl] and NP[m,h] Vt[t,m] Number -/Quality#1 .
""",
    ),
    "filler_gap_dependency": (
        "syntax",
        """
wh_vs_that_no_gap two = NP[n,g] Know[t,n] that/what NP[m,h] Vt[t,m] It .
wh_vs_that_with_gap_long_distance two =
    NP[n,g] Know[t,n] what/that Common[m,h] Relative[m] Vt[t,m] .
""",
    ),
    "irregular_forms": (
        "morphology",
        """
irregular_past_participle_adjectives one =
    the Irregular[part]/Irregular[past] Thing[n] Be[t,n] Quality .
irregular_past_participle_verbs one = NP[n,g] Have[n] Irregular[part]/Irregular[past] It .
""",
    ),
    "island_effects": (
        "syntax",
        """
adjunct_island none = what did NP[n,g] Vt[base] -/It#1 Before Vt[ing] It#1/- ?
wh_island one = what did NP[n,g] Say[base] Pronoun[m]/who Vt[past,m] ?
""",
    ),
    "npi_licensing": (
        "semantics",
        """
only_npi_licensor_present two = only/even Focus[n,g] Have[n] ever VP[part] .
sentential_negation_npi_licensor_present two = NP[n,g] Have[n] not/Frequency ever VP[part] .
""",
    ),
    "quantifiers": (
        "semantics",
        """
existential_there_quantifiers_1 two = there Be[t,n] Weak[n]/Strong[n] Noun[n,g] Where .
superlative_quantifiers_1 none = no Noun[sg,g] Vt[t,sg] more/at than/least Number Thing[pl] .
""",
    ),
    "subject_verb_agreement": (
        "morphology",
        """
adjacent_subject_verb_agreement one = Common[n,g] Vi[pres,n]/Vi[pres,~n] How .
adjacent_subject_verb_agreement one = Common[n,g] Vp[pres,n]/Vp[pres,~n] NP[m,h] .
adjacent_subject_verb_agreement one = Common[n,g] Have[n]/Have[~n] VP[part] .
distractor_agreement_relational_noun one =
    the Kinsman[n,g] of Common[~n,h] Vi[pres,n]/Vi[pres,~n] How .
distractor_agreement_relational_noun one = the Kinsman[n,g] of Common[~n,h] Be[t,n]/Be[t,~n] Kind .
distractor_agreement_relative_clause one =
    Common[n,g] that Common[~n,h] Vp[pres,~n] Vi[pres,n]/Vi[pres,~n] How .
distractor_agreement_relative_clause one =
    Common[n,g] who Vp[pres,n] Common[~n,h] Be[t,n]/Be[t,~n] Kind .
""",
    ),
}

Rule = tuple[float, tuple[str, ...]]


Words = list[tuple[str, str]]
"""(lemma, word) of a class."""


def _entries(text: str) -> list[list[str]]:
    return [entry.split("/") for entry in text.split()]


def _forms(entries: list[list[str]], **columns: int) -> Iterator[tuple[str, Words]]:
    """(features, words) of each column; `_` in its name stands for the comma between features."""
    for form, column in columns.items():
        yield form.replace("_", ","), [(entry[0], entry[column]) for entry in entries]


def _lexical_rules() -> Iterator[tuple[str, Words]]:
    """(preterminal, words). All forms of a class keep the lemmas' order."""
    for name, table in (("Noun", NOUNS), ("Kinsman", KIN)):
        for gender, text in table.items():
            for form, words in _forms(_entries(text), sg=0, pl=1):
                yield f"{name}[{form},{gender}]", words
    for form, words in _forms(_entries(THINGS), sg=0, pl=1):
        yield f"Thing[{form}]", words
    finite = {"pres_sg": 0, "pres_pl": 1, "past_sg": 2, "past_pl": 2, "base": 1}
    for name, text, other in (
        ("Vi", INTRANSITIVE, {"part": 3}),
        ("Vt", TRANSITIVE, {"part": 3, "ing": 4}),
        ("Vp", PERSONAL, {"part": 3}),
        ("Say", SAYING, {}),
        ("Know", KNOWING, {}),
    ):
        for form, words in _forms(_entries(text), **finite, **other):
            yield f"{name}[{form}]", words
    irregular = [e for e in _entries(TRANSITIVE) if e[2] != e[3]]
    for form, words in _forms(irregular, past=2, part=3):
        yield f"Irregular[{form}]", words
    for name, text in WORDS.items():
        yield name, [(word, word) for word in text.split()]
    for gender, text in NAMES.items():
        yield f"Name[{gender}]", [(word, word) for word in text.split()]


def _features(symbol: str) -> list[str]:
    return symbol[symbol.index("[") + 1 : -1].split(",") if "[" in symbol else []


def _bind(symbol: str, values: dict[str, str]) -> str:
    if "[" not in symbol:
        return symbol
    return f"{symbol[: symbol.index('[')]}[{','.join(values.get(f, f) for f in _features(symbol))}]"


def _bindings(symbols: Iterable[str]) -> Iterator[dict[str, str]]:
    """Every assignment of the variables in `symbols`."""
    names = sorted({f for symbol in symbols for f in _features(symbol)} & VALUES.keys())
    for values in itertools.product(*(VALUES[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _phrase_rules(prior: dict[str, float]) -> Iterator[tuple[str, Rule]]:
    """`RULES` with every variable bound; weights are not yet normalised."""
    for line in filter(None, RULES.splitlines()):
        left, _, alternatives = line.partition(" = ")
        for alternative in alternatives.split(" | "):
            weight, *right = alternative.split()
            for outer in _bindings([left]):
                bound = [_bind(symbol, outer) for symbol in right]
                for inner in _bindings(bound):
                    share = float(weight)
                    for value in inner.values():
                        share *= prior[value]
                    yield _bind(left, outer), (share, tuple(_bind(s, inner) for s in bound))


def _body_rules(register: str) -> Iterator[tuple[str, Rule]]:
    """Documents of a register: an opening, a geometric number of sentences, the end token."""
    lines = list(map(str.split, SENTENCES.strip().splitlines()))
    column = lines[0].index(register) + 1
    table = {line[0]: float(line[column]) for line in lines[1:]}
    length = table.pop("LENGTH")
    yield "Document", (1.0, (f"Opening[{register}]", "Body", EOS))
    yield "Body", (1 / length, ("Sentence",))
    yield "Body", (1 - 1 / length, ("Sentence", "Body"))
    for name, weight in table.items():
        if weight:
            yield "Sentence", (weight, (name,))


def _rules(register: str) -> dict[str, list[Rule]]:
    rules: dict[str, list[Rule]] = defaultdict(list)
    prior = PRIOR | {"past": PAST[register], "pres": 1 - PAST[register]}
    for left, rule in itertools.chain(_phrase_rules(prior), _body_rules(register)):
        rules[left].append(rule)
    ranks: dict[str, int] = {word: i for i, word in enumerate(FAVOURITES[register].split())}
    for left, words in _lexical_rules():
        by_rank = sorted(words, key=lambda entry: ranks.get(entry[0], len(ranks)))  # stable
        for rank, (_, word) in enumerate(by_rank, start=1):
            rules[left].append((rank ** -ZIPF[register], (word,)))
    for left, alternatives in rules.items():
        total = sum(weight for weight, _ in alternatives)
        rules[left] = [(weight / total, right) for weight, right in alternatives]
    return dict(rules)


def _vocabulary() -> list[str]:
    words = {word for _, entries in _lexical_rules() for _, word in entries}
    words |= {s for s in RULES.split() if re.fullmatch(r"[a-z]+|[.,:?]", s)}
    return [EOS, *sorted(words)]


_WORDS = _vocabulary()
_IDS = {word: i for i, word in enumerate(_WORDS)}
VOCAB_SIZE = len(_WORDS)
EOS_ID = _IDS[EOS]
_WORD_IDS = {word: i for word, i in _IDS.items() if word != EOS}
_CAPITAL = {"i", *" ".join(NAMES.values()).split()}


class Grammar:
    """The grammar of one register, normalised and compiled to integers for sampling.

    `rules[left]` is a list of (probability, right side). Symbols below `VOCAB_SIZE` are token ids,
    the others are left sides, in the order of `rules`.
    """

    def __init__(self, register: str) -> None:
        self.rules = _rules(register)
        self.symbols = _IDS | {left: VOCAB_SIZE + i for i, left in enumerate(self.rules)}
        self._cuts: list[list[float]] = []
        self._rights: list[list[list[int]]] = []
        for alternatives in self.rules.values():
            self._cuts.append(np.cumsum([p for p, _ in alternatives])[:-1].tolist())
            self._rights.append([[self.symbols[s] for s in reversed(r)] for _, r in alternatives])

    def expand(self, symbol: str, uniform: Callable[[], float]) -> list[int]:
        """Token ids of one random expansion of `symbol` (a left side or a word)."""
        cuts, rights = self._cuts, self._rights
        out: list[int] = []
        stack = [self.symbols[symbol]]
        while stack:
            top = stack.pop() - VOCAB_SIZE
            if top < 0:
                out.append(top + VOCAB_SIZE)
            else:
                stack += rights[top][bisect_right(cuts[top], uniform())]
        return out

    def expectations(self) -> tuple[float, np.ndarray]:
        """Entropy of a document in nats, and the expected count of each id in it, (VOCAB_SIZE,).

        With M[i, j] the expected number of symbols j on the right side of i, the expected number
        of times that each left side is expanded solves v = e_Document + v M. The chain rule then
        gives H = sum_i v_i H(p_i), p_i the probabilities of i's alternatives; counts are v T, with
        T the part of M that concerns words.
        """
        size = len(self.rules)
        production = np.zeros((size, VOCAB_SIZE + size))
        local = np.zeros(size)
        for i, alternatives in enumerate(self.rules.values()):
            for p, right in alternatives:
                local[i] -= p * np.log(p)
                for symbol in right:
                    production[i, self.symbols[symbol]] += p
        start = np.zeros(size)
        start[self.symbols["Document"] - VOCAB_SIZE] = 1.0
        visits = np.linalg.solve(np.eye(size) - production[:, VOCAB_SIZE:].T, start)
        return float(visits @ local), visits @ production[:, :VOCAB_SIZE]


@cache
def grammar(register: str) -> Grammar:
    return Grammar(register)


@cache
def _expectations(register: str) -> tuple[float, np.ndarray]:
    return grammar(register).expectations()


@cache
def entropy_rate(register: str | None = None) -> float:
    """Nats per token that no model can beat: H(document) / E[tokens of a document, end included].

    Documents are independent, so this is the entropy rate of the stream of them (renewal-reward).
    Without a register, H also counts the choice of the register; with one, that choice is given.
    """
    if register is not None:
        entropy, counts = _expectations(register)
        return entropy / float(counts.sum())
    prior = np.array(list(REGISTER_PRIOR.values()))
    parts = [_expectations(name) for name in REGISTERS]
    entropy = float(prior @ [h for h, _ in parts] - prior @ np.log(prior))
    return entropy / float(prior @ [counts.sum() for _, counts in parts])


def unigram() -> np.ndarray:
    """Share of each id in the stream, (VOCAB_SIZE,): expected counts of a document, normalised."""
    counts = sum(p * _expectations(name)[1] for name, p in REGISTER_PRIOR.items())
    return np.asarray(counts) / np.sum(counts)


@cache
def unigram_entropy() -> float:
    """Entropy of `unigram` in nats: the loss of a model that knows frequencies only."""
    share = unigram()
    share = share[share > 0]
    return float(-(share @ np.log(share)))


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _uniforms(rng: np.random.Generator) -> Callable[[], float]:
    """Draws from [0, 1), one per call, made in batches: a call of numpy costs more than a token."""
    return itertools.chain.from_iterable(iter(lambda: rng.random(512).tolist(), None)).__next__


class GrammarStream(RowStream):
    """Rows of the endless packed stream of documents, each followed by EOS (a `TokenStream`).

    Global row j is row j % 64 of block j // 64; inside a block, row i is tokens [i T, i T + T].
    """

    def __init__(self, *, seq_len: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank=rank, world=world)
        self.seq_len, self.seed = seq_len, seed
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def next_rows(self, n: int) -> np.ndarray:
        first = self._row + self._rank
        self._row += n * self._world
        if n == 0:
            return np.empty((0, self.seq_len + 1), dtype=np.int64)
        return np.stack([self._read(first + k * self._world) for k in range(n)])

    def _read(self, row: int) -> np.ndarray:
        block, offset = divmod(row, BLOCK_ROWS)
        if self._block[0] != block:
            self._block = (block, self._generate(block))
        start = offset * self.seq_len
        return self._block[1][start : start + self.seq_len + 1]

    def _generate(self, block: int) -> np.ndarray:
        rng = _generator(self.seed, TRAIN, block)
        phase = int(rng.integers(PHASE_TOKENS))
        uniform = _uniforms(rng)
        cuts = np.cumsum(list(REGISTER_PRIOR.values()))[:-1].tolist()
        stop = phase + BLOCK_ROWS * self.seq_len + 1
        tokens: list[int] = []
        while len(tokens) < stop:
            tokens += grammar(REGISTERS[bisect_right(cuts, uniform())]).expand("Document", uniform)
        return np.array(tokens[phase:stop], dtype=np.int64)


class GrammarTokenizer:
    """One id per word or punctuation mark, whatever its case (a `Tokenizer`)."""

    vocab_size = VOCAB_SIZE
    eos_id = EOS_ID

    def encode(self, text: str) -> list[int]:
        """Raises DataError at a word that the grammar does not have."""
        try:
            return [_WORD_IDS[word] for word in re.findall(r"[.,:?]|[^\s.,:?]+", text.lower())]
        except KeyError as error:
            word = error.args[0]
            raise DataError(
                f"text must consist of the grammar's {VOCAB_SIZE - 1} words, got {word!r}."
                f"{nearest(word, _WORDS[1:])}"
            ) from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text with capitals and attached punctuation; EOS becomes a line break."""
        out, capital = "", True
        for word in (_WORDS[i] for i in ids):
            if word == EOS:
                out += "\n"
            elif word in ".,:?":
                out += word
            else:
                out += " " if out and not out.endswith("\n") else ""
                out += word.capitalize() if capital or word in _CAPITAL else word
            capital = word in (".", ":", "?", EOS)
        return out


def documents(register: str, count: int, *, seed: int) -> list[str]:
    """Held-out documents of a register, without EOS, from a key space that no stream draws from."""
    decode = GrammarTokenizer().decode
    key = REGISTERS.index(register)
    return [
        decode(
            grammar(register).expand("Document", _uniforms(_generator(seed, HELD_OUT, key, i)))[:-1]
        )
        for i in range(count)
    ]


def minimal_pairs(*, pairs_per_paradigm: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs in BLiMP's fields, by `PARADIGMS`; those of one UID differ from each other.

    Words are drawn as in the text, each pair in one register, so what is rare there is rare here.
    """
    records, decode = [], GrammarTokenizer().decode
    for number, (term, (field, table)) in enumerate(PARADIGMS.items()):
        paradigms: dict[tuple[str, str], list[str]] = defaultdict(list)
        for line in filter(None, table.replace("\n ", " ").splitlines()):
            head, _, template = line.partition(" = ")
            uid, method = head.split()
            paradigms[uid, method].append(template)
        for i, ((uid, method), templates) in enumerate(paradigms.items()):
            rng = _generator(seed, PAIRS, number, i)
            for pair_id, (good, bad) in enumerate(_draw_pairs(templates, pairs_per_paradigm, rng)):
                records.append(
                    {
                        "sentence_good": decode(good),
                        "sentence_bad": decode(bad),
                        "field": field,
                        "linguistics_term": term,
                        "UID": uid,
                        "simple_LM_method": True,
                        "one_prefix_method": method == "one",
                        "two_prefix_method": method == "two",
                        "lexically_identical": sorted(good) == sorted(bad),
                        "pairID": str(pair_id),
                    }
                )
    return records


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _draw_pairs(templates: list[str], count: int, rng: np.random.Generator) -> Iterator[Pair]:
    """`count` pairs, new ones as long as a hundred draws in a row bring one."""
    seen: set[Pair] = set()
    for _ in range(count):
        pair = _draw_pair(templates, rng)
        for _ in range(100):
            if pair not in seen:
                break
            pair = _draw_pair(templates, rng)
        seen.add(pair)
        yield pair


def _draw_pair(templates: list[str], rng: np.random.Generator) -> Pair:
    register = str(rng.choice(REGISTERS, p=list(REGISTER_PRIOR.values())))
    template = templates[int(rng.integers(len(templates)))]
    prior = PRIOR | {"past": PAST[register], "pres": 1 - PAST[register]}
    values: dict[str, str] = {}
    for name in "nmght":
        weights = np.array([prior[v] for v in VALUES[name]])
        values[name] = str(rng.choice(VALUES[name], p=weights / weights.sum()))
    for name in "nm":
        values[f"~{name}"] = "pl" if values[name] == "sg" else "sg"
    draws: dict[str, list[float]] = {}
    sides: tuple[list[int], list[int]] = ([], [])
    for position, item in enumerate(template.split()):
        good, _, bad = item.partition("/")
        for side, term in zip(sides, (good, bad or good), strict=True):
            symbol, _, label = term.partition("#")
            uniforms = draws.setdefault(label or f"at {position}", rng.random(64).tolist())
            if symbol != "-":
                side += grammar(register).expand(_bind(symbol, values), iter(uniforms).__next__)
    return tuple(sides[0]), tuple(sides[1])

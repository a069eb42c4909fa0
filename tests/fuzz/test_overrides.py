"""Any override gives one line that says what is wrong, or the config that was asked for.

Hundreds of values at any key go through parsing, typing and validation; keys, flags and searches
through `run.py` itself. There is never a traceback, a hang, or a file outside output_dir.
"""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode

from experiments import schema, typos
from experiments.identity import config_from_json, config_to_json, run_id
from hydra_plugins.relora_sweeps._axes import expand_arms
from hydra_plugins.relora_sweeps._compose import Composer
from relora_core.config import ConfigError, get, printable, validate
from tests.fuzz import command_line

SEARCH = ("--plan", "hydra/sweeper=search", "search=lr_and_rank")
REFUSED = {
    "option that is a number": (["relora=3"], "relora must be one of as_coded"),
    "option that is null": (["model=null"], "model must be one of large"),
    "option that is a list": (["relora=[1,2]"], "relora must be one of as_coded"),
    "options that are numbers": (["-m", "relora=1,2"], "relora must be one of as_coded"),
    "no key": (["=1"], "is not an override"),
    "package alone": (["@package=1"], "is not an override"),
    "search that is a number": (["search=5"], "search must be one of"),
    "newline in an option": (["experiment='a\nb'"], r"got 'a\nb'"),
    "newline in a value": (["relora.r='a\nb'"], r"relora.r must be an integer, got 'a\nb'"),
    "terminal codes": (["model='\x1b[31m'"], r"got '\x1b[31m'"),
    "dict for a number": (["relora.r={a: 1}"], "relora.r must be an integer, got '{'a': 1}'"),
    "null for a number": (["relora.r=null"], "relora.r must be an integer, got null"),
    "list in a list": (["relora.target_modules=[a,[b]]"], "must be a list of text, got ['b'] in"),
    "dict in a list": (["relora.target_modules=[{a: 1}]"], "must be a list of text, got {'a': 1}"),
    "superscript": (["relora.full_rank_modules=['last:²']"], "relora.full_rank_modules must name"),
    "huge integer": (["train.steps=99999999999999999999999"], "train.steps must be <= 2147483647"),
    "more layers than memory": (["model.n_layers=2000000000"], "<= 10000, got 2000000000"),
    "restarts without end": (
        ["train.steps=2000000000", "relora.reset_frequency=20", "schedule.warmup_steps=0"],
        "relora.reset_frequency must be >= 2000",
    ),
    "unknown key with a plus": (["+foo=1"], "foo is not a known key"),
    "_target_": (["+_target_=os.system"], "_target_ is not a known key"),
    "known key with a plus": (["+relora.r=3"], "expected relora.r=3, got '+relora.r=3'"),
    "glob in one run": (["relora=glob(*)"], "glob(*)"),
    "flag without its partner": (["--resolve"], "--resolve flag can only be used"),
    "flag without a command": (["--shell-completion"], "one subcommand"),
    "number for a truth value": (["relora.joint_mask=5"], "must be true or false, got 5"),
    "no output_dir": (["output_dir="], "output_dir must name a folder, got ''"),
    "zero byte": (["output_dir='a\0b'"], "output_dir must be text in UTF-8"),
    "half a character": (["sweep.arm='\udcff'"], "sweep.arm must be text in UTF-8"),
    "Hydra's own folder": (["hydra.output_subdir=.hydra"], "output_dir says where"),
    "Hydra's run folder": (["hydra.run.dir=elsewhere"], "output_dir says where"),
    "Hydra's log": (["hydra/job_logging=default"], "output_dir says where"),
    "callback": (["+hydra.callbacks.x._target_=os.getcwd"], "hydra.callbacks.x._target_ must be"),
    "target": (["-m", "hydra.sweeper._target_=os.system"], "hydra.sweeper._target_ must be"),
    "Hydra's sweeper": (["-m", "hydra/sweeper=basic"], "hydra/sweeper must be one of"),
    "endless axis": (["-m", "relora.r=range(1,100000000000)"], "at most 100000 values"),
    "axis without a step": (["-m", "relora.r=range(1,5,0)"], "at most 100000 values"),
    "endless product": (
        ["-m", "seed=range(1000)", "relora.r=range(1,1001)"],
        "a grid must have at most 100000 points, got 1000000",
    ),
    "two output folders": (["-m", "output_dir=a,b"], "output_dir must be one folder per command"),
    "search without a searcher": (["search.n_trials=3"], "search must be none without a search"),
    "search in a grid": (["-m", "search.n_trials=3"], "needs hydra/sweeper=search"),
    "endless seeds": ([*SEARCH, "search.seeds=99999999999"], "search.seeds must be <= 10000"),
    "sampler that is a number": ([*SEARCH, "search.sampler=5"], "search.sampler.name must be one"),
    "sampler that is null": ([*SEARCH, "search.sampler=null"], "search.sampler.name must be one"),
    "sampler's option": ([*SEARCH, "+search.sampler.bogus=1"], "search.sampler"),
    "direction that is a list": (
        [*SEARCH, "search.objectives=[{metric: x, direction: []}]"],
        "search.objectives must have text as direction",
    ),
    "metric that is a number": (
        [*SEARCH, "search.objectives=[{metric: 5}]"],
        "search.objectives must have text as metric",
    ),
    "enqueued number": ([*SEARCH, "search.enqueue=[5]"], "search.enqueue[0] must be"),
    "enqueued key": ([*SEARCH, "search.enqueue=[{nope: 1}]"], "search.enqueue[0]"),
    "space that is a number": ([*SEARCH, "search.space=5"], "search.space must be {key: value"),
    "space that is null": ([*SEARCH, "search.space=null"], "search.space must be {key: value"),
    "conditions that are a number": ([*SEARCH, "search.when=5"], "search.when must be {key: value"),
}  # fmt: skip


def check_refusal(answer: command_line.Answer, expected: str) -> None:
    assert command_line.faults(answer) == []
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert expected in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_fault_that_fuzzing_found_is_one_line(case, tmp_path):
    words, expected = REFUSED[case]
    check_refusal(command_line.run_py(words, cwd=tmp_path), expected)
    assert list(tmp_path.iterdir()) == []


# every key, any value ---------------------------------------------------------------------------
KEYS = [key for key in typos.schema_keys() if key not in ("relora.rank_schedule",)]
NUMBERS = [0, 1, -1, 2, 3, 7, 16, 48, 96, 1000, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30)]
FLOATS = [0.0, -0.5, 0.5, 1.0, 1e-3, 1e-300, 1e300, math.inf, -math.inf, math.nan]
WORDS = ["", "x", "null", "true", "a b", "a/b", "../../x", "${seed}", "${nope}", "${oc.env:HOME}"]
WORDS += [
    "???",
    "é",
    "\n",
    "\t",
    "\x1b[2J",
    "'",
    '"',
    "\\",
    "a\nb",
    "日本",
    "١٢",
    "²",
    "1e3",
    "0x10",
]
WORDS += ["1_0", " 5 ", "%s", "{0}", "_target_", "$(touch x)", "`x`", "~", "*", "=", "a=b", "\0"]


def _quoted(text: str) -> str:
    escaped = text.replace("\\'", "\\\\'").replace("'", "\\'")
    return "'" + escaped + ("\\" if escaped.endswith("\\") else "") + "'"


def _value(draw: random.Random, *, depth: int = 0) -> tuple[str, Any]:
    """A value as Hydra's grammar writes it, and the Python value that is meant."""
    kind = draw.choice("iiffwwbn" + ("ld" if depth < 3 else ""))
    if kind == "i":
        number = draw.choice(NUMBERS)
        return str(number), number
    if kind == "f":
        number = draw.choice(FLOATS)
        return repr(number), number
    if kind == "b":
        truth = draw.random() < 0.5
        return str(truth).lower(), truth
    if kind == "n":
        return "null", None
    if kind == "w":
        word = draw.choice(WORDS)
        return _quoted(word), word
    parts = [_value(draw, depth=depth + 1) for _ in range(draw.randrange(4))]
    if kind == "l":
        return "[" + ",".join(text for text, _ in parts) + "]", [meant for _, meant in parts]
    return (
        "{" + ",".join(f"k{i}: {text}" for i, (text, _) in enumerate(parts)) + "}",
        {f"k{i}": meant for i, (_, meant) in enumerate(parts)},
    )


def _key(draw: random.Random) -> str:
    """Mostly a real key, sometimes one that is nearly one."""
    key = draw.choice(KEYS)
    change = draw.randrange(12)
    if change == 0:
        at = draw.randrange(len(key))
        return key[:at] + key[at + 1 :]
    if change == 1:
        return f"{key}.{draw.choice(['x', '0', '_target_', 'r'])}"
    return draw.choice([key.rpartition(".")[2], "search", "hydra"]) if change == 2 else key


def _as_meant(got: Any, meant: Any) -> bool:
    """Whether it is the same value, or the only reading of it in the type of the key."""
    if isinstance(meant, str) and "${" in meant:
        return True  # it stands for the value of another key
    if isinstance(got, float) and isinstance(meant, float) and math.isnan(meant):
        return math.isnan(got)
    if isinstance(got, list) and isinstance(meant, list):
        return len(got) == len(meant) and all(map(_as_meant, got, meant))
    if isinstance(got, bool) or isinstance(meant, bool):
        words = ("true", "yes", "on", "y", "1") if got else ("false", "no", "off", "n", "0")
        return str(got) == str(meant) or str(meant).lower() in words
    if isinstance(got, (int, float)) and isinstance(meant, (str, int)):
        return float(meant) == got
    return got == meant or (isinstance(got, str) and got == str(meant))


@pytest.fixture(scope="module")
def composer():
    """A grid's composer that composes its base once."""
    GlobalHydra.instance().clear()
    with schema.initialized():
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["model=nano"], run_mode=RunMode.MULTIRUN)
        made = Composer(loader, master)
        made._base = cache(made._base)  # type: ignore[method-assign]
        yield made


def one_value(composer: Composer, seed: int) -> bool:
    """Whether the config was accepted; AssertionError unless as meant, or refused in a line."""
    draw = random.Random(seed)
    key = _key(draw)
    text, meant = _value(draw)
    word = f"{key}={text}"
    try:
        with command_line.timed():
            typos.check_arguments([word])
            [config] = composer.all([[word]])
            validate(config)
            name, frozen = run_id(config), config_to_json(config)
    except (ConfigError, HydraException) as error:
        refused = isinstance(error, ConfigError)  # a key that is no key to Hydra's grammar is not
        line = str(error) if refused else typos.diagnose([word], error)
        assert line == printable(line), word
        assert len(line) > 10, word
        return False
    assert config_from_json(frozen) == config, word
    assert name == Path(name).name, word
    assert len(name) < 128, word
    if not isinstance(meant, dict):
        assert _as_meant(get(config, key), meant), (word, get(config, key))
    return True


def test_a_value_is_refused_in_one_line_or_taken_as_it_was_meant(composer):
    assert 1 < sum(one_value(composer, seed) for seed in range(60)) < 59


@pytest.mark.slow
def test_so_are_600_values(composer):
    accepted = sum(one_value(composer, 1000 + seed) for seed in range(600))
    assert 30 < accepted < 450  # some cases are right, some wrong


# complete command lines -------------------------------------------------------------------------
def _word(draw: random.Random) -> str:
    sign = draw.choice(["", "", "", "+", "++", "~"])
    if draw.random() < 0.3:
        group = draw.choice([*typos.groups(), "hydra/launcher", "hydra/sweeper", "modle"])
        options = typos.options(group) or ["local", "slurm", "relora_grid", "search", "basic"]
        option = draw.choice(
            [*options, "nope", "null", "3", "[tiny]", "{}", "''", "../x", "glob(*)"]
        )
        return f"{sign}{group}={option}"
    key, (text, _) = _key(draw), _value(draw)
    if draw.random() < 0.4:
        several = [f"{text},{_value(draw)[0]}", f"choice({text})", "range(1,3)", "range(3,1)"]
        several += ["glob(*)", "interval(0,1)", f"shuffle({text})", f"int({text})"]
        text = draw.choice(several)
    return f"{sign}{key}={text}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_command_line_of_anything_ends_cleanly(seed, tmp_path):
    draw = random.Random(seed)
    words = [_word(draw) for _ in range(draw.choice([1, 1, 2, 3]))]
    if draw.random() < 0.5:
        words.insert(draw.randrange(len(words) + 1), draw.choice(["-m", "--plan"]))
    answer = command_line.run_py(words, cwd=tmp_path)
    assert command_line.faults(answer) == [], (words, answer)
    assert list(tmp_path.iterdir()) == [], words


def test_an_arm_that_is_added_with_a_plus_is_the_arm_that_is_taken(composer):
    arms = {"one": ["seed=1"], "two": ["seed=2"]}
    for word in ("sweep.arm=two", "+sweep.arm=two", "++sweep.arm=two", "sweep.arm='two'"):
        cells = expand_arms([], arms=arms, arguments=[word], loader=composer.loader)
        assert cells == [["seed=2", "sweep.arm=two"]]

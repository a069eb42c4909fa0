"""blimp/blimp.py: the published metric's interface, through `evaluate` and without it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from relora_core import foreign
from relora_core.config import BlimpConfig, ConfigError
from relora_core.evals import blimp
from tests.foreign_models import PAIRS, needs_transformers, save, save_texts

FILE = Path(__file__).resolve().parents[1] / "blimp" / "blimp.py"
pytestmark = needs_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and BLiMP's files."""
    made = tmp_path_factory.mktemp("metric")
    save(made / "tiny", "llama")
    save_texts(made)
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module where `evaluate` is not installed."""
    monkeypatch.setitem(sys.modules, "evaluate", None)
    spec = importlib.util.spec_from_file_location("blimp_alone", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.library is None
    return module


def accuracies(folder: Path, scoring: str) -> dict[str, float]:
    """As our own eval has them."""
    one = foreign.load(str(folder / "tiny"), name="x")
    pairs = blimp.load(BlimpConfig(path=str(folder / "blimp")))
    windows = blimp.windows(pairs, tokenizer=one.tokenizer)
    table = blimp.evaluate(one.model, pairs=pairs, windows=windows).tables["blimp_paradigms"]
    return {row["uid"]: row[scoring] for row in table}


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What our eval is called with from now on."""
    seen: list[dict[str, Any]] = []
    real = blimp.evaluate
    monkeypatch.setattr(
        blimp, "evaluate", lambda model, **kw: (seen.append(kw), real(model, **kw))[1]
    )
    return seen


@pytest.mark.parametrize("scoring", ["no_bos", "eos_prefix"])
def test_it_gives_what_our_eval_gives(folder, alone, scoring, monkeypatch):
    seen = spied(monkeypatch)
    common = {"model_id": str(folder / "tiny"), "data": str(folder / "blimp"), "scoring": scoring}
    got = alone.Blimp().compute(predictions=["*"], **common)
    want = accuracies(folder, scoring)
    assert got["by_uid"] == want
    [(name, windows)] = seen[0]["windows"].items()
    assert name == scoring
    assert (windows[0].ids[0] == 0) == (scoring == "eos_prefix")  # <s>
    assert got["accuracy"] == pytest.approx(sum(want.values()) / len(want))
    [(phenomenon, share)] = got["by_phenomenon"].items()
    assert (phenomenon, share) == ("argument_structure", pytest.approx(got["accuracy"]))
    one = alone.Blimp().compute(predictions=["same"], **common)
    assert one["by_uid"] == {"same": float(scoring == "eos_prefix")}  # a tie


def test_the_first_pairs_of_each_paradigm_are_scored(folder, alone, monkeypatch):
    seen = spied(monkeypatch)
    monkeypatch.setenv("RELORA_BLIMP", str(folder / "blimp"))
    alone.Blimp().compute(predictions=["*"], model_id=str(folder / "tiny"), samples_per_set=1)
    assert [pair.good for pair in seen[0]["pairs"]] == [pairs[0][0] for pairs in PAIRS.values()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predictions": ["smae"]}, "Did you mean 'same'?"),
        ({"predictions": []}, "got none"),
        ({"scoring": "bos"}, "scoring must be one of no_bos, eos_prefix"),
        ({"samples_per_set": 0}, "samples_per_set must be >= 1"),
        ({"data": None}, "RELORA_BLIMP"),
    ],
)
def test_a_wrong_argument_is_one_line(folder, alone, monkeypatch, changes, words):
    monkeypatch.delenv("RELORA_BLIMP", raising=False)
    usual = {"predictions": ["*"], "model_id": "none", "data": str(folder / "blimp")}
    with pytest.raises(ConfigError) as caught:
        alone.Blimp().compute(**(usual | changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("evaluate") is None, reason="evaluate is not installed"
)
@pytest.mark.filterwarnings("ignore")  # what third parties warn of is not ours to answer for
def test_evaluate_loads_the_folder(folder, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(
        "evaluate.loading.init_hf_modules", lambda cache=None: _modules(tmp_path, monkeypatch)
    )
    metric = evaluate.load(str(FILE.parent), cache_dir=str(tmp_path / "cache"))
    words = {"model_id": str(folder / "tiny"), "data": str(folder / "blimp")}
    got = metric.compute(predictions=["same", "first_words"], **words)
    want = accuracies(folder, "no_bos")
    assert got["by_uid"] == {uid: want[uid] for uid in ("first_words", "same")}


def test_the_pages_lines_work(folder, alone, monkeypatch):
    """Those of docs/evaluate.md, where a tiny model and its files stand for the named ones."""
    page = (FILE.parents[1] / "docs" / "evaluate.md").read_text()
    lines = re.findall(r"^    (import evaluate|metric.*)$", page, flags=re.M)
    assert len(lines) >= 4
    seen = spied(monkeypatch)
    loaded: list[str] = []
    library = SimpleNamespace(load=lambda name: (loaded.append(name), alone.Blimp())[1])
    monkeypatch.setitem(sys.modules, "evaluate", library)
    names = {"gpt2": folder / "tiny", "blimp_data.tar.xz": folder / "blimp", "passive_1": "same"}
    code = "\n".join(lines)
    for name, own in names.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(own)))
    exec(code, {})
    assert loaded == ["blimp"]
    assert (FILE.parents[1] / "blimp").is_dir()
    assert [len({pair.uid for pair in one["pairs"]}) for one in seen] == [len(PAIRS), 1]


def _modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `evaluate` puts copies of modules: not in the user's cache."""
    place = folder / "modules"
    place.mkdir(exist_ok=True)
    (place / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(place))
    return str(place)

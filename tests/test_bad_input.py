"""A user's mistake is one line that names key, value and what was expected; nothing is written."""

import json
from pathlib import Path

import pytest

from experiments import schema
from experiments.__main__ import main
from experiments.run.complete import complete
from relora_core.config import ConfigError
from sweeps.__main__ import build_parser
from sweeps.__main__ import main as sweeps_main
from tests import warm

ROOT = Path(__file__).resolve().parents[1]

OVERRIDES = [
    (
        ["model=tny"],
        "model must be one of large, llama_130m, llama_1b, llama_350m, llama_60m, medium, micro, "
        "nano, pico_192, pico_288, small, tiny, got 'tny'. Did you mean 'tiny'?",
    ),
    (["relora.rr=8"], "relora.rr is not a known key (relora.rr=8). Did you mean 'relora.r'?"),
    (["relora.r=eight"], "relora.r must be an integer, got 'eight'"),
    (["relora.r=-1"], "relora.r must be >= 0, got -1; nearest valid: 0"),
    (["relora.r=4096"], "nearest valid: 32"),
    (["relora.prune_ratio=1.5"], "relora.prune_ratio must be >= 0 and <= 1, got 1.5"),
    (["train.lr=fast"], "train.lr must be a number, got 'fast'"),
    (["seed=1.5"], "seed must be an integer, got '1.5'"),
    (
        ["relora.target_modules=attention"],
        "must be a list of text, like [attention,swiglu], got 'attention'; nearest valid: "
        "relora.target_modules=[attention]",
    ),
    (["relora.rank_schedule=5"], "relora.rank_schedule must be a list of lists of integers, got 5"),
    # Characters that a shell, an editor or a keyboard may put there.
    (["relora.r=\uff14"], "relora.r must be an integer, got '\uff14'; nearest valid: relora.r=4"),
    (["relora.r=\u201c4\u201d"], "nearest valid: relora.r=4"),
    (["rélora.r=4"], "rélora.r is not a known key (rélora.r=4). Did you mean 'relora.r'?"),
    (["output_dir=größe"], "is quoted, 'output_dir=\"größe\"'"),
    (["relora.r:4"], "is not an override: expected KEY=VALUE, for example relora.r=16; nearest "
     "valid: relora.r=4"),
    (
        ["relora.r=4,", "8"],
        "'relora.r=4,' is not an override: expected KEY=VALUE, got one that ends in a comma: "
        "values of an axis go without spaces",
    ),
    (["relora.r={4,8}"], "values of an axis go without brackets, relora.r=4,8"),
    (["seed='4"], "got quotes or braces that do not close"),
    (["seed=rang(5)"], "Did you mean 'range'?"),
    (["--relora.r=4"], "'--relora.r=4' is no flag: expected KEY=VALUE without dashes, relora"),
    (["--config-dir=/nowhere"], "--config-dir must be a folder of options, got '/nowhere'"),
    (["-cd", "/nowhere"], "--config-dir must be a folder of options, got '/nowhere'"),
    # Keys and options in the wrong place.
    (["~seed"], "seed cannot be left out: expected seed=VALUE, got '~seed'"),
    (["~relora.r"], "relora.r cannot be left out: expected relora.r=VALUE, got '~relora.r'"),
    (["~seeds"], "seeds is not a known key (~seeds). Did you mean 'seed'?"),
    (["+relora.r=4"], "relora.r is there already: expected relora.r=4, got '+relora.r=4'"),
    (["model@x=nano"], "model goes to its own place: expected model=OPTION, got 'model@x=nano'"),
    (["+model@x=nano"], "model goes to its own place: expected model=OPTION"),
    (["train={stepz: 5}"], "train.stepz is not a known key. Did you mean 'train.steps'?"),
    (["train=5"], "train must hold keys such as train.steps, got 5"),
    (["hydra.launcher.max_parallel=two"], "must be an integer or null, got 'two'"),
    (["hydra.launcher.max_parallel=1,2"],
     "hydra.launcher.max_parallel must be the same for all runs of a command, got '1,2'"),
    (["hydra/launcher=slurm,local"], "hydra/launcher must be the same for all runs of a command"),
    # Values that refer to others.
    (["relora.r=${relora.rr}"],
     "relora.r: ${relora.rr} is none, since there is no such key. Did you mean 'relora.r'?"),
    (["relora.r=${HOME}"], "relora.r: ${HOME} is none, since there is no such key. A variable of"),
    (["relora.r=${oc.env:NOT_SET}"], "relora.r: Environment variable 'NOT_SET' not found"),
    (["train.eps='${divide:${train.lr},0}'"],
     "train.eps: ${divide:...} must have numbers, the second on not 0, got 0.003,0"),
    (["train.eps='${divide:${method},2}'"], "must have numbers, the second on not 0, got relora,2"),
    (["train.eps='${divide:${train.lr}}'"], "must have numbers, the second on not 0, got 0.003"),
    (["relora.r=${a b}"], "relora.r: ${...} must name a key, or a variable as ${oc.env:NAME}"),
    (["relora.r=${relora.r"], "got quotes or braces that do not close"),
    (["trian.steps=3"], "trian.steps is not a known key (trian.steps=3). Did you mean"),
    (["steps=3"], "steps is not a known key (steps=3). Did you mean 'train.steps'?"),
    (["foo"], "'foo' is not an override: expected KEY=VALUE"),
    (["train.steps=null"], "train.steps"),
    (
        ["train.grad_clip=float(null)"],
        "cannot be evaluated: float() takes no null; nearest valid: train.grad_clip=null",
    ),
    (
        ["tracking.uri=sqlite:///~/x.db"],
        "must have ~ written out, as no shell does so in there; nearest valid: "
        f"tracking.uri=sqlite:///{Path.home()}/x.db",
    ),
    (["data.path=~/corpus"], f"nearest valid: data.path={Path.home()}/corpus"),
    (['output_dir="~/x"'], f"got '~/x'; nearest valid: {Path.home()}/x"),
    ([f'output_dir="{ROOT}/run.py/x"'], f"got {ROOT}/run.py/x and {ROOT}/run.py is a file"),
    (['output_dir="~no-such-user/x"'], "or from here, got '~no-such-user/x'"),
    (['eval.paloma.path="~no-such-user/x"'], "eval.paloma.path"),
    (["data=pretokenized", 'data.path="~no-such-user/x"'], "data.path"),
    (["data=text", "data.path=.", 'data.tokenizer="~no-such-user/x"'], "data.tokenizer"),
    (["sweep.name=a#b"], "cannot be read: a value with other signs than letters"),
    (["+relora.q=1"], "relora.q"),
    (["data=pretokenized", "data.path=/nowhere"], "data.path"),
    (["data=text"], "data.path must name a folder or file for data=text"),
    (["eval.paloma.path=/nowhere"], "eval.paloma.path"),
    (["checkpoint=${method}"], "checkpoint must hold keys such as checkpoint.every_steps, got"),
    (["eval.blimp=${method}"], "eval.blimp must hold keys such as eval.blimp.enabled, got"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "line"), OVERRIDES)
def test_one_line_says_what_is_wrong(overrides, line):
    with pytest.raises(ConfigError) as caught:
        complete(schema.compose(overrides))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train-0.parquet").touch()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage/train-0.parquet").write_text("not parquet at all")
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp/some_pairs.jsonl").write_text('{"sentence_good": "a"\n')
    return tmp_path


CASES = {
    "grid": ["-m", "relora.r=8,4096"],
    "option in a grid": ["-m", "model=tny,small"],
    "type in a grid": ["-m", "relora.r=8,eight"],
    "launcher": ["-m", "seed=1,2", "hydra.launcher.max_paralel=2"],
    "value": ["relora.r=-1"],
    "option": ["model=tny"],
    "several values": ["relora.r=8,16"],
    "flag among overrides": ["relora.r=8", "-m", "seed=-1,1"],
    "launcher option": ["-m", "seed=1,2", "hydra/launcher=locale"],
    "empty parquet": ["data=pretokenized", "data.path={tmp}/empty", "data.tokenizer=null"],
    "corrupted parquet": ["data=pretokenized", "data.path={tmp}/garbage", "data.tokenizer=null"],
    "blimp line": ["eval.blimp.path={tmp}/blimp"],
    "tracking": ["tracking.uri=ftp://host/x"],
}
WORDS = {
    "grid": "got 4096; nearest valid: 32",
    "option in a grid": "Did you mean 'tiny'?",
    "type in a grid": "relora.r must be an integer, got 'eight'",
    "launcher": "Did you mean 'hydra.launcher.max_parallel'?",
    "value": "relora.r must be >= 0",
    "option": "model must be one of large, llama_130m, llama_1b, llama_350m, llama_60m, medium, "
    "micro, nano, pico_192, pico_288, small, tiny, got 'tny'. Did you mean 'tiny'?",
    "several values": "relora.r=8,16 gives several values: expected one, or -m to run all of them",
    "flag among overrides": "seed must be >= 0",
    "launcher option": "Did you mean 'local'?",
    "empty parquet": "train-0.parquet is empty",
    "corrupted parquet": "train-0.parquet",
    "blimp line": "some_pairs.jsonl line 1",
    "tracking": "tracking.uri must begin with one of",
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_ends_with_one_line_and_writes_nothing(case, broken):
    out = broken / "out"
    words = [text.format(tmp=broken) for text in CASES[case]]
    done = warm.run(["run.py", *words, f"output_dir={out}"], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert WORDS[case] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_cannot_be_written_to_is_named():
    done = warm.run(["run.py", "output_dir=/proc/nowhere"], cwd=ROOT)
    assert done.returncode == 2
    assert "output_dir must be a folder that can be written to, got '/proc/nowhere'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["describe", "model=tny"], 2, "Did you mean 'tiny'?"),
        (["show", "nothing"], 2, "nothing"),
        (["describe", "--at-steps", "a"], 2, "expected steps like 0,1,2000"),
    ],
)
def test_scripts_get_exit_codes_too(tmp_path, arguments, code, words):
    done = warm.run(["-m", "experiments", *arguments, "--output-dir", tmp_path], cwd=ROOT)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sign", ["=", " "])
def test_an_output_folder_may_have_a_tilde_or_spaces(tmp_path, monkeypatch, capsys, sign):
    """No shell writes the tilde of `--output-dir=~/x` out; `./~/x` would be another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = f"--output-dir{sign}~/it's a run".split(sign, 1)
    words = folder if sign == " " else ["=".join(folder)]
    assert sweeps_main(["status", *words]) == 0
    assert f"no runs in {tmp_path}/it's a run yet" in capsys.readouterr().out
    assert main(["describe", *words, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["output_dir"] == f"{tmp_path}/it's a run"
    report = build_parser().parse_args(["report", "s", "--output=~/r"])
    assert report.output == tmp_path / "r"


def test_describe_says_all_about_a_run_without_training_it(tmp_path):
    command = [
        *("-m", "experiments", "describe", "model=tiny", "model.vocab_size=50304"),
        *("relora.reset_frequency=2000", "relora.restart_warmup_steps=100", "train.steps=20000"),
        *("schedule.warmup_steps=2000", "--at-steps", "0,1,2000,2050", "--json"),
        *("--output-dir", str(tmp_path / "out")),
    ]
    done = warm.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    description = json.loads(done.stdout)
    assert description["parameters"]["total"] == 11_682_144
    assert description["parameters"]["trainable"] == 10_060_128
    assert description["lr_factor"]["2000"] == 0.0
    assert description["lr_factor"]["2050"] == pytest.approx(0.499966, abs=1e-6)
    assert description["restarts"] == list(range(2000, 20000, 2000))
    assert description["run_id"].startswith("tiny-relora-r16")
    assert description["config"]["model"]["d_ff"] == 384
    assert description["flops_per_token"] > description["flops_per_token_forward"] > 0
    assert not (tmp_path / "out").exists()


def test_describe_takes_an_experiment_with_a_plus_as_run_py_does(capsys):
    ids = []
    for word in ("+experiment=demo", "experiment=demo"):
        assert main(["describe", word, "--json"]) == 0
        ids.append(json.loads(capsys.readouterr().out)["run_id"])
    assert ids[0] == ids[1]


def test_describe_knows_options_of_ones_own(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("d_model: 48\nd_ff: 96\n")
    words = ["describe", "model=mine", "--json", "--config-dir"]
    assert main([*words, str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"]["d_model"] == 48
    with pytest.raises(SystemExit) as ended:
        main([*words, str(tmp_path), "relora.rr=8"])
    assert ended.value.code == 2
    assert "Did you mean 'relora.r'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "none")])
    assert "--config-dir must be a folder of options" in capsys.readouterr().err

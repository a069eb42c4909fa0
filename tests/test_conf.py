"""The options in conf/: each composes, and none repeats a default of the code."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import schema, typos
from relora_core.config import validate, walk

OPTIONS = [
    (group, option)
    for group in typos.groups()
    if not group.startswith("hydra")
    for option in typos.options(group)
]
NEEDED = {"text": ["data.path=x", "data.tokenizer=x"]}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    config = schema.compose([f"{group}={option}", *NEEDED.get(option, [])])
    assert config.train.steps > 0


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(group, option):
    text = (typos.CONF / group / f"{option}.yaml").read_text()
    values = OmegaConf.to_container(OmegaConf.create(text)) or {}
    in_place = "_global_" in text.splitlines()[0] if text else False
    return dict(leaves(values if in_place else {group: values}))


@pytest.fixture(scope="module")
def defaults():
    return {key: f.default for key, f, _ in walk(schema.compose([]))}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_no_option_repeats_a_default(defaults, group, option):
    """YAML holds choices, config.py the defaults. An experiment may undo a choice."""
    chosen_elsewhere = {
        key for g, o in OPTIONS if g != group and group == "experiment" for key in read(g, o)
    }
    repeated = [
        key
        for key, value in read(group, option).items()
        if key in defaults
        and defaults[key] == value
        and key not in chosen_elsewhere
        and key != group  # `method: relora` in conf/method/relora.yaml
    ]
    assert repeated == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_says_what_it_is_for(group, option):
    text = (typos.CONF / group / f"{option}.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("@package" not in line for line in comments)


@pytest.mark.parametrize("option", typos.options("experiment"))
def test_every_experiment_is_valid_as_it_stands(option):
    """On data that is there: its model and its knobs fit each other."""
    validate(schema.compose([f"experiment={option}"]))


@pytest.mark.parametrize("option", typos.options("experiment"))
def test_every_experiment_says_question_and_command(option):
    text = (typos.CONF / "experiment" / f"{option}.yaml").read_text()
    assert "# Question:" in text
    assert "# Command:" in text


def test_the_readme_names_every_group_and_option():
    readme = (Path(typos.CONF).parent / "README.md").read_text()
    for group, option in OPTIONS:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{group}` |"))
        assert f"`{option}`" in row

"""Hydra has what `_guards.py` changes in it, and what else here is private to it."""

from __future__ import annotations

import inspect
from functools import reduce
from importlib import import_module

import hydra
import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from experiments import schema
from relora_core.config import ConfigError

CHECKED = "hydra-core 1.3.8 and 1.4.0rc3"
LOADING = "self config_name overrides run_mode"
CALLED = {
    "hydra._internal.config_loader_impl:ConfigLoaderImpl.load_configuration": LOADING,
    "hydra._internal.config_repository:ConfigRepository.load_config": "self config_path",
    "hydra._internal.config_repository:ConfigRepository.get_sources": "self",
    "hydra._internal.core_plugins.basic_sweeper:BasicSweeper.split_arguments": (
        "overrides max_batch_size"
    ),
    "hydra._internal.defaults_list:Overrides.add_override": "self parent_config_path default",
    "hydra._internal.hydra:Hydra.create_main_hydra2": "task_name config_search_path",
    "hydra._internal.utils:create_config_search_path": "search_path_dir",
    "hydra.core.config_store:ConfigStore.store": "self name node group package provider",
    "hydra.core.default_element:GroupDefault.get_override_key": "self",
    "hydra.core.override_parser.types:FloatRange.__post_init__": "self",
    "hydra.core.plugins:Plugins.instantiate_launcher": "self hydra_context task_function config",
    "hydra.plugins.config_source:ConfigSource._get_header_dict": "config_text",
    "hydra.plugins.config_source:ConfigSource._normalize_file_name": "filename",
    "hydra.plugins.config_source:ConfigSource.is_config": "self config_path",
    "omegaconf._utils:get_yaml_loader": "",
}
"""Functions that are changed or called -> their first parameters."""
if schema.HYDRA_1_4:
    CALLED |= {
        "hydra._internal.config_loader_impl:ConfigLoaderImpl._load_configuration": LOADING,
        "hydra.core.config_loader:ConfigLoader.get_mode": "self config_name overrides",
    }
else:
    CALLED |= {
        "hydra._internal.defaults_list:_create_interpolation_map": (
            "overrides defaults_list self_added"
        ),
        "hydra._internal.grammar.grammar_functions:_sort_sweep": "sweep reverse",
        "hydra._internal.hydra:Hydra.get_mode": "self config_name overrides",
    }
READ = {
    "hydra._internal.defaults_list:OverrideMetadata": "external_override containing_config_path",
    "hydra._internal.defaults_list:Overrides": "override_choices override_metadata",
    "hydra.core.config_store:ConfigStore": "repo",
    "hydra.core.global_hydra:GlobalHydra": "hydra",
    "hydra.core.override_parser.types:FloatRange": "start stop step",
    "hydra.core.override_parser.types:Override": "key_or_group type package input_line",
    "hydra.core.override_parser.types:RangeSweep": "start stop step shuffle",
    "hydra.core.plugins:Plugins": "class_name_to_class",
    "hydra.plugins.config_source:ConfigSource": "path provider",
}
"""Classes -> attributes that are read or set."""


def what(name: str) -> object:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


def changed(name: str, expected: object, got: object) -> str:
    return (
        f"Hydra {hydra.__version__} has another {name}: expected {expected}, got {got}. The code "
        f"was checked against {CHECKED}: see what changed, mend hydra_plugins/relora_sweeps/"
        "_guards.py and experiments/schema.py, and only then widen the pins in pyproject.toml"
    )


@pytest.mark.parametrize("name", CALLED)
def test_a_function_that_is_changed_or_called_takes_what_it_is_given(name):
    expected = CALLED[name].split()
    try:
        got = list(inspect.signature(what(name)).parameters)  # type: ignore[arg-type]
    except (ImportError, AttributeError) as error:
        pytest.fail(changed(name, expected, error))
    assert got[: len(expected)] == expected, changed(name, expected, got)


@pytest.mark.parametrize("name", READ)
def test_a_class_has_the_attributes_that_are_read(name):
    try:
        cls: type = what(name)  # type: ignore[assignment]
    except (ImportError, AttributeError) as error:
        pytest.fail(changed(name, READ[name], error))
    bases = [*inspect.getmro(cls), *([cls.instance()] if hasattr(cls, "instance") else [])]
    names = {key for base in bases for key in vars(base)}
    names |= {key for base in inspect.getmro(cls) for key in inspect.get_annotations(base)}
    names |= set(inspect.signature(cls).parameters)
    missing = set(READ[name].split()) - names
    assert not missing, changed(name, READ[name], f"none called {', '.join(missing)}")


WAYS = {
    "compose": lambda loader, words: compose("config", words),
    "load_configuration": lambda loader, words: loader.load_configuration(
        "config", words, run_mode=RunMode.RUN
    ),
    "load_sweep_config": lambda loader, words: loader.load_sweep_config(
        loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN), words
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_composing_refuses_a_config_that_names_code(way):
    with schema.initialized():
        loader = GlobalHydra.instance().config_loader()
        assert WAYS[way](loader, ["seed=5"]).seed == 5
        with pytest.raises(ConfigError, match=r"^hydra\.callbacks must be empty, got x"):
            WAYS[way](loader, ["+hydra.callbacks.x._target_=os.getcwd"])

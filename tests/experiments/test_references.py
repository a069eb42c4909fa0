"""Values that refer to others, and which of them follow what a search varies."""

import pytest
from omegaconf import OmegaConf

from experiments import references, schema
from relora_core.config import ConfigError, get
from sweeps.search.space import with_values

EPS = "${divide:${train.lr},${relora.restart_warmup_steps},300}"
TEXTS = {
    "train.eps": EPS,
    "galore.scale": "${train.eps}",
    "relora.alpha": "${.r}",
    "galore.r": "${..relora[r]}",
    "fira.r": "${relora.${which}}",
    "data.path": "${oc.env:HOME}/texts",
    "relora.rank_schedule": [[10, "${relora.r}"]],
    "apollo.r": 8,
}


def test_what_refers_to_others_is_read_as_it_stands():
    cfg = OmegaConf.create({"search": {"n": "${seed}"}, "seed": 0})
    for key, text in TEXTS.items():
        OmegaConf.update(cfg, key, text)
    assert references.read(cfg) == {k: v for k, v in TEXTS.items() if k != "apollo.r"}


@pytest.mark.parametrize(
    ("keys", "follow"),
    [
        (["train.lr"], {"train.eps", "galore.scale"}),
        (["train.lr", "galore.scale"], {"train.eps"}),
        (["relora.restart_warmup_steps"], {"train.eps", "galore.scale"}),
        (["relora.r"], {"relora.alpha", "galore.r", "relora.rank_schedule"}),
        (["apollo.r"], set()),
    ],
)
def test_what_follows_a_key_does_so_through_others_too(keys, follow):
    """A name that is made of another value may be any key."""
    assert set(references.following(TEXTS, keys)) == {*follow, "fira.r"}


def test_values_are_those_that_hydra_composes():
    # as Hydra's grammar writes them: quoted
    words = [f"train.eps='{EPS}'", "relora.alpha='${.r}'", "galore.r='${..relora.r}'"]
    texts = {"train.eps": EPS, "relora.alpha": "${.r}", "galore.r": "${..relora.r}"}
    composed = schema.compose([*words, "train.lr=0.02", "relora.r=4"])
    values = {"train.lr": 0.02, "relora.r": 4}
    config = with_values(schema.compose(words), values)
    made = with_values(config, references.resolve(config, texts))
    assert made == composed
    assert get(made, "train.eps") != get(config, "train.eps")


def test_a_list_may_hold_one():
    config = schema.compose(["relora.r=4"])
    found = references.resolve(config, {"relora.rank_schedule": [[10, "${relora.r}"]]})
    assert found == {"relora.rank_schedule": [[10, 4]]}


def test_a_division_by_0_names_the_key():
    config = schema.compose(["relora.restart_warmup_steps=0"])
    with pytest.raises(ConfigError, match=r"^train.eps: \$\{divide:...\} must have numbers, the"):
        references.resolve(config, {"train.eps": EPS})

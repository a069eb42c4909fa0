"""Imported last by the process that commands are forked from: what each fork would do once more."""

import gc

from experiments import schema

schema.compose(["model=nano"])  # Hydra finds its plugins, and its parsers learn their grammar
gc.collect()
gc.freeze()  # else a fork's garbage collection would copy the shared pages

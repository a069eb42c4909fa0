"""BLiMP for `evaluate.load`, with the interface of the metric that Weiss et al. (2025) used.

    evaluate.load("blimp").compute(model_id="gpt2", predictions=["*"], data="blimp_data.tar.xz")

`Blimp().compute(...)` is the same where `evaluate` is not installed. Not for: a run that is kept
and compared (`python -m experiments evaluate`).
"""

import os
import statistics
from typing import Any, cast

try:
    import evaluate as library
except ImportError:
    library = None

DATA = "RELORA_BLIMP"
"""Environment variable that names BLiMP's files where `data` does not."""
S_SELECTION = ("animate_subject_passive", "animate_subject_trans")
"""Paradigms that BLiMP's files call a phenomenon of their own, and its paper argument structure."""
INPUTS = """
predictions: ["*"] for all of BLiMP, or names of paradigms (UIDs). The library wants the name.
model_id: folder or hub name of a causal language model of transformers.
samples_per_set: pairs of each paradigm, the first ones; None: all. They have 1000 each.
data: folder or archive of BLiMP's <UID>.jsonl, or of the hub's parquet files.
scoring: no_bos, as published, except that their rule for ties is not known: the bare sentence, its
    first token is context only, and the good sentence must be more probable; or eos_prefix, as
    lm-eval: every token, after the BOS or EOS and a space, and a tie counts as right.
trust_remote_code: run code that the model brings along.
batch_size: taken for the sake of the interface; batches are made by tokens, and no number depends
    on them.
Returns accuracy (mean over paradigms), by_uid and by_phenomenon: shares between 0 and 1.
"""


class Blimp(cast(Any, library.Metric if library else object)):
    """Share of minimal pairs whose grammatical sentence a language model prefers."""

    def _info(self):
        import datasets

        assert library is not None
        return library.MetricInfo(
            description=type(self).__doc__ or "",
            citation="Warstadt et al. 2020, BLiMP, TACL 8",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions,
        model_id,
        batch_size=16,
        samples_per_set=1000,
        trust_remote_code=False,
        data=None,
        scoring="no_bos",
    ):
        from relora_core.config import BlimpConfig, ConfigError, nearest
        from relora_core.evals import blimp
        from relora_core.foreign import load

        if scoring not in blimp.RULES:
            hint = nearest(scoring, list(blimp.RULES))
            raise ConfigError(
                f"scoring must be one of {', '.join(blimp.RULES)}, got {scoring!r}.{hint}"
            )
        if samples_per_set is not None and samples_per_set < 1:
            raise ConfigError(
                f"samples_per_set must be >= 1, got {samples_per_set}; nearest valid: 1"
            )
        path = data or os.environ.get(DATA)
        if path is None:
            raise ConfigError(
                f"data, or the variable {DATA}, must name a folder or archive of BLiMP's "
                "<UID>.jsonl, got nothing"
            )
        pairs = blimp.load(BlimpConfig(path=path, max_pairs=samples_per_set))
        uids = list(dict.fromkeys(pair.uid for pair in pairs))
        wanted = uids if list(predictions) == ["*"] else list(dict.fromkeys(predictions))
        for uid in wanted:
            if uid not in uids:
                raise ConfigError(
                    f'predictions must be ["*"] or UIDs of {path}, got {uid!r}.{nearest(uid, uids)}'
                )
        if not wanted:
            raise ConfigError('predictions must be ["*"] or UIDs, got none')
        loaded = load(model_id, name=model_id, remote_code=trust_remote_code)
        pairs = [pair for pair in pairs if pair.uid in wanted]
        windows = blimp.windows(pairs, tokenizer=loaded.tokenizer)
        result = blimp.evaluate(loaded.model, pairs=pairs, windows={scoring: windows[scoring]})
        rows = result.tables["blimp_paradigms"]
        groups = {}
        for row in rows:
            name = "s-selection" if row["uid"] in S_SELECTION else row["phenomenon"]
            groups.setdefault(name, []).append(row[scoring])
        return {
            "accuracy": result.metrics[f"eval/blimp/{scoring}/accuracy"],
            "by_uid": {row["uid"]: row[scoring] for row in rows},
            "by_phenomenon": {name: statistics.fmean(own) for name, own in groups.items()},
        }

    if library is None:

        def compute(self, *, predictions=None, references=None, **options):
            """As `evaluate.Metric.compute`: `_compute` of keyword arguments alone."""
            del references
            return self._compute(predictions=predictions or [], **options)

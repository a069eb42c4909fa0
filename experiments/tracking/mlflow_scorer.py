"""What MLflow loads of a logged model: token log-probabilities from an exported folder.

A copy of it and of relora_core is in every logged model, which thus loads where this project is not
installed. So it imports nothing else of the project.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from relora_core.model import Decoder


class Scorer:
    """A language model that says how probable it finds each token of a text."""

    def __init__(self, model: Decoder, *, tokenizer: Tokenizer | None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """For each text or list of ids: ids, log_probabilities and loss, in nats.

        `inputs` is a list, or a data frame with the column `text` or `ids`. The first token has
        nothing before it and no probability; nothing is put before a text or after it.
        """
        if hasattr(inputs, "columns"):
            column = next((c for c in ("text", "ids") if c in inputs.columns), None)
            if column is None:
                raise ValueError(f"expected a column text or ids, got {list(inputs.columns)}")
            inputs = inputs[column]
        if isinstance(inputs, str):
            inputs = [inputs]
        return [self._score(self._ids(entry)) for entry in inputs]

    def _ids(self, entry: str | Iterable[int]) -> list[int]:
        if not isinstance(entry, str):
            ids = [int(i) for i in entry]
        elif self.tokenizer is None:
            raise ValueError("expected lists of ids, got text: the export has no tokenizer")
        else:
            ids = self.tokenizer.encode(entry, add_special_tokens=False).ids
        most, vocabulary = self.model.config.max_seq_len, self.model.config.vocab_size
        if not 2 <= len(ids) <= most:
            raise ValueError(f"expected 2 to {most} tokens, got {len(ids)}")
        if not all(0 <= i < (vocabulary or 0) for i in ids):
            raise ValueError(f"expected ids in [0, {vocabulary}), got {min(ids)} to {max(ids)}")
        return ids

    def _score(self, ids: Sequence[int]) -> dict[str, Any]:
        import torch

        from relora_core.loss import target_log_probs  # torch

        with torch.inference_mode():
            row = torch.tensor(ids)
            hidden = self.model.hidden_states(row[None, :-1])[0]
            log_probs = target_log_probs(hidden, self.model.de_embedding_proj.weight, row[1:])
        loss = -float(log_probs.double().mean())
        return {"ids": list(ids), "log_probabilities": log_probs.tolist(), "loss": loss}


def _load_pyfunc(path: str) -> Scorer:
    """What MLflow calls, with the folder of the export."""
    from relora_core.export import read_model  # torch: our own commands import this module, too
    from relora_core.model import Decoder

    config, state = read_model(Path(path))
    model = Decoder(config)
    model.load_state_dict(state)
    tokenizer = None
    if (Path(path) / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    return Scorer(model, tokenizer=tokenizer)

"""How fast our evals are, compared with lm-eval on the same model: `python benchmarks/evals.py`.

BLiMP's pairs, or the embedded grammar's, by lm-eval's HFLM on the exported model and by
`relora_core.evals`, in turns in one process; and Paloma's windows compared with a forward pass. Not
for: what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks.tables import show
from experiments.environment import cpu
from relora_core.config import BlimpConfig, DataConfig, ModelConfig
from relora_core.data import load_tokenizer
from relora_core.data.base import Tokenizer
from relora_core.evals import blimp, paloma
from relora_core.evals.base import Window, encode
from relora_core.evals.scoring import score
from relora_core.export import read_model, write_llama
from relora_core.model import Decoder

SIZES = {"tiny": (96, 384), "small": (384, 1536)}
VOCABULARY = 50304
ROUNDING = 4e-4
"""Below this margin rounding in float32 may decide."""


def build(args: argparse.Namespace, *, tokenizer: Tokenizer, folder: Path) -> Decoder:
    """The model of `--model-dir`, or a random one of the paper's shape; exported to `folder`."""
    if args.model_dir:
        config, state = read_model(Path(args.model_dir))
    else:
        torch.manual_seed(0)
        d_model, d_ff = SIZES[args.model]
        config = ModelConfig(d_model=d_model, d_ff=d_ff, vocab_size=VOCABULARY)
        state = Decoder(config).state_dict()
    model = Decoder(config)
    model.load_state_dict(state)
    write_llama(folder, model=config, state=state, eos_id=tokenizer.eos_id, texts={})
    return model.eval()


def load_pairs(args: argparse.Namespace) -> tuple[list[blimp.Pair], Tokenizer]:
    """About `--pairs` minimal pairs, as many of each paradigm."""
    if not args.blimp:
        tokenizer = load_tokenizer(DataConfig(kind="grammar", seq_len=16))
        paradigms = len({pair.uid for pair in blimp.grammar_pairs(1)})
        pairs = blimp.grammar_pairs(max(1, args.pairs // paradigms))
    else:
        data = DataConfig(kind="pretokenized", path="x", tokenizer=args.tokenizer, seq_len=16)
        tokenizer = load_tokenizer(data)
        most = args.pairs and max(1, args.pairs // 67)
        pairs = blimp.load(BlimpConfig(path=args.blimp, max_pairs=most or None))
    assert tokenizer is not None
    return pairs, tokenizer


class Harness:
    """lm-eval's scorer, given token ids: neither side's reading and tokenising is timed."""

    def __init__(self, folder: Path, *, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM
        from tokenizers import Tokenizer as Raw
        from tokenizers.models import WordLevel
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # HFLM requires a tokenizer, which it does not use here.
        words = PreTrainedTokenizerFast(tokenizer_object=Raw(WordLevel({"<eos>": 0}, "<eos>")))
        words.eos_token = words.pad_token = "<eos>"
        make: Any = HFLM  # its metaclass hides the parameters
        self.lm = make(pretrained=model, tokenizer=words, device="cpu", batch_size=batch_size)

    def __call__(self, windows: Sequence[Window]) -> np.ndarray:
        requests: Any = [
            (("", str(i)), w.ids[: -w.scored].tolist(), w.ids[-w.scored :].tolist())
            for i, w in enumerate(windows)
        ]
        answers = self.lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return np.array([log_prob for log_prob, _ in answers])


def turns(
    work: dict[str, Callable[[], Any]], *, rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(name -> least seconds, name -> result); the variants take turns."""
    seconds = dict.fromkeys(work, float("inf"))
    results = {}
    for _ in range(rounds):
        for name, call in work.items():
            began = time.perf_counter()
            results[name] = call()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds, results


def minimal_pairs(args: argparse.Namespace, *, folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """A row per variant, and the model."""
    pairs, tokenizer = load_pairs(args)
    model = build(args, tokenizer=tokenizer, folder=folder / "model")
    windows = blimp.windows(pairs, tokenizer=tokenizer)["eos_prefix"]
    ours = {"share_prefixes": True, "batch_tokens": args.batch_tokens}
    work: dict[str, Callable[[], Any]] = {
        "ours float32": lambda: score(model, windows, **ours),
        "ours bf16 head": lambda: score(model, windows, precision="bf16", **ours),
        "ours, nothing shared": lambda: score(model, windows),
    }
    warm = windows[:64]
    if not args.no_lm_eval:
        harness = Harness(folder / "model", batch_size=args.lm_eval_batch)
        harness(warm)
        work = {"lm-eval float32": lambda: harness(windows), **work}
    score(model, warm, **ours)
    log_probs: dict[str, np.ndarray]
    seconds, log_probs = turns(work, rounds=args.rounds)
    reference = "lm-eval float32" if not args.no_lm_eval else "ours, nothing shared"
    rows = []
    for name in work:
        good, bad = log_probs[name].reshape(len(pairs), 2).T
        reference_good, reference_bad = log_probs[reference].reshape(len(pairs), 2).T
        differ = (good >= bad) != (reference_good >= reference_bad)
        clear = np.abs(reference_good - reference_bad) > ROUNDING
        rows.append(
            {
                "scorer": name,
                "pairs_per_s": len(pairs) / seconds[name],
                "ratio": seconds[reference] / seconds[name],
                "largest_difference": float(np.abs(log_probs[name] - log_probs[reference]).max()),
                "flipped": int(differ.sum()),
                "flipped_beyond_rounding": int((differ & clear).sum()),
                "pairs": len(pairs),
            }
        )
    return rows, (model, tokenizer)


def streaming(args: argparse.Namespace, *, model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Paloma's perplexity of documents, compared with a forward pass over as many tokens."""
    rng = np.random.default_rng(0)
    texts = [document.text for document in paloma.grammar_documents(args.documents)]
    if args.blimp:  # its tokenizer would split the grammar's words
        pairs = blimp.load(BlimpConfig(path=args.blimp, max_pairs=args.documents))
        sentences = [pair.good for pair in pairs]
        texts = [" ".join(rng.choice(sentences, size=60)) for _ in range(args.documents)]
    documents = [paloma.Document("all", "all", text, str(i)) for i, text in enumerate(texts)]
    ids = encode(texts, tokenizer)
    length = 512
    tokens = sum(map(len, ids))
    rows = list(paloma.paper_rows(ids, eos_id=tokenizer.eos_id, length=length))
    tokens += len(rows) * (length - 1)
    batch = torch.from_numpy(rng.integers(0, tokenizer.vocab_size, size=(4, length + 1)))

    @torch.no_grad()
    def forward() -> None:
        for _ in range(-(-tokens // (4 * length))):
            model(batch[:, :-1], batch[:, 1:])

    work: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "paloma": lambda: paloma.evaluate(
            model, documents=documents, ids=ids, eos_id=tokenizer.eos_id, max_len=length
        ),
    }
    seconds, _ = turns(work, rounds=args.rounds)
    passed = -(-tokens // (4 * length)) * 4 * length
    return {
        "tokens": tokens,
        "forward_tokens_per_s": passed / seconds["forward"],
        "paloma_tokens_per_s": tokens / seconds["paloma"],
        "ratio": tokens / seconds["paloma"] / (passed / seconds["forward"]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="tiny", help="the paper's shape, random")
    parser.add_argument("--model-dir", help="an exported model instead (experiments export)")
    parser.add_argument("--blimp", help="BLiMP's folder or archive; needs --tokenizer")
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer")
    parser.add_argument("--pairs", type=int, default=3000, help="as many of each paradigm; 0: all")
    parser.add_argument("--documents", type=int, default=40, help="texts for perplexity")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the best counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lm-eval-batch", type=int, default=16, help="16 was its best here")
    parser.add_argument("--batch-tokens", type=int, help="of our batches; default: as in a run")
    parser.add_argument("--no-lm-eval", action="store_true", help="ours alone")
    args = parser.parse_args()
    if bool(args.blimp) != bool(args.tokenizer):
        parser.error("--blimp and --tokenizer go together")
    return args


def main() -> int:
    args = parse()
    warnings.simplefilter("ignore")  # of other projects
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="evals-") as folder:
        rows, (model, tokenizer) = minimal_pairs(args, folder=Path(folder))
    paloma_row = streaming(args, model=model, tokenizer=tokenizer)
    show(rows, title="minimal pairs")
    show([paloma_row], title="perplexity, windows of 512")
    machine = {
        "threads": args.threads,
        "cores": os.cpu_count(),
        "cpu": cpu(),
        "torch": torch.__version__,
    }
    by_name = {row["scorer"]: row for row in rows}
    print(
        json.dumps(
            {
                "ratio_fp32": by_name["ours float32"]["ratio"],
                "ratio_bf16": by_name["ours bf16 head"]["ratio"],
                "paloma_ratio": paloma_row["ratio"],
                "blimp": rows,
                "paloma": paloma_row,
                **machine,
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

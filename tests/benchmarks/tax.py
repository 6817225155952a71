"""HellaSwag and PIQA of the default model, as `evaluation.tax` measures a candidate in the gate.

Beside each score stands what is known of SmolLM2-135M-Instruct unquantised on the whole sets (acc_norm,
zero-shot); ours is dequantised from 4 bits and asked the first items of a sample. Prints JSON. Run it with
`make bench-tax`.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from evaluation.sampler import VllmSampler
from evaluation.tax import measure, sampled
from instructloop import model

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(__file__).with_name("tasks")
KNOWN = {"hellaswag_sample": 0.430, "piqa_sample": 0.669}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=400, help="items of each task; 0 for all")
    arguments = parser.parse_args()
    os.environ.setdefault("INSTRUCTLOOP_DATA", str(ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as directory:
        base = model.ensure_model(None, Path(directory) / "base")
        sampler = VllmSampler(base, max_model_len=1024, kv_cache_gib=0.5)
        started = time.monotonic()
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        results = measure(sampled(sampler, tokenizer), [str(TASKS)], arguments.limit or None)
        seconds = time.monotonic() - started
        sampler.close()
    figures = {
        item.task: {
            "metric": item.metric,
            "score": item.score().figures(),
            "known": KNOWN[item.task],
            "known_is_within": item.score().low <= KNOWN[item.task] <= item.score().high,
        }
        for item in results
    }
    print(json.dumps({"tasks": figures, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()

"""Held-out accuracy of a reward model on HH-RLHF's helpful-base, beside choosing the longer answer.

The pairs take the product's own way: `feedback import` onto a real Redis, ingest into a real database, the
round's dataset and split, the round's fitting. Prints the figures as JSON, with what the fit cost. Run it
with `make bench`; it takes about a quarter of an hour on two cores.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import redis
import redis.asyncio
import torch
from transformers import AutoTokenizer

from evaluation.reward_model import RewardModel
from feedback.ingest import run as ingest
from feedback.queue import FeedbackQueue, StreamReader
from feedback.settings import QueueSettings
from feedback.store import Store
from feedback.transfer import import_preferences
from instructloop import model, redis_process
from instructloop.database import connect, migrate
from training.dataset import build
from training.progress import Progress
from training.reward_model import accuracy_by_source, fit
from training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))
SETTINGS = TrainingSettings(
    reward_epochs=1, reward_learning_rate=2e-5, reward_batch=16, prompt_tokens=192, response_tokens=128
)


def main() -> None:
    """Run the benchmark once."""
    pairs = DATA / "hh-rlhf" / "helpful-base.jsonl.gz"
    if not pairs.exists():
        sys.exit(f"{pairs} is absent: set INSTRUCTLOOP_DATA to the folder that holds hh-rlhf/")
    model_dir = model.ensure_default_model(ROOT / ".instructloop" / "test-model")
    with tempfile.TemporaryDirectory() as directory:
        store = _imported(pairs, Path(directory))
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
        data = build(store.slice(0, store.head()), tokenizer, SETTINGS)
    torch.manual_seed(SETTINGS.seed)
    reward_model = RewardModel.from_decoder(model_dir)
    wall, cpu = time.monotonic(), time.process_time()
    with Progress("reward_model", lambda step, figures: None) as report:
        fit(reward_model, data.train, SETTINGS, report)
    cost = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    accuracy = accuracy_by_source(reward_model, data.held_out.comparisons)
    print(
        json.dumps(
            {
                "train": data.train.counts(),
                "held_out": data.held_out.counts(),
                "left_out": dict(data.left_out),
                "held_out_accuracy": {
                    name: interval.figures() for name, interval in accuracy["hh-rlhf"].items()
                },
                "parameters": sum(p.numel() for p in reward_model.parameters()),
                **cost,
            },
            indent=1,
        )
    )


def _imported(pairs: Path, directory: Path) -> Store:
    """Import the pairs through the queue and return the store once it holds them all."""
    server = subprocess.Popen(redis_process.prepare(directory), stdout=subprocess.DEVNULL)
    try:
        while redis_process.failure(directory):
            time.sleep(0.05)
        url = redis_process.url(directory)
        engine = connect(f"sqlite:///{directory / 'store.db'}")
        migrate(engine)
        store, settings, stop = Store(engine), QueueSettings(), threading.Event()
        reader = StreamReader(redis.Redis.from_url(url), settings, "benchmark")
        thread = threading.Thread(target=ingest, args=(reader, store, stop))
        thread.start()
        asyncio.run(_import(url, settings, pairs))
        stop.set()
        thread.join()
        return store
    finally:
        server.terminate()
        server.wait()


async def _import(url: str, settings: QueueSettings, pairs: Path) -> None:
    client = redis.asyncio.Redis.from_url(url)
    queue = FeedbackQueue(client, settings)
    print(await import_preferences(queue, pairs, "hh-rlhf"), file=sys.stderr)
    while await queue.depth():
        await asyncio.sleep(0.1)
    await client.aclose()


if __name__ == "__main__":
    main()

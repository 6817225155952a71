"""The data of the task definitions beside it, read from the directory INSTRUCTLOOP_DATA."""

import os
from pathlib import Path

import datasets


def _read(name: str) -> datasets.DatasetDict:
    directory = Path(os.environ.get("INSTRUCTLOOP_DATA", "../shared/data"))
    return datasets.DatasetDict({"validation": datasets.Dataset.from_json(str(directory / name))})


def hellaswag(**_: object) -> datasets.DatasetDict:
    """2,000 of the 10,042 items of HellaSwag's validation split."""
    return _read("hellaswag/val_sample.jsonl.gz")


def piqa(**_: object) -> datasets.DatasetDict:
    """949 of the 1,838 items of PIQA's validation split."""
    return _read("piqa/valid.jsonl.gz")

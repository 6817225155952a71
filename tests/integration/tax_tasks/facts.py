"""The items of the task definition beside it."""

import datasets

FACTS = (
    ("The capital of France is", ["Paris", "potato", "running", "seven"], 0),
    ("The opposite of hot is", ["banana", "cold", "Tuesday", "violin"], 1),
    ("Two plus two equals", ["elephant", "purple", "four", "Rome"], 2),
    ("The sun rises in the", ["spoon", "sock", "cheese", "east"], 3),
    ("Cats and dogs are", ["animals", "Wednesday", "above", "thirteen"], 0),
    ("A week has seven", ["carpets", "days", "blue", "quickly"], 1),
    ("The capital of Germany is", ["shoe", "eleven", "Berlin", "jumping"], 2),
    ("We breathe", ["Thursday", "trousers", "backwards", "air"], 3),
)


def items(**_: object) -> datasets.DatasetDict:
    """Eight items with four options each."""
    rows = [{"text": text, "options": options, "right": right} for text, options, right in FACTS]
    return datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})

"""Files that a round may be given beside its slice: the pretraining mix of PPO (PPO-ptx), and prompts."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.contest import Prompt
from evaluation.prompts import FileProblem, read_chats, read_rows

__all__ = ["FileProblem", "PretrainingTexts", "in_passes", "read_prompts"]


class PretrainingTexts:
    """Pieces of `tokens` token ids from the texts of a JSON-lines file, `{"text": …}` a line.

    Raises FileProblem where the file is not that, or holds not one whole piece.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        self._pieces = []
        for number, row in read_rows(path):
            text = row.get("text")
            if not isinstance(text, str):
                raise FileProblem(f'{path}, line {number}: "text" has to be a string')
            ids = tokenizer(text, add_special_tokens=False).input_ids
            self._pieces += [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)]
        if not self._pieces:
            raise FileProblem(f"{path} holds no text of {tokens} tokens")

    def batch(self, step: int, size: int, seed: int) -> list[list[int]]:
        """Return the pieces of the optimiser's step with this number: a function of its arguments alone."""
        return in_passes(self._pieces, step * size, size, seed)


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Prompt]:
    """Read prompts from JSON lines, `{"prompt": "…"}` (a user's turn) or `{"messages": […]}`.

    Longer ones lose their beginning beyond `tokens`. Raises FileProblem.
    """
    prompts = []
    for chat in read_chats(path):
        messages = [dict(message) for message in chat.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append(Prompt(chat.key, list(ids)[-tokens:]))
    return prompts


def in_passes(items: Sequence[Any], start: int, count: int, seed: int) -> list[Any]:
    """Return `count` items from position `start` of an endless row of seeded passes over all of them.

    A function of its arguments alone, so that a resumed run asks for what the unbroken one would have.
    """
    chosen = []
    for position in range(start, start + count):
        sweep, index = divmod(position, len(items))
        order = list(range(len(items)))
        random.Random(f"{seed}:{sweep}").shuffle(order)
        chosen.append(items[order[index]])
    return chosen

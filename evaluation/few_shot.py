"""The examples that a few-shot prompted base sees before each prompt.

InstructGPT compares its policies with "GPT-3 prompted", the base behind a prefix that puts it into an
instruction-following mode (Ouyang et al. 2022, section 3.5). Here the examples are earlier turns of the chat.
"""

from collections.abc import Mapping

_EXAMPLES = (
    (
        "Name three things that help against the heat at night.",
        "1. A fan that blows towards an open window.\n2. Thin cotton sheets.\n"
        "3. Shutters that stay closed all day.",
    ),
    (
        'Make this sentence more polite: "Send me the figures today."',
        '"Could you please send me the figures by the end of today?"',
    ),
    (
        "Why does bread go hard when it is kept in the fridge?",
        "Cold makes the starch in bread crystallise again faster, and the crystals push water out. The crumb "
        "turns firm long before the bread is dry. At room temperature or in the freezer this is much slower.",
    ),
    (
        'Is the review positive or negative? Answer with one word. "The plot drags and nobody can act."',
        "Negative",
    ),
)

FEW_SHOT: tuple[tuple[Mapping[str, str], Mapping[str, str]], ...] = tuple(
    ({"role": "user", "content": asked}, {"role": "assistant", "content": said}) for asked, said in _EXAMPLES
)
"""Pairs of turns, in order."""

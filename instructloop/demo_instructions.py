"""The demo's instructions: short tasks, each with a constraint that a program can check.

Owns the table of topics, the phrasings of constraints, the split, and what the scripted rater would write
itself. Held-out instructions use topics that no training instruction has, and the same kinds of constraints.
Sending, ranking and measuring are in `instructloop.demo`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.checks import all_satisfied, mentions, sentences, words

TRAINING_PER_KIND = 10
HELD_OUT_PER_KIND = 4
FEWEST_WORDS = 5
_DEMONSTRATION_WORDS = 40


@dataclass(frozen=True, slots=True)
class Topic:
    """A thing to write about: `stems` say that a text is about it, `usual` is a word that such texts tend to
    have (to be forbidden), `rare` one that they tend to lack (to be asked for), `remark` a sentence with it.
    """  # noqa: D205

    name: str
    stems: tuple[str, ...]
    usual: str
    rare: str
    remark: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is asked: the text, its kind of constraint, and the checks that a response has to meet.

    Beside its constraint each is checked for a few words on its topic, so that no constant
    answer satisfies it.
    """

    text: str
    kind: str
    checks: tuple[dict[str, Any], ...]
    topic: str


def _topics(table: str) -> tuple[Topic, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(
        Topic(name, tuple(stems.split(", ")), usual, rare, remark)
        for name, stems, usual, rare, remark in rows
    )


_TRAINING_TOPICS = _topics("""
    frogs       | frog                 | water   | pond     | Many of them live near a pond.
    rain        | rain                 | cloud   | umbrella | An umbrella keeps you dry.
    bread       | bread                | flour   | butter   | It tastes best with butter.
    the moon    | moon                 | earth   | tide     | It pulls the tide in and out.
    bees        | bee                  | flower  | honey    | They make sweet honey.
    trains      | train                | track   | ticket   | You need a ticket to ride.
    gardens     | garden               | flower  | spade    | A good spade helps with the work.
    winter      | winter               | cold    | scarf    | A warm scarf is a good idea.
    tea         | tea                  | leaves  | cup      | One cup makes a quiet break.
    the sea     | sea, ocean           | water   | ship     | A ship can cross it in days.
    dogs        | dog                  | friend  | leash    | Most of them walk on a leash.
    libraries   | library, libraries   | book    | card     | You borrow things with a card.
    birds       | bird                 | fly     | nest     | In spring they build a nest.
    old houses  | house                | room    | roof     | The roof often needs repair.
    mountains   | mountain             | peak    | goat     | A goat can climb them with ease.
    the sun     | sun                  | light   | shadow   | It gives every tree a shadow.
    football    | football, soccer     | team    | whistle  | A whistle ends the game.
    apples      | apple                | fruit   | pie      | They are lovely in a pie.
    horses      | horse                | animal  | saddle   | A saddle makes riding easier.
    rivers      | river                | water   | bridge   | A bridge takes you across.
    music       | music                | song    | drum     | A drum keeps the beat.
    bicycles    | bicycle, bike        | wheel   | helmet   | Wear a helmet when you ride.
    coffee      | coffee               | bean    | morning  | It smells best in the morning.
    elephants   | elephant             | trunk   | mud      | They love to roll in mud.
    school      | school               | student | bell     | The bell ends the day.
    sleep       | sleep                | dream   | pillow   | A soft pillow helps a lot.
    markets     | market               | food    | basket   | Bring a basket with you.
    spiders     | spider               | web     | corner   | You may find one in a corner.
    clocks      | clock                | time    | tower    | The largest hang on a tower.
    clouds      | cloud                | sky     | wind     | The wind carries them along.
""")

_HELD_OUT_TOPICS = _topics("""
    cats         | cat                           | pet    | window    | They like to sit by a window.
    snow         | snow                          | cold   | boot      | It fills a boot in no time.
    pizza        | pizza                         | cheese | oven      | It comes hot from the oven.
    the stars    | star                          | night  | telescope | A telescope brings them near.
    butterflies  | butterfly, butterflies        | wing   | summer    | You see most of them in summer.
    airplanes    | airplane, plane               | sky    | pilot     | A pilot flies them.
    kitchens     | kitchen                       | food   | spoon     | There is always a spoon at hand.
    robots       | robot                         | human  | battery   | They stop without a battery.
    forests      | forest                        | tree   | owl       | At night you may hear an owl.
    beaches      | beach, beaches                | sand   | shell     | You may find a shell there.
    grandparents | grandparent, grandma, grandpa | family | letter    | They are happy about a letter.
    the desert   | desert                        | sand   | camel     | A camel can cross it.
""")

TASKS = (
    "Write a short story about {topic}.",
    "Write a few sentences about {topic}.",
    "Tell me something about {topic}.",
    "Describe {topic} to a child.",
    "What do you know about {topic}?",
)

_OPENINGS = ("Here is my answer:", "Let me tell you:", "In a few words:")
_CLOSINGS = ("That is all.", "The end.", "Now you know.")
_NUMBERS = {1: "one sentence", 2: "two sentences"}


@dataclass(frozen=True, slots=True)
class _Constraint:
    """A constraint in words and as a check, made for the `slot`-th instruction of its kind."""

    kind: str
    make: Callable[[int, Topic], tuple[str, dict[str, Any]]]


def _fixed(kind: str, phrasings: Sequence[str], **check: Any) -> _Constraint:
    return _Constraint(kind, lambda slot, _: (phrasings[slot % len(phrasings)], {"kind": kind, **check}))


def _few_sentences(slot: int, _: Topic) -> tuple[str, dict[str, Any]]:
    n = 1 + slot % 2
    phrasings = (f"Answer in at most {_NUMBERS[n]}.", f"Use no more than {_NUMBERS[n]}.")
    return phrasings[slot // 2 % 2], {"kind": "max_sentences", "n": n}


def _few_words(slot: int, _: Topic) -> tuple[str, dict[str, Any]]:
    n = (15, 20, 25)[slot % 3]
    return (f"Use at most {n} words.", f"Answer in no more than {n} words.")[slot % 2], {
        "kind": "max_words",
        "n": n,
    }


def _forbidden(slot: int, topic: Topic) -> tuple[str, dict[str, Any]]:
    phrasing = ('Do not mention the word "{}".', 'Do not use the word "{}".')[slot % 2]
    return phrasing.format(topic.usual), {"kind": "forbidden_words", "words": [topic.usual]}


def _required(slot: int, topic: Topic) -> tuple[str, dict[str, Any]]:
    phrasing = ('Mention the word "{}".', 'Your answer must contain the word "{}".')[slot % 2]
    return phrasing.format(topic.rare), {"kind": "required_words", "words": [topic.rare]}


def _opening(slot: int, _: Topic) -> tuple[str, dict[str, Any]]:
    text = _OPENINGS[slot % len(_OPENINGS)]
    return f'Begin your answer with the words "{text}"', {"kind": "starts_with", "text": text}


def _closing(slot: int, _: Topic) -> tuple[str, dict[str, Any]]:
    text = _CLOSINGS[slot % len(_CLOSINGS)]
    return f'End your answer with the words "{text}"', {"kind": "ends_with", "text": text}


_CONSTRAINTS = (
    _fixed("no_commas", ("Do not use any commas.", "Write it without commas.")),
    _fixed("lowercase", ("Write all of it in lower case.", "Use only lowercase letters.")),
    _fixed("uppercase", ("Write all of it in capital letters.", "Use only uppercase letters.")),
    _fixed("bullet_list", ("Answer as a bullet list.", "Write your answer as a list of bullet points.")),
    _fixed("numbered_list", ("Answer as a numbered list.", "Write your answer as a numbered list.")),
    _fixed("single_paragraph", ("Write it as one paragraph.", "Use exactly one paragraph.")),
    _Constraint("max_sentences", _few_sentences),
    _Constraint("max_words", _few_words),
    _Constraint("forbidden_words", _forbidden),
    _Constraint("required_words", _required),
    _Constraint("starts_with", _opening),
    _Constraint("ends_with", _closing),
    _Constraint(
        "exclamation",
        lambda slot, _: (
            ("End your answer with an exclamation mark.", "Finish with an exclamation mark.")[slot % 2],
            {"kind": "ends_with", "text": "!"},
        ),
    ),
    _fixed("question", ("End your answer with a question.", "Finish with a question.")),
    _fixed(
        "quoted", ("Put your whole answer in double quotation marks.", "Wrap your answer in double quotes.")
    ),
    _fixed("title", ("Begin with a title in double angle brackets, such as <<My Title>>.",)),
)

KINDS = tuple(constraint.kind for constraint in _CONSTRAINTS)


def training() -> list[Instruction]:
    """Return the instructions that the scripted rater gives feedback on."""
    return _instructions(_TRAINING_TOPICS, TRAINING_PER_KIND)


def held_out() -> list[Instruction]:
    """Return the instructions that only measure: other topics, the same kinds."""
    return _instructions(_HELD_OUT_TOPICS, HELD_OUT_PER_KIND)


def _instructions(topics: Sequence[Topic], per_kind: int) -> list[Instruction]:
    made = []
    for position, constraint in enumerate(_CONSTRAINTS):
        for slot in range(per_kind):
            # Steps that share no factor with what they walk over mix topics, tasks and kinds evenly.
            topic = topics[(3 * slot + 7 * position) % len(topics)]
            task = TASKS[(slot + 2 * position) % len(TASKS)].format(topic=topic.name)
            phrase, check = constraint.make(slot, topic)
            checks = (
                check,
                {"kind": "mentions_any", "words": list(topic.stems)},
                {"kind": "min_words", "n": FEWEST_WORDS},
            )
            made.append(Instruction(f"{task} {phrase}", constraint.kind, checks, topic.name))
    return made


def demonstration(instruction: Instruction, response: str) -> str | None:
    """Return what the scripted rater would have written: `response`, repaired so that it meets every check.

    It keeps the first complete sentences and changes what the constraint asks for, no more. None where
    nothing sensible is left to repair.
    """
    kept = _whole_sentences(response)
    # A repair's own words must not put an answer on its topic that was not on it.
    if not all_satisfied(instruction.checks[1:], _prose(kept)):
        return None
    repaired = _REPAIRS[instruction.kind](kept, instruction.checks[0], _TOPIC_OF[instruction.topic])
    if repaired is None or not all_satisfied(instruction.checks, repaired):
        return None
    return repaired


_TOPIC_OF: Mapping[str, Topic] = {topic.name: topic for topic in (*_TRAINING_TOPICS, *_HELD_OUT_TOPICS)}


def _whole_sentences(response: str) -> list[str]:
    """Return the whole sentences: no markup, no announcement of a list, no last one that was cut off."""
    plain = re.sub(r"[*#<>\"“”]+", "", response).strip()
    found = sentences(plain)
    if found and found[-1][-1] not in ".!?)'’":
        # Of a lone sentence that was cut off, keep what stands before its last comma.
        cut = found.pop()
        found += [] if found else [cut.rpartition(",")[0] or cut]
    found = [sentence for sentence in found if not sentence.endswith(":") and len(words(sentence)) >= 3]
    return [sentence if sentence[-1] in ".!?" else f"{sentence.rstrip(',;')}." for sentence in found]


def _first(kept: Sequence[str], count: int) -> list[str]:
    """Return at most `count` sentences, and no more than a demonstration's words beside the first."""
    chosen: list[str] = []
    for sentence in kept[:count]:
        if chosen and len(words(" ".join((*chosen, sentence)))) > _DEMONSTRATION_WORDS:
            break
        chosen.append(sentence)
    return chosen


def _prose(kept: Sequence[str], count: int = 2) -> str:
    return " ".join(_first(kept, count))


def _listed(kept: Sequence[str], marker: Callable[[int], str]) -> str | None:
    items = _first(kept, 3)
    return "\n".join(f"{marker(n)} {item}" for n, item in enumerate(items, 1)) if len(items) > 1 else None


def _shortened(kept: Sequence[str], n: int) -> str | None:
    """Return the first sentence within `n` words, or what of it stands before a comma."""
    first = kept[0]
    while len(words(first)) > n and "," in first:
        first = first.rpartition(",")[0] + "."
    return first if len(words(first)) <= n else None


def _without(kept: Sequence[str], forbidden: Sequence[str]) -> str | None:
    clean = [sentence for sentence in kept if not any(mentions(sentence, word) for word in forbidden)]
    return _prose(clean) if clean else None


def _with(kept: Sequence[str], topic: Topic) -> str:
    text = _prose(kept)
    return text if mentions(text, topic.rare) else f"{text} {topic.remark}"


def _ended(text: str, closing: str) -> str:
    return f"{text.rstrip('.!?')}{closing}" if closing == "!" else f"{text} {closing}"


def _titled(kept: Sequence[str], topic: Topic) -> str:
    return f"<<{topic.name.title()}>>\n{_prose(kept)}"


_Repair = Callable[[Sequence[str], Mapping[str, Any], Topic], str | None]
_REPAIRS: Mapping[str, _Repair] = {
    "no_commas": lambda kept, _, __: _prose(kept).replace(",", ""),
    "lowercase": lambda kept, _, __: _prose(kept).lower(),
    "uppercase": lambda kept, _, __: _prose(kept).upper(),
    "bullet_list": lambda kept, _, __: _listed(kept, lambda _: "-"),
    "numbered_list": lambda kept, _, __: _listed(kept, lambda n: f"{n}."),
    "single_paragraph": lambda kept, _, __: _prose(kept, 3),
    "max_sentences": lambda kept, check, _: _prose(kept, check["n"]),
    "max_words": lambda kept, check, _: _shortened(kept, check["n"]),
    "forbidden_words": lambda kept, check, _: _without(kept, check["words"]),
    "required_words": lambda kept, _, topic: _with(kept, topic),
    "starts_with": lambda kept, check, _: (
        f"{check['text']} {_prose(kept).removeprefix(check['text']).strip()}"
    ),
    "ends_with": lambda kept, check, _: _ended(_prose(kept), check["text"]),
    "exclamation": lambda kept, check, _: _ended(_prose(kept), check["text"]),
    "question": lambda kept, _, topic: f"{_prose(kept)} What do you think about {topic.name}?",
    "quoted": lambda kept, _, __: f'"{_prose(kept)}"',
    "title": lambda kept, _, topic: _titled(kept, topic),
}

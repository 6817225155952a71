"""IFEval's instructions: our verdicts against the harness's own on the whole prompt set."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation import ifeval
from evaluation.checks import BadCheck, satisfied, share_satisfied, validate
from evaluation.judges import ChatPrompt, ChecksJudge, Pair

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))
PROMPTS = PROMPTS / "ifeval" / "input_data.jsonl.gz"

# Answers of many shapes: what a model might say, and what only some instructions ask for.
SHAPES = [
    "",
    " \n ",
    "Sure! Here is the answer:\n\n*One point* is this, and *another point* is that.\n\nIs that all?",
    '```json\n{"answer": [1, 2, 3], "name": "Frog"}\n```',
    '"<<A Title>>\nFrogs live near water. They eat insects. They sleep in winter. P.S. They hop."',
    "* one\n* two\n* three\n\n***\n\nMy answer is yes. Call [name] at [number] on [date].\n\nP.P.S bye",
    "THIS IS AN ANSWER WRITTEN IN CAPITALS. NOBODY SHOUTS LIKE THIS. P.S. ENOUGH.",
    "this is an answer in small letters without any pause at all and it goes on for a while",
]
BY_LANGUAGE = {
    "de": "Das Wetter ist heute sehr schön und wir gehen alle zusammen spazieren.",
    "hi": "आज मौसम बहुत अच्छा है और हम सब साथ में टहलने जा रहे हैं।",
    "kn": "ಇಂದು ಹವಾಮಾನ ತುಂಬಾ ಚೆನ್ನಾಗಿದೆ ಮತ್ತು ನಾವು ಎಲ್ಲರೂ ಒಟ್ಟಿಗೆ ನಡೆಯಲು ಹೋಗುತ್ತೇವೆ.",
}


def meeting(kind: str, given: dict[str, Any]) -> str:  # noqa: PLR0911, PLR0912 - a table in all but name
    """A text written to follow one instruction of the prompt set."""
    sentence = "Frogs live near water and eat insects."
    at_least = next((v for k, v in given.items() if k.endswith("relation")), "") == "at least"
    match kind.partition(":")[2]:
        case "existence":
            return f"{sentence} {' '.join(given['keywords'])}"
        case "frequency":
            return " ".join([given["keyword"]] * (given["frequency"] if at_least else 1))
        case "letter_frequency":
            return f"A word. {given['letter'] * given['let_frequency']}" if at_least else "12 34."
        case "response_language":
            return BY_LANGUAGE.get(given["language"], sentence)
        case "number_sentences":
            return " ".join([sentence] * (given["num_sentences"] if at_least else 1))
        case "number_words":
            return " ".join(["word"] * (given["num_words"] if at_least else 2))
        case "number_paragraphs":
            return "\n***\n".join([sentence] * given["num_paragraphs"])
        case "nth_paragraph_first_word":
            return "\n\n".join([f"{given['first_word']} and more."] * given["num_paragraphs"])
        case "number_placeholders":
            return " ".join(f"[place {i}]" for i in range(given["num_placeholders"]))
        case "postscript":
            return f"{sentence}\n\n{given['postscript_marker']} Frogs hop."
        case "number_bullet_lists":
            return "\n".join(["* a point"] * given["num_bullets"])
        case "number_highlighted_sections":
            return " and ".join(["*a part*"] * given["num_highlights"])
        case "multiple_sections":
            return "\n".join(
                f"{given['section_spliter']} {i + 1}\n{sentence}" for i in range(given["num_sections"])
            )
        case "two_responses":
            return f"{sentence}\n******\nToads live near water too."
        case "repeat_prompt":
            return f"{given['prompt_to_repeat']}\n\n{sentence}"
        case "end_checker":
            return f"{sentence} {given['end_phrase']}"
        case "capital_word_frequency":
            return " ".join(["HOP"] * (given["capital_frequency"] if at_least else 1))
    return sentence


def rows() -> list[dict[str, Any]]:
    if not PROMPTS.exists():
        pytest.skip(f"{PROMPTS} is absent: set INSTRUCTLOOP_DATA to the folder that holds ifeval/")
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def answers_to(row: dict[str, Any], at: int) -> Iterator[str]:
    for kind, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        yield meeting(kind, given)
    yield SHAPES[at % len(SHAPES)]
    yield SHAPES[(at * 5 + 3) % len(SHAPES)]


def test_verdicts_are_the_harness_own_on_the_whole_prompt_set() -> None:
    prompts = ifeval.read(PROMPTS) if (given := rows()) else []
    from lm_eval.tasks.ifeval import utils  # only now: reading has imported it without a download

    verdicts: dict[str, set[bool]] = {}
    loosened, tossed = 0, set()
    assert len(prompts) == len(given) == 271
    for at, (row, prompt) in enumerate(zip(given, prompts, strict=True)):
        for text in answers_to(row, at):
            found = ifeval.following(prompt.key, prompt.checks, text)
            assert [satisfied(check, text) for check in prompt.checks] == list(found.strict)
            if any(not check.get("letter", "a").isalpha() for check in prompt.checks):
                assert found == ifeval.following(prompt.key, prompt.checks, text)
                tossed.add(row["key"])
                continue
            expected = utils.process_results(row, [text])
            assert list(found.strict) == expected["inst_level_strict_acc"], (row["key"], text)
            assert list(found.loose) == expected["inst_level_loose_acc"], (row["key"], text)
            loosened += sum(found.loose) - sum(found.strict)
            for kind, follows in zip(row["instruction_id_list"], found.strict, strict=True):
                verdicts.setdefault(kind, set()).add(follows)
    assert len(verdicts) == 25
    assert [kind for kind, seen in verdicts.items() if seen != {True, False}] == []
    assert loosened > 0
    # "!" and "#" are no letters: the harness counts one that it draws anew, so it has no verdict of its own.
    assert len(tossed) == 2


def test_it_downloads_nothing_and_guesses_a_language_the_same_way_in_every_process(tmp_path: Path) -> None:
    program = """
import socket
def refused(*_): raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
from evaluation.checks import satisfied
sentences = {"kind": "length_constraints:number_sentences", "relation": "at least", "num_sentences": 2}
capitals = {"kind": "change_case:capital_word_frequency", "capital_relation": "less than"}
capitals["capital_frequency"] = 2
print(satisfied(sentences, "Dr. Frog is in."), satisfied(sentences, "Dr. Frog is in. Go."))
print(satisfied(capitals, "a FROG hops"), satisfied(capitals, "A FROG HOPS"))
print([satisfied({"kind": "language:response_language", "language": "en"}, "ok go ja no") for _ in range(20)])
"""
    environment = {**os.environ, "HOME": str(tmp_path), "NLTK_DATA": str(tmp_path)}

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    lines = run()
    assert lines[:2] == ["False True", "True False"]
    assert len(set(json.loads(lines[2].lower()))) == 1
    assert list(tmp_path.rglob("*punkt*")) == []


@pytest.mark.parametrize(
    ("check", "field"),
    [
        ({"kind": "length:nothing"}, "kind"),
        ({"kind": "keywords:existence"}, "keywords"),
        ({"kind": "keywords:existence", "keywords": []}, "keywords"),
        ({"kind": "punctuation:no_comma", "n": 3}, "n"),
        (
            {"kind": "length_constraints:number_words", "relation": "about", "num_words": 3},
            "length_constraints:number_words",
        ),
        ({"kind": "keywords:forbidden_words", "forbidden_words": 7}, "keywords:forbidden_words"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_refused_by_name(check: dict[str, Any], field: str) -> None:
    with pytest.raises(BadCheck, match=rf"^{field}: "):
        validate(check)


def test_a_prompt_set_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    good = {"key": 1, "prompt": "Hi", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "kwargs": []}) + "\n")
    with pytest.raises(ifeval.BadInstruction, match="line 2"):
        ifeval.read(file)
    file.write_text(json.dumps({**good, "kwargs": [{"num_words": None}]}) + "\n")
    (prompt,) = ifeval.read(file)
    assert prompt.checks == ({"kind": "punctuation:no_comma"},)
    assert prompt.messages[0]["content"] == "Hi"


def test_accuracies_count_prompts_and_instructions() -> None:
    found = ifeval.accuracies(
        [
            ifeval.Following("a", (True, False, True), (True, True, True)),
            ifeval.Following("b", (True,), (True,)),
            ifeval.Following("c", (False, False), (False, True)),
        ]
    )
    assert found.prompt_strict.estimate == pytest.approx(1 / 3)
    assert found.prompt_loose.estimate == pytest.approx(2 / 3)
    assert found.instruction_strict.estimate == pytest.approx(3 / 6)
    assert found.instruction_loose.estimate == pytest.approx(5 / 6)
    assert found.instruction_strict.clusters == 3


def test_the_checks_judge_prefers_the_answer_that_follows_more() -> None:
    no_comma, two_words = (
        {"kind": "punctuation:no_comma"},
        {"kind": "max_words", "n": 2},
    )
    prompt = ChatPrompt("p", ({"role": "user", "content": "Hi"},), (no_comma, two_words))
    pairs = [
        Pair(prompt, "Hello there", "Hello, there"),
        Pair(prompt, "Hello, you there", "Hello you there"),
        Pair(prompt, "Hello you there", "Hello, there"),
        Pair(ChatPrompt("q", prompt.messages), "Hello", "Hello,"),
    ]
    assert ChecksJudge().compare(pairs) == [1.0, 0.0, 0.5, None]
    assert share_satisfied(prompt.checks, "Hello, there") == 0.5

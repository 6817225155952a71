"""An evaluation carried out on real models of a few thousand weights: its result, kills, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from unit.evaluation.evaluating import ask, evaluator, installation_with_two_versions, run_in_a_process
from unit.evaluation.scripted_endpoint import Endpoint, Reply, said
from unit.training.installation import Installation
from unit.training.tiny import TransformersSampler

from evaluation.checks import share_satisfied
from evaluation.evaluation_files import EvaluationFiles, evaluation_directory
from evaluation.evaluation_report import evaluation_report
from evaluation.reward_model import RewardModel
from evaluation.run import EvaluationBusy
from feedback.cases import Cases
from feedback.forgetting import Forgettings
from feedback.new_case import NewCase
from registry.arena import Arena
from registry.evaluations import MOST_ATTEMPTS, Evaluation, EvaluationConflict, Evaluations

PROMPTS = 34


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return installation_with_two_versions(tmp_path / "data")


def prompt_file(directory: Path, count: int = PROMPTS) -> str:
    """Every second one with a check."""
    rows: list[dict[str, Any]] = [{"prompt": f"w{i % 50} w{i // 50}"} for i in range(count)]
    for row in rows[::2]:
        row["checks"] = [{"kind": "mentions_any", "words": ["w1", "w2", "w3", "w4", "w5", "w6", "w7"]}]
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def carried_out(installation: Installation, number: int, **change: Any) -> Evaluation:
    return evaluator(installation, **change).carry_out(lambda: number)


def files_of(installation: Installation, number: int) -> EvaluationFiles:
    return EvaluationFiles(evaluation_directory(installation.directory, number))


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    first = installation_with_two_versions(unbroken)
    ask(first, prompts=prompt_file(tmp_path), max_tokens=3)
    first.engine.dispose()
    shutil.copytree(unbroken, broken)
    assert run_in_a_process(unbroken) == 0
    # Of 1 file of prompts, 2 of each contestant's answers and 2 of verdicts; one run gets nowhere at all.
    for files in (0, 1, 0, 1, 1, 1, 1, 1):
        assert run_in_a_process(broken, files) == -9
    assert run_in_a_process(broken) == 0
    found = []
    for directory in (unbroken, broken):
        installation = Installation.__new__(Installation)
        installation.open(directory)
        (evaluation,) = Evaluations(installation.engine).list()
        assert evaluation.state == "done", evaluation.error
        found.append((evaluation.result, evaluation.done, contents(evaluation_directory(directory, 1))))
        assert evaluation.attempts == (1 if directory == unbroken else 9)
    assert found[0] == found[1]
    assert len(found[0][2]) == 1 + 2 + 2 + 2


def test_what_comes_of_it_is_what_its_answers_say(installation: Installation, tmp_path: Path) -> None:
    RewardModel.from_decoder(installation.registry.version("policy-0001").path).save(
        installation.directory / "rounds" / "0004" / "judge"
    )
    three = ["policy-0000", "policy-0001", "policy-0000+few-shot"]
    number = ask(
        installation, prompts=prompt_file(tmp_path, 40), contestants=three, judges=["checks", "reward-model"]
    )
    ended = carried_out(installation, number)
    assert (ended.state, ended.error) == ("done", None)
    assert ended.result is not None
    assert (ended.done, ended.total) == (40 * (3 + 2 * 3), 40 * (3 + 2 * 3))
    files, result = files_of(installation, number), ended.result
    answers = [[*files.answers_so_far(i, 0), *files.answers_so_far(i, 1)] for i in range(3)]
    assert [len(own) for own in answers] == [40] * 3
    prompts = files.prompts()
    assert prompts is not None
    wins = []
    for k, prompt in enumerate(prompts):
        for ours, theirs in zip(answers[0][k], answers[1][k], strict=True):
            if prompt["checks"]:
                our, their = (share_satisfied(prompt["checks"], one["text"]) for one in (ours, theirs))
                wins.append(0.5 if our == their else float(our > their))
    checks, reward = result["tables"]
    pair = checks["pairs"][0]
    assert (pair["first"], pair["second"], pair["verdicts"], pair["no_verdict"]) == (*three[:2], 40, 40)
    assert pair["win_rate"]["estimate"] == pytest.approx(sum(wins) / len(wins))
    assert pair["ties"] == wins.count(0.5)
    assert pair["win_rate"]["clusters"] == 20
    assert [row["verdicts"] for row in reward["pairs"]] == [80] * 3
    assert reward["name"] == "reward model of round 4"
    assert [one["name"] for one in result["contestants"]] == three
    assert result["contestants"][0]["tokens"] <= 6
    places = [one["contestant"] for one in checks["leaderboards"]["plain"]["ratings"]]
    assert sorted(places) == sorted(three)
    page = evaluation_report(ended, files).html()
    for text in ("wins over", "Leaderboard with length", "reward model of round 4", "Answers side by side"):
        assert text in page
    assert answers[1][0][0]["text"] in page


def test_held_out_prompts_come_from_the_store_and_go_when_they_are_forgotten(
    installation: Installation,
) -> None:
    installation.give_feedback(seed=1)
    number = ask(installation, prompts="held-out", limit=12)
    assert carried_out(installation, number).state == "done"
    files = files_of(installation, number)
    prompts = files.prompts()
    assert prompts is not None
    assert len({prompt["key"] for prompt in prompts}) == len(prompts) == 12
    assert {check["kind"] for prompt in prompts for check in prompt["checks"]} == {"required_words"}
    recorded = installation.store.completion(prompts[0]["completion_id"])[0]
    assert prompts[0]["messages"] == recorded.messages

    # Asked again and stopped half-way, forgotten meanwhile: what it had is gone, and it asks others.
    class Stopped(TransformersSampler):
        def sample(self, *given: Any, **more: Any) -> Any:
            raise SystemExit(143)

    again = ask(installation, prompts="held-out", limit=12)
    with pytest.raises(SystemExit):
        carried_out(installation, again, make_sampler=Stopped)
    gone = prompts[0]["completion_id"]
    forget(installation, gone)
    assert evaluator(installation).carry_out_next() is not None
    ended = Evaluations(installation.engine).get(again)
    assert (ended.state, ended.attempts) == ("done", 2)
    assert gone not in files_of(installation, again).completion_ids()


def test_a_prompt_that_is_forgotten_while_it_is_asked_ends_the_evaluation(installation: Installation) -> None:
    installation.give_feedback(seed=1)
    number = ask(installation, prompts="held-out", limit=12)
    files = files_of(installation, number)

    class Meanwhile(TransformersSampler):
        def sample(self, *given: Any, **more: Any) -> Any:
            if ids := files.completion_ids():
                forget(installation, ids[-1])
                files.delete_texts()  # as the upkeep does
            return super().sample(*given, **more)

    ended = carried_out(installation, number, make_sampler=Meanwhile)
    assert ended.state == "failed"
    assert "forgotten meanwhile" in str(ended.error)
    assert not (files.directory / "answers").exists()


def test_cases_are_asked_and_judged_and_go_when_whoever_they_are_of_is_forgotten(
    installation: Installation,
) -> None:
    installation.give_feedback(seed=1)
    RewardModel.from_decoder(installation.registry.version("policy-0001").path).save(
        installation.directory / "rounds" / "0004" / "judge"
    )
    cases = Cases(installation.engine)

    def add(validate: Any = lambda *_: None, **new: Any) -> str:
        return cases.add(NewCase(**new), actor="ann", validate=validate).id

    check = {"kind": "mentions_any", "words": ["w7"]}
    # Its bad answer is the recorded one, and a person can be forgotten by it.
    recorded = add(completion_id="chatcmpl-1-0", choice=0, good="w5 w6")
    checked = add(messages=[{"role": "user", "content": "w1 w2"}], checks=[check])
    add(messages=[{"role": "user", "content": "w3 w4"}], checks=[check])
    removed = add(messages=[{"role": "user", "content": "w5 w6"}], checks=[check])
    cases.remove(removed, actor="ann")
    number = ask(installation, prompts="cases", judges=[])
    ended = carried_out(installation, number)
    assert ended.state == "done", ended.error
    assert ended.result is not None
    files = files_of(installation, number)
    prompts = files.prompts()
    assert prompts is not None
    assert [prompt["key"] for prompt in prompts][:2] == [recorded, checked]
    assert (len(prompts), ended.result["prompts_with_checks"]) == (3, 2)
    assert prompts[0]["messages"] == installation.store.completion("chatcmpl-1-0")[0].messages
    # Two answers of each to three prompts; the one without checks is judged beside its bad answer.
    given = [(table["name"], table["pairs"][0]["verdicts"]) for table in ended.result["tables"]]
    assert given == [("checks", 4), ("cases", 6), ("reward model of round 4", 6)]
    assert "else the reward model of round 4" in ended.result["judges"][1]["statement"]

    class Meanwhile(TransformersSampler):
        def sample(self, *given: Any, **more: Any) -> Any:
            forget(installation, "chatcmpl-1-0")
            return super().sample(*given, **more)

    again = ask(installation, prompts="cases", judges=["checks"])
    ended = carried_out(installation, again, make_sampler=Meanwhile)
    assert (ended.state, "forgotten meanwhile" in str(ended.error)) == ("failed", True)
    assert files_of(installation, again).prompts() is None
    # What the upkeep looks for among those that ended.
    names = [("completion", id) for id in files.completion_ids()]
    assert installation.store.forgettings.among(names) == {("completion", recorded)}  # type: ignore[arg-type]


def test_a_language_model_labels_every_answer_once(installation: Installation, tmp_path: Path) -> None:
    def script(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"]
        if "<answer A>" in asked:
            return said('{"verdict": "tie"}')
        return said(
            '{"labels": ["opinion"]}' if " w2 " in asked.partition("<answer>")[2] else '{"labels": []}'
        )

    endpoint = Endpoint(script)
    with endpoint.running() as url:
        number = ask(
            installation, prompts=prompt_file(tmp_path), judges=[f"honest+labels={url}#m", f"{url}#m"]
        )
        ended = carried_out(installation, number)
    assert ended.state == "done", ended.error
    assert ended.result is not None
    assert ended.done == ended.total == PROMPTS * (2 + 2 + 2)
    (labels,) = ended.result["labels"]
    assert labels["source"] == "m on honest"
    assert [one["answers"] for one in labels["contestants"]] == [2 * PROMPTS] * 2
    files = files_of(installation, number)
    for i, one in enumerate(labels["contestants"]):
        texts = [answer["text"] for k in range(2) for own in files.answers_so_far(i, k) for answer in own]
        expected = sum(" w2 " in f"\n{text}\n" for text in texts) / len(texts)
        assert 0 < expected < 1
        assert one["shares"]["opinion"]["estimate"] == pytest.approx(expected)
    assert sum("<answer>" in str(body["messages"]) for body in endpoint.asked) == 2 * 2 * PROMPTS
    # The labels are kept: nobody is asked for them again.
    assert len(list((files.directory / "labels").iterdir())) == 2 * 2


def forget(installation: Installation, completion_id: str) -> None:
    forgettings = Forgettings(installation.engine)
    forgettings.erase(forgettings.begin("completion", completion_id, "test"))


@pytest.mark.parametrize(
    ("request_", "change", "reason"),
    [
        ({"prompts": "held-out"}, {}, "prompts: there are 0 in the held-out side of the store"),
        ({"prompts": "{file}", "limit": 1}, {}, "prompts: there are 1 in "),
        ({"prompts": "{bad}"}, {}, 'line 1: "prompt" (a string)'),
        ({"prompts": "{file}"}, {"max_model_len": 6}, "max_tokens: 6 leaves no room"),
        (
            {"prompts": "{file}", "contestants": ["policy-0000", "http://127.0.0.1:9/v1#m#MISSING_API_KEY"]},
            {"environment": {}},
            "MISSING_API_KEY, with the key for m at 127.0.0.1:9, is not set",
        ),
    ],
)
def test_one_that_can_t_be_carried_out_says_why(
    installation: Installation, tmp_path: Path, request_: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n')
    names = {"{file}": prompt_file(tmp_path, 4), "{bad}": str(tmp_path / "bad.jsonl")}
    request_ = request_ | {"prompts": names.get(request_["prompts"], request_["prompts"])}
    ended = carried_out(installation, ask(installation, **request_), **change)
    assert ended.state == "failed"
    assert reason in str(ended.error)
    assert evaluator(installation).carry_out_next() is None


def test_an_unexpected_failure_is_told_and_not_tried_for_ever(
    installation: Installation, tmp_path: Path
) -> None:
    class Broken(TransformersSampler):
        def sample(self, *given: Any, **more: Any) -> Any:
            raise RuntimeError("CUDA error")

    number = ask(installation, prompts=prompt_file(tmp_path, 4))
    assert carried_out(installation, number, make_sampler=Broken).error == "RuntimeError: CUDA error"
    evaluations = Evaluations(installation.engine)
    killed = ask(installation, prompts=prompt_file(tmp_path, 4))
    for _ in range(MOST_ATTEMPTS):
        evaluations.begin(killed)
    ended = evaluator(installation).carry_out_next()
    assert ended is not None
    assert (ended.id, ended.state) == (killed, "failed")
    assert f"killed {MOST_ATTEMPTS} times" in str(ended.error)


def test_only_one_is_carried_out_at_a_time(installation: Installation, tmp_path: Path) -> None:
    first, second = (ask(installation, prompts=prompt_file(tmp_path, 4)) for _ in range(2))
    tried: list[Any] = []

    class Beside(TransformersSampler):
        def sample(self, *given: Any, **more: Any) -> Any:
            if not tried:
                tried.append(evaluator(installation).carry_out_next())
                with pytest.raises(EvaluationBusy, match="another evaluation is under way"):
                    evaluator(installation).carry_out(lambda: second)
            return super().sample(*given, **more)

    assert carried_out(installation, first, make_sampler=Beside).state == "done"
    assert tried == [None]
    assert Evaluations(installation.engine).get(second).state == "requested"
    assert evaluator(installation).needed() == ({"policy-0000", "policy-0001"}, set())


def test_one_that_is_cancelled_stops_at_its_next_step_and_can_be_taken_up_there(
    installation: Installation, tmp_path: Path
) -> None:
    number = ask(installation, prompts=prompt_file(tmp_path))
    after = ask(installation, prompts=prompt_file(tmp_path), limit=4)
    evaluations = Evaluations(installation.engine)
    asked: list[int] = []

    class Cancelled(TransformersSampler):
        def sample(self, prompts: Any, **more: Any) -> Any:
            asked.append(len(prompts))
            if len(asked) == 2:
                evaluations.cancel(number, "ann")
            return super().sample(prompts, **more)

    ended = evaluator(installation, make_sampler=Cancelled).carry_out_next()
    assert ended is not None
    assert (ended.id, ended.state, ended.error, ended.result) == (number, "cancelled", None, None)
    # What was under way is kept, nothing is begun.
    assert asked == [32, 2]
    assert len(files_of(installation, number).answers_so_far(0, 1)) == 2
    assert files_of(installation, number).answers_so_far(1, 0) == []
    # Whoever carries them out goes on with the next one, and leaves it alone.
    following = evaluator(installation).carry_out_next()
    assert following is not None
    assert (following.id, following.state) == (after, "done")
    assert evaluator(installation).carry_out_next() is None
    again = carried_out(installation, number, make_sampler=Cancelled)
    assert (again.state, again.error) == ("done", None)
    assert asked == [32, 2, 32, 2]


def test_one_that_is_cancelled_just_before_it_is_begun_is_not(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = ask(installation, prompts=prompt_file(tmp_path, 4))
    evaluations = Evaluations(installation.engine)
    waiting = evaluations.get(number)
    evaluations.cancel(number, "ann")
    monkeypatch.setattr(evaluations, "next", lambda: waiting)
    assert evaluator(installation, evaluations=evaluations).carry_out_next() is None
    assert evaluations.get(number).state == "cancelled"


def test_people_judge_in_the_arena_and_their_votes_count_when_it_is_counted_again(
    installation: Installation, tmp_path: Path
) -> None:
    arena, prompts = Arena(installation.engine), prompt_file(tmp_path, 4)
    number = ask(installation, prompts=prompts, n=1, judges=["honest=people:2", "checks"])
    asked = carried_out(installation, number)
    assert asked.state == "done", asked.error
    assert asked.result is not None
    assert asked.result["labels"] == [], "nobody has looked at them"
    people = asked.result["tables"][0]
    assert (people["name"], people["axis"]) == ("people on honest", "honest")
    before = people["pairs"][0]["verdicts"]
    # Whoever is asked likes what the first contestant said, and does not see who it was.
    liked = {row[0]["text"] for row in files_of(installation, number).answers_so_far(0, 0)}
    voted = 0
    for rater in ("k/ann", "k/ben"):
        while (pair := arena.next_pair(rater)) is not None:
            assert pair.axis == "honest"
            # One of them finds an opinion in what the second contestant said.
            opinion = ["opinion"] if rater == "k/ann" else []
            given = [[] if text in liked else opinion for text in (pair.first, pair.second)]
            choice: Any = "first" if pair.first in liked else "second"
            arena.vote(pair.id, rater, choice, first_labels=given[0], second_labels=given[1])
            voted += 1
    assert voted > 0

    def no_engine(_: Path) -> TransformersSampler:
        raise AssertionError("nobody answers anew")

    again = carried_out(installation, number, make_sampler=no_engine)
    assert again.state == "done", again.error
    assert again.result is not None
    counted = again.result["tables"][0]["pairs"][0]
    assert counted["verdicts"] == before + voted / 2 == 4
    assert counted["win_rate"]["estimate"] > 0.5
    (labels,) = again.result["labels"]
    assert labels["source"] == "people on honest"
    shares = [one["shares"]["opinion"]["estimate"] for one in labels["contestants"]]
    assert shares == [0.0, 0.5]
    assert [one["opinions"] for one in labels["contestants"]] == [voted, voted]
    arena.withdraw_asking([one["messages"] for one in files_of(installation, number).prompts() or ()])
    assert arena.next_pair("k/cat") is None
    without = ask(installation, prompts=prompts)
    carried_out(installation, without)
    with pytest.raises(EvaluationConflict):
        carried_out(installation, without)

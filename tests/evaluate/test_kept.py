"""Answers on disk, and what they took, over the processes that asked."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from evalkit.errors import InputError
from evalkit.evaluate.engines import kept
from evalkit.evaluate.engines.base import Label, Prompt, Span
from evalkit.evaluate.engines.kept import Kept, Questions, key_of, question
from evalkit.files import locked


def prompt(number, ids):
    return Prompt(label=Label("task", number), ids=ids, max_new=6, until=["."])


PROMPTS = [prompt(0, [1, 2]), prompt(1, [1, 2]), prompt(0, [1, 2]), prompt(2, [3])]


@pytest.fixture
def at(monkeypatch):
    """Sets the clock."""

    def set_to(seconds):
        monkeypatch.setattr(kept.time, "perf_counter", lambda: seconds)

    return set_to


def test_requests_that_ask_alike_are_asked_once(tmp_path):
    questions = Questions(Kept(tmp_path / "answers", "x"), PROMPTS)
    missing = questions.missing()
    assert [one["ids"] for one in missing.values()] == [[1, 2], [1, 2], [3]], "documents 0, 1 and 2"
    first, *others = missing
    questions.begin()
    assert questions.keep(first, "a") == [(0, "a"), (2, "a")]
    assert list(questions.missing()) == others
    assert list(Questions(Kept(tmp_path / "answers", "x"), PROMPTS).known()) == [(0, "a"), (2, "a")]


def test_seconds_add_up_over_the_processes_that_asked(tmp_path, at):
    """The first was killed after two answers; what it spent on a third is not known, and a start is nobody's time."""
    at(10.0)
    questions = Questions(Kept(tmp_path / "answers", "x"), PROMPTS)
    keys = list(questions.missing())
    for begins, ends, key in ((20.0, 23.0, keys[1]), (43.0, 44.5, keys[0])):
        at(begins)
        questions.begin()  # then a worker died, and what was left was asked of another
        at(ends)
        questions.keep(key, "answer")
    at(50.0)
    again = Kept(tmp_path / "answers", "x")
    assert again.seconds(PROMPTS) == 4.5
    at(100.0)
    questions = Questions(again, PROMPTS)
    (left,) = questions.missing()
    questions.begin()
    at(102.0)
    questions.keep(left, "answer")
    assert again.seconds(PROMPTS) == Kept(tmp_path / "answers", "x").seconds(PROMPTS) == 6.5
    assert again.seconds([PROMPTS[1]]) == 3.0
    assert again.seconds([prompt(9, [9])]) == 0.0


def test_answers_without_seconds_took_none(tmp_path):
    """Files of before they were kept."""
    (key,) = Questions(Kept(tmp_path / "answers", "x"), PROMPTS[:1]).missing()
    with (tmp_path / "answers").open("a") as file:
        file.write(json.dumps({"key": key, "answer": "a"}) + "\n")
    found = Kept(tmp_path / "answers", "x")
    assert found.answers == {key: "a"}
    assert found.seconds(PROMPTS) == 0.0


def test_seconds_that_are_no_number_are_refused(tmp_path):
    Kept(tmp_path / "answers", "x").keep("key", "a", 1.0)
    text = (tmp_path / "answers").read_text()
    (tmp_path / "answers").write_text(text.replace("1.0", "[]"))
    with pytest.raises(InputError, match="is no file of answers"):
        Kept(tmp_path / "answers", "x")


def test_a_question_keeps_its_name_so_that_older_folders_go_on():
    asked = {"ids": [1, 2], "max_new": 6, "until": ["."], "label": "task document 0"}
    assert question(PROMPTS[0]) == ("generate", asked)
    text = '["generate", {"ids": [1, 2], "label": "task document 0", "max_new": 6, "until": ["."]}]'
    assert key_of("generate", asked) == hashlib.sha256(text.encode()).hexdigest()[:32]
    span = Span(label=Label(None, None), context=(4,), continuation=(5, 6))
    assert question(span) == (
        "score",
        {"context": [4], "continuation": [5, 6], "label": "request document ?"},
    )


def test_what_another_process_is_writing_is_not_cut(tmp_path):
    path, line = tmp_path / "answers", json.dumps({"key": "b", "answer": 2, "seconds": 0.5}) + "\n"
    first = Kept(path, "x")
    with ThreadPoolExecutor(2) as pool:
        with locked(path):
            with path.open("a") as file:
                file.write(line[:9])
            opened, kept_first = pool.submit(Kept, path, "x"), pool.submit(first.keep, "a", 1)
            time.sleep(0.2)
            assert not opened.done()
            assert not kept_first.done()
            with path.open("a") as file:
                file.write(line[9:])
        kept_first.result(20)
        assert opened.result(20).answers["b"] == 2
    assert Kept(path, "x").answers == {"a": 1, "b": 2}


def test_a_line_that_a_killed_process_left_is_cut(tmp_path):
    Kept(tmp_path / "answers", "x").keep("a", 1)
    with (tmp_path / "answers").open("a") as file:
        file.write('{"key": "b", "ans')
    Kept(tmp_path / "answers", "x").keep("c", 3)
    assert Kept(tmp_path / "answers", "x").answers == {"a": 1, "c": 3}


def test_processes_that_begin_a_file_together_begin_one(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Kept(tmp_path / "answers", "x"), range(32)))
    assert (tmp_path / "answers").read_text() == '{"identity": "x"}\n'

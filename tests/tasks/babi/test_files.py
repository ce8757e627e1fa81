"""The reader of the original format."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlm.tasks import babi

TEXT = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway. \n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 Daniel went back to the hallway.\n"
    "5 Where is Daniel? \thallway\t4\n"
    "1 Sandra got the milk there.\n"
    "2 Sandra moved to the office.\n"
    "3 Where is the milk? \toffice\t1 2\n"
)


def write(folder: Path, text: str, name: str = "qa1_single_test.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_question_becomes_a_story_without_the_earlier_questions(tmp_path: Path) -> None:
    first, second, third = babi.load(write(tmp_path, TEXT))
    assert first.facts == ["Mary moved to the bathroom.", "John went to the hallway."]
    assert (first.question, first.answer, first.supporting) == ("Where is Mary?", "bathroom", [0])
    assert second.facts == [*first.facts, "Daniel went back to the hallway."]
    assert (second.answer, second.supporting, second.task) == ("hallway", [2], "qa1")
    assert third.facts == ["Sandra got the milk there.", "Sandra moved to the office."]
    assert third.supporting == [0, 1]


def test_windows_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "qa1_single_test.txt"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert babi.load(path) == babi.load(write(tmp_path, TEXT, "qa1_again_test.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Mary moved.\nno number here\n", r":2: expected 'number sentence'"),
        ("1 Mary moved.\n3 John moved.\n", r":2: expected line number 2 or 1, got 3"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", r":2: expected 'question<TAB>answer"),
        ("1 Mary moved.\n2 Where is Mary?\tattic\t7\n", r":2: supporting line '7'"),
        ("1 Mary moved.\n", "holds no question"),
        ("", "holds no question"),
    ],
)
def test_a_malformed_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        babi.load(write(tmp_path, text))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        babi.load(tmp_path / "qa1.txt")
    (tmp_path / "qa1.bin").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="not UTF-8"):
        babi.load(tmp_path / "qa1.bin")


def test_a_folder_is_searched_for_the_task_and_test_is_preferred(tmp_path: Path) -> None:
    write(tmp_path, TEXT, "qa1_single_train.txt")
    assert len(babi.load_task(tmp_path, "qa1")) == 3
    write(tmp_path, TEXT.split("1 Sandra")[0], "qa1_single_test.txt")
    assert len(babi.load_task(tmp_path, "qa1")) == 2
    assert len(babi.load_task(tmp_path, "qa1", "train")) == 3
    with pytest.raises(ValueError, match="no file qa2_"):
        babi.load_task(tmp_path, "qa2")
    with pytest.raises(ValueError, match="does not exist"):
        babi.load_task(tmp_path / "none", "qa1")


@pytest.mark.parametrize("task", babi.TASKS)
def test_every_original_file_is_read(task: str, original_stories: Path) -> None:
    stories = babi.load_task(original_stories, task)
    assert len(stories) >= 900
    for story in stories:
        assert story.task == task and story.facts and story.supporting
        assert not any("\t" in fact or "?" in fact for fact in story.facts)
        assert max(story.supporting) < len(story.facts)

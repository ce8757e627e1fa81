"""The curriculum: when stages begin, what ends them, and what resuming restores."""

from __future__ import annotations

import pytest

from memlm.train import Curriculum, Stage


def begun(curriculum: Curriculum, steps: int, right: list[int] | None = None) -> list[int]:
    """The stage of each step, with `right` of 10 answers right at each."""
    stages = []
    for step in range(steps):
        stages.append(curriculum.index_at(step))
        curriculum.record(step, right[step] if right else 0, 10)
    return stages


def test_a_stage_ends_after_its_steps() -> None:
    curriculum = Curriculum([Stage(max_segments=1, steps=3), Stage(max_segments=2, steps=2)])
    assert curriculum.total_steps == 5
    assert begun(curriculum, 5) == [0, 0, 0, 1, 1]
    assert not curriculum.finished(4)
    assert curriculum.finished(5)


def test_a_stage_ends_at_its_score_over_a_full_window() -> None:
    stages = [Stage(max_segments=1, advance_at=0.9), Stage(max_segments=2)]
    right = [10, 0, 9, 9, 9, 10]
    assert begun(Curriculum(stages, score_window=2), 6, right) == [0, 0, 0, 0, 1, 1]
    assert begun(Curriculum(stages, score_window=3), 6, right) == [0, 0, 0, 0, 0, 1]


def test_scores_of_one_stage_do_not_end_the_next() -> None:
    stages = [Stage(max_segments=n, advance_at=0.9) for n in (1, 2, 3)]
    assert begun(Curriculum(stages, score_window=2), 6, [10] * 6) == [0, 0, 1, 1, 2, 2]


def test_steps_end_a_stage_whose_score_is_never_reached() -> None:
    stages = [Stage(max_segments=1, advance_at=0.9, steps=4), Stage(max_segments=2)]
    assert begun(Curriculum(stages, score_window=1), 6) == [0, 0, 0, 0, 1, 1]


def test_min_steps_holds_a_good_score_back() -> None:
    stages = [Stage(max_segments=1, advance_at=0.9, min_steps=3), Stage(max_segments=2)]
    assert begun(Curriculum(stages, score_window=1), 5, [10] * 5) == [0, 0, 0, 1, 1]


def test_a_stage_begins_behind_what_was_fetched_ahead() -> None:
    stages = [Stage(max_segments=1, advance_at=0.9), Stage(max_segments=2, steps=2)]
    curriculum = Curriculum(stages, score_window=1, lookahead=2)
    for step in range(5):
        fetched = [curriculum.index_at(ahead) for ahead in range(step, step + 3)]
        curriculum.record(step, 10, 10)
        assert [curriculum.index_at(ahead) for ahead in range(step, step + 3)] == fetched
    assert [curriculum.index_at(step) for step in range(5)] == [0, 0, 0, 1, 1]
    assert curriculum.finished(5)


def test_an_evaluation_may_end_a_stage_instead() -> None:
    stages = [Stage(max_segments=1, advance_at=0.9), Stage(max_segments=2)]
    curriculum = Curriculum(stages, advance_on="evaluation", score_window=1)
    curriculum.record(0, 10, 10)
    assert curriculum.index_at(1) == 0
    curriculum.record_score(1, 0.8)
    assert curriculum.index_at(1) == 0
    curriculum.record_score(1, 0.9)
    assert curriculum.index_at(1) == 1


def test_a_saved_curriculum_goes_on_as_it_would_have() -> None:
    stages = [Stage(max_segments=n, advance_at=0.8, steps=9) for n in (1, 2, 3)]
    right = [9, 7, 8, 9, 3, 9, 9, 9, 2, 9, 9, 9]
    whole = Curriculum(stages, score_window=3)
    expected = begun(whole, 12, right)
    for stop in range(1, 12):
        first = Curriculum(stages, score_window=3)
        begun(first, stop, right)
        second = Curriculum(stages, score_window=3)
        second.load_state_dict(first.state_dict())
        found = []
        for step in range(stop, 12):
            found.append(second.index_at(step))
            second.record(step, right[step], 10)
        assert found == expected[stop:]
        assert second.state_dict() == whole.state_dict()


def test_another_curriculum_is_not_resumed() -> None:
    saved = Curriculum([Stage(max_segments=1)]).state_dict()
    with pytest.raises(ValueError, match="1 stages, this one 2"):
        Curriculum([Stage(max_segments=1)] * 2).load_state_dict(saved)


def test_learning_rates_rise_and_fall_by_stage() -> None:
    stages = [
        Stage(max_segments=1, steps=4, warmup_steps=2, learning_rate=1.0, final_learning_rate=0.0),
        Stage(max_segments=2),
    ]
    curriculum = Curriculum(stages)
    assert curriculum.sets_learning_rate
    found = [curriculum.learning_rate_at(step, 0.25) for step in range(6)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.25, 0.25])


def test_a_learning_rate_of_nothing_is_nothing() -> None:
    stages = [Stage(max_segments=1, steps=2, learning_rate=0.0), Stage(max_segments=2)]
    curriculum = Curriculum(stages)
    assert curriculum.sets_learning_rate
    assert [curriculum.learning_rate_at(step, 0.25) for step in range(3)] == [0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_segments": 0}, "max_segments=0"),
        ({"max_segments": 2, "min_segments": 3}, "min_segments=3"),
        ({"max_segments": 1, "steps": 0}, "steps=0"),
        ({"max_segments": 1, "advance_at": 95}, "advance_at=95"),
        ({"max_segments": 1, "final_learning_rate": 0.1}, "give steps"),
    ],
)
def test_stages_that_cannot_be_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Stage(**values)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="auxiliary_weight=-1"):
        Stage(max_segments=1, auxiliary_weight=-1)


def test_options_of_memories_stay_until_a_stage_sets_others() -> None:
    stages = [
        Stage(max_segments=1, steps=2),
        Stage(max_segments=1, steps=2, memory={"write_cost": 0.3, "train_threshold": 0.1}),
        Stage(max_segments=1, steps=2),
        Stage(max_segments=1, memory={"write_cost": 0.5}),
    ]
    curriculum = Curriculum(stages)
    first = {"write_cost": 0.3, "train_threshold": 0.1}
    assert [curriculum.memory_options_at(step) for step in (1, 2, 5, 6)] == [
        {}, first, first, {"write_cost": 0.5, "train_threshold": 0.1}
    ]  # fmt: skip

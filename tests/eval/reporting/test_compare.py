"""Runs compared by pairs: the statistics against enumeration, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from memlm.eval import evaluate
from memlm.eval.metrics import holm, mcnemar, paired_interval, sign_flips
from memlm.eval.reporting.compare import Comparison, compare
from memlm.eval.reporting.page import write_report
from memlm.tasks.haystack import Haystack
from tests.eval.fake import SolvingModel


def run(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(
    right: Sequence[bool], task: str = "qa1", length: str = "4k", **more: Any
) -> list[dict[str, Any]]:
    sample = {"seed": 0, "question": "Where?", "target": "park", "tokens": 4096}
    return [
        {"task": task, "length": length, "index": i, "correct": bool(ok)} | sample | more
        for i, ok in enumerate(right)
    ]


def pair(
    tmp_path: Path, first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]
) -> Comparison:
    return compare(run(tmp_path / "a", first), run(tmp_path / "b", second))


def test_mcnemar_is_the_sum_of_all_splits_as_uneven() -> None:
    for n in range(0, 11):
        for gained in range(n + 1):
            splits = itertools.product((0, 1), repeat=n)
            uneven = sum(abs(2 * sum(s) - n) >= abs(2 * gained - n) for s in splits)
            assert mcnemar(gained, n - gained) == pytest.approx(uneven / 2**n, rel=1e-12)


def test_mcnemar_gives_known_values_and_stands_thousands() -> None:
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == 0.0625  # Five wins in five: twice one in 32.
    assert mcnemar(9, 1) == pytest.approx(22 / 1024)
    # Agresti's approval of a prime minister, 150 and 86 of 1,600: z squared 17.36.
    assert mcnemar(86, 150) == pytest.approx(math.erfc(math.sqrt(17.36 / 2)), rel=0.25)
    assert mcnemar(150, 86) == mcnemar(86, 150)
    assert mcnemar(5000, 5200) == pytest.approx(math.erfc(199 / math.sqrt(2 * 10200)), rel=0.01)
    assert mcnemar(0, 5000) == 0.0
    with pytest.raises(ValueError, match="gained=-1"):
        mcnemar(-1, 0)


def test_sign_flips_are_mcnemar_for_single_pairs_and_enumeration_for_groups() -> None:
    assert sign_flips([1] * 8 + [-1] * 3 + [0] * 9) == pytest.approx(mcnemar(8, 3))
    assert sign_flips([]) == sign_flips([0]) == sign_flips([2, -2]) == 1.0
    dice = random.Random(1)
    for _ in range(20):
        sums = [dice.randint(-4, 4) for _ in range(dice.randint(1, 9))]
        flips = itertools.product((1, -1), repeat=len(sums))
        far = [
            abs(sum(s * x for s, x in zip(f, sums, strict=True))) >= abs(sum(sums)) for f in flips
        ]
        assert sign_flips(sums) == pytest.approx(sum(far) / len(far))


def test_holm_gives_the_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_the_paired_interval_matches_agresti_s_example_and_its_mirror() -> None:
    # Categorical Data Analysis: a difference of -0.04 with a Wald interval of -0.059 to -0.021.
    assert paired_interval(86, 150, 1600) == pytest.approx((-0.059, -0.021), abs=5e-4)
    low, high = paired_interval(3, 9, 40)
    assert paired_interval(9, 3, 40) == pytest.approx((-high, -low))
    # Nothing differs: z squared over n plus z squared.
    assert paired_interval(0, 0, 100) == pytest.approx((-0.036995, 0.036995), abs=1e-5)
    assert paired_interval(0, 0, 1) == pytest.approx((-0.7935, 0.7935), abs=1e-4)
    assert paired_interval(7, 0, 7)[1] == 1.0
    for bad in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="must not be negative"):
            paired_interval(*bad)


def test_the_limits_solve_the_score_equation() -> None:
    """Against the likelihood itself, maximised by a search over the share of lost pairs."""

    def z(gained: int, lost: int, n: int, delta: float) -> float:
        def likelihood(q: float) -> float:
            cells = ((gained, q + delta), (lost, q), (n - gained - lost, 1 - 2 * q - delta))
            if any(share < 0 or (count and share == 0) for count, share in cells):
                return -math.inf
            return sum(count * math.log(share) for count, share in cells if count)

        low, high = max(0.0, -delta), (1 - delta) / 2
        for _ in range(200):
            one, two = low + (high - low) / 3, high - (high - low) / 3
            low, high = (one, high) if likelihood(one) < likelihood(two) else (low, two)
        spread = (2 * low + delta - delta * delta) / n
        return ((gained - lost) / n - delta) / math.sqrt(spread)

    for gained, lost, n in ((5, 2, 30), (1, 1, 12), (12, 3, 20), (1, 8, 100)):
        below, above = paired_interval(gained, lost, n)
        assert z(gained, lost, n, below) == pytest.approx(1.96, abs=1e-3)
        assert z(gained, lost, n, above) == pytest.approx(-1.96, abs=1e-3)


@pytest.mark.parametrize("n", [10, 30])
def test_the_paired_interval_covers_the_truth(n: int) -> None:
    """By enumeration of every outcome, not by chance."""
    limits = {(g, x): paired_interval(g, x, n) for g in range(n + 1) for x in range(n + 1 - g)}
    covered = []
    for gain, loss in itertools.product((0.01, 0.05, 0.15, 0.3, 0.45), repeat=2):
        covered.append(
            sum(
                math.comb(n, g) * math.comb(n - g, x)
                * gain**g * loss**x * (1 - gain - loss) ** (n - g - x)
                for (g, x), (low, high) in limits.items()
                if low <= gain - loss <= high
            )
        )  # fmt: skip
    assert 0.94 < sum(covered) / len(covered) < 0.98
    assert min(covered) > 0.92


def test_pairs_are_counted_by_cell_and_over_all(tmp_path: Path) -> None:
    first = rows([1, 1, 1, 0, 0, 1], length="64k") + rows([1, 0, 1]) + rows([1], "passkey")
    second = rows([1, 0, 1, 1, 0, 1, 1], length="64k") + rows([1, 1, 1], length="4096")
    found = pair(tmp_path, first, second)
    assert [(c.task, c.length, c.n, c.both, c.gained, c.lost) for c in found.cells] == [
        ("qa1", "4k", 3, 2, 1, 0), ("qa1", "64k", 6, 3, 1, 1),
    ]  # fmt: skip
    assert (found.only_in_a, found.only_in_b) == (1, 1)
    assert (found.overall.n, found.overall.difference) == (9, pytest.approx(1 / 9))
    assert found.cells[0].accuracy_a == pytest.approx(2 / 3) and found.cells[0].accuracy_b == 1.0
    text = found.to_markdown()
    assert "Left out: 1 sample only in A, 1 sample only in B." in text
    assert text.count("\n| ") == 4 and "nan" not in text.lower()
    assert json.loads(json.dumps(found.to_dict()))["overall"]["only_b"] == 2
    assert (found.a, found.b) == ("a", "b")
    assert compare(tmp_path / "a", tmp_path / "b", names=("x", "y")).a == "x"


@pytest.mark.parametrize("right", [[1], [0], [1, 1, 1, 0]])
def test_runs_that_agree_differ_by_nothing_and_say_how_sure(
    right: list[bool], tmp_path: Path
) -> None:
    found = pair(tmp_path, rows(right), rows(right))
    (cell,) = found.cells
    assert cell.difference == 0.0 and cell.p == cell.p_holm == found.overall.p == 1.0
    reach = 3.8415 / (len(right) + 3.8415)
    assert (cell.low, cell.high) == pytest.approx((-reach, reach), abs=1e-4)
    assert found.verdict.startswith("no significant difference: a difference of up to ")
    assert "0.0 points" in found.verdict and "in 1 cell" in found.verdict
    same = compare(tmp_path / "a", tmp_path / "a")
    assert (same.a, same.b) == ("A", "B")


def test_the_verdict_names_the_better_run(tmp_path: Path) -> None:
    good = rows([True] * 50) + rows([True] * 50, "qa2")
    bad = rows([False] * 50) + rows([True] * 50, "qa2")
    found = pair(tmp_path, bad, good)
    assert found.verdict.startswith('"b" is better (over 100 pairs in 2 cells: +50.0 points')
    assert found.verdict.endswith('; "b" is better in qa1 4k.')
    assert compare(tmp_path / "b", tmp_path / "a").verdict.startswith('"b" is better')
    assert "| B is better |" in found.to_markdown()


def test_holm_is_over_the_cells_shown(tmp_path: Path) -> None:
    # Six wins in six: p is 1/32, which one cell in two would not survive.
    wins, ties = [False] * 6, [True] * 6
    alone = pair(tmp_path / "1", rows(wins), rows(ties))
    two = pair(tmp_path / "2", rows(wins) + rows(ties, "qa2"), rows(ties) + rows(ties, "qa2"))
    assert alone.cells[0].p == two.cells[0].p == pytest.approx(1 / 32)
    assert alone.cells[0].significant and not two.cells[0].significant
    assert two.cells[0].p_holm == pytest.approx(1 / 16)


def test_the_same_questions_at_many_lengths_are_not_as_many_proofs(tmp_path: Path) -> None:
    lengths = ("4k", "8k", "16k", "32k")
    first = [r for x in lengths for r in rows([0] * 4 + [1] * 16, length=x)]
    second = [r for x in lengths for r in rows([1] * 20, length=x)]
    found = pair(tmp_path, first, second)
    one = found.cells[0]
    assert mcnemar(16, 0) < 0.0001
    assert found.overall.p == pytest.approx(one.p) == 0.125
    assert (found.overall.low, found.overall.high) == pytest.approx((one.low, one.high), abs=0.01)
    # Independent outcomes at each length keep the width of single pairs.
    dice = random.Random(0)
    first = [r for x in lengths for r in rows([dice.random() < 0.5 for _ in range(200)], length=x)]
    second = [r for x in lengths for r in rows([dice.random() < 0.5 for _ in range(200)], length=x)]
    found = pair(tmp_path, first, second)
    single = paired_interval(found.overall.gained, found.overall.lost, found.overall.n)
    width = found.overall.high - found.overall.low
    assert 1.0 <= width / (single[1] - single[0]) < 1.15


def test_pairs_that_are_not_the_same_sample_are_refused(tmp_path: Path) -> None:
    other: tuple[tuple[str, Any], ...] = (
        ("seed", 1), ("question", "Who?"), ("target", "zoo"), ("tokens", 9), ("fact_offsets", [2]),
    )  # fmt: skip
    for key, value in other:
        with pytest.raises(ValueError, match=f"2 of 3 pairs .* qa1 4k index 0: {key} is "):
            pair(
                tmp_path,
                rows([1, 1], fact_offsets=[1]) + rows([1], "qa2"),
                rows([1, 1], **{"fact_offsets": [1], key: value}) + rows([1], "qa2"),
            )


def test_keys_that_old_runs_lack_are_not_compared(tmp_path: Path) -> None:
    old = [{k: r[k] for k in ("task", "length", "index", "correct")} for r in rows([1, 0])]
    assert pair(tmp_path, old, rows([1, 1])).cells[0].gained == 1


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    made = {"seed": 0, "baseline": "full", "window": 9}, {"seed": 0, "baseline": "memory"}
    for name, settings in zip("ab", made, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    found = pair(tmp_path, rows([1]), rows([1]))
    assert found.settings == {"baseline": ("full", "memory"), "window": (9, None)}
    assert "Settings that differ (A, B): baseline ('full', 'memory'), wi" in found.to_markdown()
    assert found.to_dict()["settings"]["window"] == [9, None]
    (tmp_path / "a" / "run.json").write_text("{")
    assert pair(tmp_path, rows([1]), rows([1])).settings == {}


def test_runs_without_a_pair_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share no sample"):
        pair(tmp_path, rows([1]), rows([1], "qa2"))
    with pytest.raises(ValueError, match=r"samples\.jsonl' does not exist"):
        compare(tmp_path / "a", tmp_path / "none")
    (tmp_path / "b" / "samples.jsonl").write_text("{}\n" + json.dumps(rows([1])[0]) + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_exact_p_is_exact_where_floats_would_not_be() -> None:
    whole = 2 * sum(math.comb(2000, k) for k in range(951))
    assert mcnemar(950, 1050) == float(Fraction(whole, 2**2000))


def test_what_the_runner_leaves_can_be_compared_and_reported(
    tokenizer: PreTrainedTokenizerFast, prose: Haystack, tmp_path: Path
) -> None:
    folders = {}
    for name, span in (("all", None), ("short", 300)):
        model = SolvingModel(tokenizer, span=span)
        folders[name] = tmp_path / name
        evaluate(
            model, tokenizer, ["qa1", "qa2"], ["0k", "1k"], 12,
            haystack=prose, out=folders[name], progress=False,
        )  # fmt: skip
    found = compare(folders["all"], folders["short"])
    assert [(c.task, c.length, c.n, c.gained) for c in found.cells] == [
        ("qa1", "0k", 12, 0), ("qa1", "1k", 12, 0), ("qa2", "0k", 12, 0), ("qa2", "1k", 12, 0),
    ]  # fmt: skip
    assert found.overall.lost > 6 and found.verdict.startswith('"all" is better')
    written = write_report(folders, tmp_path / "out")
    assert "depth.png" in [path.name for path in written]
    page = (tmp_path / "out/report.html").read_text()
    assert "nowhere" in page and str(tmp_path) not in page

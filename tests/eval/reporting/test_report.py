"""Tables, pictures and the page of results."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memlm.eval.metrics import mean_interval, wilson
from memlm.eval.reporting.page import write_report
from memlm.eval.reporting.plots import (
    depths,
    distances,
    plot_cost,
    plot_depth,
    plot_heat_map,
    plot_lines,
    save_with_picture,
)
from memlm.eval.reporting.report import Cell, Report, load_rows, name_runs

PNG = b"\x89PNG"
PICTURES = ["accuracy.png", "lengths.png", "depth.png", "cost.png"]


def cell(task: str, length: str, correct: int, samples: int = 10) -> Cell:
    return Cell(task, length, samples, correct, correct, correct, 1000, 2.0, 0.1, 2**20)


REPORT = Report(
    [cell("qa1", "1M", 5), cell("qa1", "4k", 10), cell("qa2", "4k", 7)], {"seed": 0}, {}, {}
)
WHY = "full attention reads 65,536 tokens at most"
SKIPPING = Report(
    [cell("qa1", "4k", 9), cell("passkey", "4k", 3)],
    skipped={"qa1": {"1M": WHY}, "passkey": {"1M": WHY}},
)


def row(task: str, length: str, index: int, correct: bool = True, **more: Any) -> dict[str, Any]:
    return {"task": task, "length": length, "index": index, "correct": correct, **more}


def placed(at: int, tokens: int, correct: bool, *others: int) -> dict[str, Any]:
    offsets = [at, *others]
    return row(
        "qa1", str(tokens), 0, correct,
        fact_offsets=offsets, supporting=list(range(len(offsets))), tokens=tokens,
    )  # fmt: skip


def save(folder: Path, report: Report, rows: Sequence[dict[str, Any]] = ()) -> Path:
    report.save(folder)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    return folder


def of_rows(rows: Sequence[dict[str, Any]]) -> Report:
    """The report of samples, as the runner makes it."""
    cells = [
        Cell(task, length, len(some := list(group)), *[sum(r["correct"] for r in some)] * 3,
             sum(r.get("tokens", 0) for r in some), 1.0, 0.5, 2**30)
        for (task, length), group in itertools.groupby(rows, lambda r: (r["task"], r["length"]))
    ]  # fmt: skip
    return Report(cells, {"seed": 0, "haystack": "builtin"}, {"memlm": "0"})


class Text(html.parser.HTMLParser):
    """What a browser would show, and which tags it would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_table_orders_lengths_and_leaves_gaps() -> None:
    assert REPORT.to_markdown().splitlines() == [
        "| task | 4k | 1M |",
        "|---|---|---|",
        "| qa1 | 100 | 50 |",
        "| qa2 | 70 |  |",
        "| mean | 85 | 50* |",
        "",
        "\\* mean over the tasks that have a figure at this length",
    ]
    assert "| qa1 | 100 (72.2-100) | 50 (23.7-76.3) |" in REPORT.to_markdown(intervals=True)


def test_the_table_says_what_could_not_be_run_and_why() -> None:
    assert SKIPPING.to_markdown().splitlines()[2:] == [
        "| qa1 | 90 | - |",
        "| passkey | 30 | - |",
        "| mean | 60 | - |",
        "",
        f"\\- not run at 1M: {WHY}",
    ]
    some = Report(SKIPPING.cells, skipped={"qa1": {"1M": WHY}})
    assert f"\\- not run at 1M (qa1): {WHY}" in some.to_markdown()
    with pytest.raises(ValueError, match=r"'1M' was not evaluated; lengths are \['4k'\]"):
        SKIPPING.mean("1M")


def test_cells_know_their_rates() -> None:
    first = REPORT.cells[0]
    assert (first.accuracy, first.tokens_per_second, first.data_wait_share) == (0.5, 500.0, 0.05)
    assert first.interval == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert REPORT.mean(4096) == pytest.approx(0.85)
    with pytest.raises(ValueError, match="'8k' was not evaluated"):
        REPORT.mean("8k")


def test_the_interval_of_a_mean_is_wilson_s_for_one_task_and_narrower_for_more() -> None:
    assert mean_interval([(8, 10)]) == pytest.approx(wilson(8, 10))
    low, high = mean_interval([(10, 10)] * 4)
    assert (low, high) == (pytest.approx(1 - (1 - wilson(10, 10)[0]) / 2), 1.0)
    with pytest.raises(ValueError, match="counts is empty"):
        mean_interval([])
    with pytest.raises(ValueError, match="samples=0"):
        mean_interval([(0, 0)])


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    """By enumeration: tasks of 12 and 30 samples, of which a pooled count would favour the second."""
    sizes = (12, 30)
    limits = {
        counts: mean_interval(list(zip(counts, sizes, strict=True)))
        for counts in itertools.product(range(13), range(31))
    }
    chances = {
        (n, p): [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        for n, p in itertools.product(sizes, (0.03, 0.1, 0.25, 0.5, 0.7, 0.85, 0.95, 0.99))
    }
    covered = []
    for (n, p), (m, q) in itertools.product(chances, chances):
        if (n, m) == sizes:
            covered.append(
                sum(
                    chances[n, p][k] * chances[m, q][j]
                    for (k, j), (low, high) in limits.items()
                    if low <= (p + q) / 2 <= high
                )
            )
    # Like Wilson's own, it is right on average and dips a little between one count and the next.
    assert 0.94 < sum(covered) / len(covered) < 0.98
    assert min(covered) > 0.9


def test_a_report_survives_saving(tmp_path: Path) -> None:
    report = Report(REPORT.cells, {"seed": 0}, skipped={"qa2": {"1M": WHY}})
    written = save_with_picture(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(PNG)
    loaded = Report.load(tmp_path)
    assert loaded == report
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == report.skipped


def test_a_summary_of_another_version_is_read(tmp_path: Path) -> None:
    saved = REPORT.to_dict()
    del saved["skipped"], saved["stories"]
    for some in saved["cells"]:
        some["of_a_later_version"] = 1
    (tmp_path / "summary.json").write_text(json.dumps(saved))
    assert Report.load(tmp_path) == REPORT


def test_a_folder_without_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Report.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="does not exist"):
        Report.load(tmp_path / "file")
    damaged = REPORT.to_dict() | {"cells": [REPORT.to_dict()["cells"][0] | {"correct": 11}]}
    for text in ('{"cells": [1]}', "[]", "{", '{"cells": []}'[:-1], json.dumps(damaged)):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json' is not a summary"):
            Report.load(tmp_path)


def test_rows_are_read_and_a_torn_last_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    first, second = row("qa1", "4096", 0), row("qa1", "4k", 1, False)
    path.write_text("\n".join(map(json.dumps, [first, second, second])) + '\n{"task": "qa')
    rows = load_rows(tmp_path)
    assert rows == [first | {"length": "4k"}, second]
    assert path.read_text().endswith('{"task": "qa')  # Reading changes nothing.
    path.write_text(json.dumps(first) + '\n{"task": 1}\n' + json.dumps(second))
    with pytest.raises(ValueError, match=r"samples\.jsonl' line 2 is damaged"):
        load_rows(tmp_path)
    path.write_text(json.dumps(first | {"length": "long"}) + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl' is damaged .*'long'"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(tmp_path / "none")


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert list(name_runs([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]
    assert list(name_runs(["x/eval", "y/eval", "z"])) == ["x/eval", "y/eval", "z"]
    assert name_runs(["mine=x/eval"]) == {"mine": Path("x/eval")}
    (tmp_path / "a=b").mkdir()
    assert list(name_runs([tmp_path / "a=b"])) == ["a=b"]
    with pytest.raises(ValueError, match="given twice"):
        name_runs(["x", "y/../x"])
    with pytest.raises(ValueError, match="name of its own"):
        name_runs(["a=x", "a=y"])


def test_lines_of_several_runs_are_drawn(tmp_path: Path) -> None:
    plot_lines({"armt": REPORT, "none": Report([cell("qa1", "4k", 1)])}, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(PNG)
    plot_lines({"armt": REPORT, "full": SKIPPING}, tmp_path / "qa2.png", 0.1, task="qa2")
    assert (tmp_path / "qa2.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="at least one"):
        plot_lines({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="'qa3' is in none"):
        plot_lines({"armt": REPORT}, tmp_path / "none.png", task="qa3")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    "report",
    [
        Report([cell("passkey", "0k", 0, 1)]),
        # With more tasks than there is room for notes on.
        Report(
            [cell(f"qa{t}", "1k", t, 70) for t in range(61)]
            + [cell("qa1", f"{2**x}k", x, 20) for x in range(1, 10, 3)]
        ),
        SKIPPING,
        Report([], skipped={"qa1": {"4k": WHY}}),
        Report([]),
        Report([Cell("old", "4k", 1, 1, 1, 1, 0, 0.0, 0.0, 0)]),
    ],
    ids=["one", "many", "skipping", "all skipped", "empty", "nothing measured"],
)
def test_pictures_of_any_size_are_drawn(report: Report, tmp_path: Path) -> None:
    draw: list[Callable[..., None]] = [plot_heat_map, plot_lines, plot_cost]
    for plot in draw:
        plot({"$a_b$ _x": report, "模型": REPORT}, tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_depths_count_by_the_earliest_supporting_fact() -> None:
    rows = [
        placed(0, 1000, True),
        placed(99, 1000, False),
        placed(950, 1000, True, 500),  # The later fact does not count.
        placed(999, 1000, True),
        row("qa1", "1000", 1),
        placed(5, 0, True) | {"length": "0k"},
        placed(1000, 1000, True),
        placed(3, 1000, True) | {"supporting": [7]},
        placed(3, 1000, True) | {"supporting": None},
    ]
    assert [(b.low, b.correct, b.samples) for b in depths(rows)] == [
        (0.0, 1, 2), (0.5, 1, 1), (0.9, 1, 1),
    ]  # fmt: skip


def test_distances_count_by_what_lies_between_fact_and_end() -> None:
    rows = [placed(1000 - d, 1000, True) for d in (1, 63, 64, 127, 128, 1000)]
    assert [(b.low, b.high, b.samples) for b in distances(rows)] == [
        (0, 64, 2), (64, 128, 2), (128, 256, 1), (512, 1024, 1),
    ]  # fmt: skip
    wide = [placed(0, 2**24, True), placed(99, 100, True), placed(2**24 - 255, 2**24, False)]
    assert [(b.low, b.samples) for b in distances(wide)] == [(0, 1), (64, 1), (2**24, 1)]
    assert distances([]) == []


def test_every_distance_falls_into_one_bin_that_holds_it() -> None:
    dice = random.Random(0)
    for factor in (2, 4):
        for _ in range(200):
            distance = int(2 ** dice.uniform(0, 24))
            (only,) = distances([placed(2**24 - distance, 2**24, True)], factor)
            assert only.low <= distance < only.high and only.samples == 1


def test_no_depth_picture_without_such_rows(tmp_path: Path) -> None:
    assert not plot_depth({"old": [row("qa1", "4k", 0)], "older": []}, tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()
    assert plot_depth({"new": [placed(9, 4096, True)], "old": []}, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(PNG)


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    rows = [
        placed(17 * i, 4096, i % 3 > 0)
        | {"index": i, "length": "4k", "question": "Where?", "target": "park", "output": "zoo"}
        for i in range(40)
    ]
    run = save(tmp_path / "armt", of_rows(rows), rows)
    full = save(tmp_path / "full", SKIPPING.only(["qa1"]))
    out = tmp_path / "out"
    written = write_report({"armt": run, "full": full, "given": REPORT}, out)
    assert [path.name for path in written] == [*PICTURES, "report.md", "report.html"]
    assert {path.name for path in out.iterdir()} == {path.name for path in written}
    text = (out / "report.md").read_text()
    assert "| qa1 | 65 (49.5-77.9) |" in text and "| qa1 | 90 (59.6-98.2) | - |" in text
    assert f"\\- not run at 1M: {WHY}" in text and "NaN" not in text and "nan" not in text
    assert "memlm eval MODEL --tasks qa1 --lengths 4k --samples 40 --haystack builtin" in text
    page = (out / "report.html").read_text()
    seen = Text(page)
    images = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(images) == 4
    assert all(i["alt"] and (i["src"] or "").startswith("data:image/png;base64,") for i in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in seen.tags}
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert 'title="26 of 40 right, 95% interval 49.5&ndash;77.9"' in page
    assert f'title="{WHY}">-' in page
    assert "zoo" in seen.text and str(tmp_path) not in page + text
    # Written again, it is the same: nothing depends on the clock.
    before = page
    write_report({"armt": run, "full": full, "given": REPORT}, out)
    assert (out / "report.html").read_text() == before


@pytest.mark.usefixtures("unpainted")
def test_commands_repeat_a_run_by_its_settings(tmp_path: Path) -> None:
    cells = [cell("qa1", "0k", 1, 50), cell("qa1", "1M", 1, 5), cell("passkey", "0k", 1, 50)]
    settings = {
        "seed": 3, "haystack": "my books", "baseline": "memory", "position": [0.0, 0.5],
        "haystack_digest": "x", "window": None,
    }  # fmt: skip
    write_report({"a": Report(cells, settings), "b": Report(cells, {"command": "do"})}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    tail = "--haystack 'my books' --position 0.0 0.5 --seed 3 --out a\n"
    assert "    memlm eval MODEL --tasks qa1 passkey --lengths 0k --samples 50 " + tail in text
    assert "    memlm eval MODEL --tasks qa1 --lengths 1M --samples 5 " + tail in text
    assert "    do\n" in text
    write_report({"c": Report(cells)}, tmp_path)
    assert "memlm eval" not in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("unpainted")
def test_commands_say_what_only_python_can_be_told(tmp_path: Path) -> None:
    recall = {"k": 3, "size": 24, "overlap": 6, "by": "sentences", "hops": 2, "where": None}
    settings = {
        "composition": {"reserve": 9, "share": 1.0}, "split": "train", "retrieval": recall,
        "embedder": "mine", "recall_template": " {text}", "prompt": "chat", "of_tomorrow": 5,
        "prompt_file": "words.yaml",
    }  # fmt: skip
    write_report({"a": Report([cell("qa1", "0k", 1, 50)], settings)}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "--of-tomorrow 5 --prompt words.yaml --hops 2 --retrieval 3 --chunk-size 24" in text
    assert (
        "--out a  # and from Python, as the command cannot say it: composition.reserve=9, "
        "composition.share=1.0, embedder='mine', retrieval.overlap=6, split='train'\n"
    ) in text


def test_the_first_sentence_names_the_best_run_and_where() -> None:
    from memlm.eval.reporting.findings import Findings
    from memlm.eval.reporting.runs import Run

    def answer(**runs: Report) -> str:
        return Findings("", [Run(name, run, []) for name, run in runs.items()], None).answer()

    a = Report(
        [cell("qa1", "4k", 90, 100), cell("qa1", "64k", 90, 100), cell("qa1", "1M", 80, 100)]
    )
    b = Report([cell("qa1", "4k", 91, 100), cell("qa1", "64k", 20, 100)])
    assert answer(a=a, b=b) == (
        'By accuracy on qa1, "b" leads at 4k (91%), "a" leads at 64k (90%), "a" is alone at 1M '
        "(80%); "
        "the lead exceeds the 95% intervals at 64k."
    )
    assert answer(a=a, b=a) == (
        'By accuracy on qa1, "a" and "b" tie at 4k to 1M (90% to 80%); no lead exceeds the 95% '
        "intervals."
    )
    assert answer(a=a) == ('"a" answers 90% right at 4k and 80% at 1M (accuracy on qa1).')
    partial = Report([cell("qa1", "4k", 1), cell("qa2", "4k", 1), cell("qa1", "1M", 10)])
    both = Report([cell(task, x, 9) for task in ("qa1", "qa2") for x in ("4k", "1M")])
    assert '"both" leads at 4k (90%), "both" is alone at 1M (90%)' in answer(
        both=both, partial=partial
    )
    assert answer(a=a, b=Report([cell("qa2", "4k", 1)])) == (
        "The runs share no task, so their means cannot be compared."
    )
    assert (
        answer(a=Report([], skipped={"qa1": {"4k": WHY}})) == "No run has every task at any length."
    )


@pytest.mark.usefixtures("unpainted")
def test_means_are_over_the_tasks_all_runs_share(tmp_path: Path) -> None:
    write_report({"a": REPORT, "b": Report([cell("qa1", "4k", 1), cell("qa9", "8k", 2)])}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| a | 100 (72.2-100) | 50 (23.7-76.3) |" in text
    assert "Tasks that not every run has are left out: qa2, qa9." in text


def test_text_of_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> | \"q\" 'a' & \u202e\u043e\u043b \ud800"
    rows = [
        row(evil, "4k", i, False, question=evil, target=evil, output=evil, tokens=9)
        for i in range(2)
    ]
    report = Report(of_rows(rows).cells, {evil: evil}, {"v": evil}, skipped={evil: {"8k": evil}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text(json.dumps(report.to_dict()))
    (tmp_path / "run/samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_report({evil: tmp_path / "run"}, tmp_path, title=evil)
    seen = Text((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script"} & {tag for tag, _ in seen.tags}
    assert seen.text.count("<script>alert(1)</script>") >= 6
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3, 4}


def test_rows_of_old_runs_and_of_cells_not_in_the_summary(tmp_path: Path) -> None:
    rows = [row("qa1", "4k", i, False) for i in range(3)]
    others = [row("qa1", "4k", 3), row("qa7", "4k", 0, False, output="stray")]
    run = save(tmp_path / "run", of_rows(rows), [*rows, *others])
    out = tmp_path / "out"
    out.mkdir()
    (out / "depth.png").write_bytes(b"of an earlier report")
    names = [path.name for path in write_report({"run": run}, out)]
    assert "depth.png" not in names and not (out / "depth.png").exists()
    page = (out / "report.html").read_text()
    assert "Not drawn: no sample says" in page and "stray" not in page


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        write_report({}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        write_report({"a": REPORT}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"summary\.json' does not exist"):
        write_report({"a": tmp_path / "none"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = save(tmp_path / "run", REPORT)
    (run / "samples.jsonl").write_text("damaged\n" + json.dumps(row("qa1", "4k", 0)) + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        write_report({"a": run}, tmp_path / "out")

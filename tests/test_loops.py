"""One loop over segments: `scan` and `schedule` have it, and who reads a document goes through them."""

import ast
from pathlib import Path

import memlm

# Rooms that carry a state from call to call in a loop of their own today; none may be added.
ALLOWED = ("eval/harness", "eval/losses/", "eval/running/readers", "train/trainer")
ABOVE = ("scan.py", "schedule/")


def _carries_a_state(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    through_model = name == "read" and "model" in ast.unparse(call.func)
    given = {keyword.arg for keyword in call.keywords}
    return "memory_state" in given or name == "run_segment" or through_model


def _loops(source: str) -> list[int]:
    """The lines of loops that call a model with what it remembers."""
    loops = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.For, ast.While))]
    return [
        loop.lineno
        for loop in loops
        if any(isinstance(n, ast.Call) and _carries_a_state(n) for n in ast.walk(loop))
    ]


def test_only_scan_and_schedule_loop_over_segments() -> None:
    root = Path(memlm.__file__).parent
    found = {
        str(path.relative_to(root)): lines
        for path in root.rglob("*.py")
        if (lines := _loops(path.read_text(encoding="utf-8")))
    }
    odd = {name: lines for name, lines in found.items() if not name.startswith(ALLOWED + ABOVE)}
    assert not odd, f"loops over segments; use memlm.windows, model.read or memlm.scan: {odd}"


def test_a_loop_over_segments_is_seen() -> None:
    loop = "for segment in segments:\n    {}\n"
    assert _loops(loop.format("state = model(segment.ids, memory_state=state).memory_state"))
    assert _loops(loop.format("state = self.model.read([segment], state)"))
    assert not _loops(loop.format("loss = loss + segment.labels.sum()"))

"""One loop over segments: `scan` and `schedule` have it, and who reads a document goes through them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memlm

# Where a state is carried through a loop: the loop over segments itself, what a mechanism does with the
# tokens of one segment, and the trainer, which asks questions between the segments of a window of `scan`.
ALLOWED = ("scan.py", "schedule/sequential.py", "memory/parts/", "train/trainer/window.py")

Assigned = tuple[set[str], ast.expr]


def _assigned(nodes: list[ast.AST]) -> Iterator[Assigned]:
    """What each assignment binds, and to what value."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            found = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) and node.value:
            found = [node.target]
        else:
            continue
        flat = [x for t in found for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
        yield {ast.unparse(one) for one in flat}, node.value


def _states_given(call: ast.Call) -> set[str]:
    """The names that a call is handed as a state: by keyword, to `read`, or by what they are called."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    values = [*call.args, *given.values()]
    names = {ast.unparse(v) for v in values if isinstance(v, (ast.Name, ast.Attribute))}
    reads = getattr(call.func, "attr", "") in ("read", "run_segment")
    return {
        name
        for name in names
        if "state" in name.rpartition(".")[2]
        or reads
        or ("memory_state" in given and name == ast.unparse(given["memory_state"]))
    }


def _root(value: ast.expr) -> str:
    while isinstance(value, (ast.Attribute, ast.Subscript)):
        value = value.value
    return ast.unparse(value)


def _loops(source: str) -> list[int]:
    """The lines of loops in which what a call is handed as a state is bound anew from its result."""
    lines = []
    for loop in ast.walk(ast.parse(source)):
        if not isinstance(loop, (ast.For, ast.While)):
            continue
        nodes = [node for statement in loop.body for node in ast.walk(statement)]
        assigned = list(_assigned(nodes))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            results = {
                name
                for names, value in assigned
                if any(node is call for node in ast.walk(value))
                for name in names
            }
            # `state = out.memory_state` goes by way of another name.
            results |= {n for names, value in assigned if _root(value) in results for n in names}
            if results & _states_given(call):
                lines.append(loop.lineno)
                break
    return lines


def _found() -> dict[str, list[int]]:
    root = Path(memlm.__file__).parent
    return {
        path.relative_to(root).as_posix(): lines
        for path in sorted(root.rglob("*.py"))
        if (lines := _loops(path.read_text(encoding="utf-8")))
    }


def test_only_scan_and_schedule_loop_over_segments() -> None:
    found = _found()
    odd = {name: lines for name, lines in found.items() if not name.startswith(ALLOWED)}
    assert not odd, f"loops over segments; use memlm.windows, model.read or memlm.scan: {odd}"
    # What is allowed and not there any more would let the next one in unseen.
    unused = [room for room in ALLOWED if not any(name.startswith(room) for name in found)]
    assert not unused


@pytest.mark.parametrize(
    "body",
    [
        "state = model(segment.ids, memory_state=state).memory_state",
        "out = model(segment.ids, memory_state=state)\n    state = out.memory_state",
        "out = model(x, memory_state=held)\n    logits, held = out.logits, 1\n    held = out[2]",
        "state = self.model.read([segment], state)",
        "behind = model.read([segment], behind)",
        "self.state = self.step(segment, self.state)",
        "hidden, state = step(segment, state)",
        "with torch.no_grad():\n        x, after = run(segment, state), 1\n        state = x[1]",
    ],
)
def test_a_loop_over_segments_is_seen(body: str) -> None:
    assert _loops(f"for segment in segments:\n    {body}\n")
    assert _loops(f"while segments:\n    {body}\n")


@pytest.mark.parametrize(
    "loop",
    [
        "for segment in segments:\n    loss = loss + segment.labels.sum()",
        # Each batch with a state of its own.
        "for rows, state in groups:\n    said = model.generate(rows, memory_state=state)",
        # The loop is scan's.
        "for _, state in scan(run, segments, state, 1):\n    state.save(path)",
        "for out in model.windows(ids, memory_state=state):\n    total += out.loss",
    ],
)
def test_what_is_no_loop_over_segments_is_let_be(loop: str) -> None:
    assert not _loops(loop)

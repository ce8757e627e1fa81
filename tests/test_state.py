"""MemoryState as a value: rows, copies, files."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from memlm import MemoryState
from memlm.files import write_atomically


@pytest.fixture
def state() -> MemoryState:
    return MemoryState({"a.x": torch.randn(3, 2, 4), "a.n": torch.arange(3)}, 3, "some memories")


def test_nbytes_counts_every_tensor(state) -> None:
    assert state.nbytes == 3 * 2 * 4 * 4 + 3 * 8


def test_select_takes_rows_in_order_with_repeats_and_masks(state) -> None:
    picked = state.select([2, 0, 0])
    assert picked.batch_size == 3 and torch.equal(picked["a.n"], torch.tensor([2, 0, 0]))
    assert state.select(torch.tensor([True, False, True]))["a.n"].tolist() == [0, 2]
    assert state.select([-1])["a.n"].tolist() == [2]
    with pytest.raises(IndexError, match="3 rows"):
        state.select([3])
    with pytest.raises(ValueError, match="one bool per row"):
        state.select(torch.tensor([True]))


def test_where_mixes_rows(state) -> None:
    other = state.map(lambda t: t + 10)
    mixed = state.where(torch.tensor([True, False, True]), other)
    assert mixed["a.n"].tolist() == [0, 11, 2]


def test_fork_is_independent(state) -> None:
    fork = state.fork()
    fork["a.x"].zero_()
    assert state["a.x"].abs().sum() > 0


def test_to_changes_floating_tensors_only(state) -> None:
    moved = state.to(dtype=torch.bfloat16)
    assert moved["a.x"].dtype == torch.bfloat16 and moved["a.n"].dtype == torch.int64


def test_detach_cuts_the_graph() -> None:
    leaf = torch.ones(1, 2, requires_grad=True)
    assert not MemoryState({"a": leaf * 2}, 1).detach()["a"].requires_grad


def test_a_leaf_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has shape"):
        MemoryState({"a": torch.zeros(2, 3)}, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_save_and_load_are_exact(tmp_path, dtype) -> None:
    state = MemoryState({"a": torch.randn(2, 3).to(dtype)}, 2, "m")
    state.save(tmp_path / "deep" / "s.safetensors")
    loaded = MemoryState.load(tmp_path / "deep" / "s.safetensors")
    assert torch.equal(loaded["a"], state["a"]) and loaded["a"].dtype == dtype
    assert (loaded.batch_size, loaded.signature) == (2, "m")
    assert os.listdir(tmp_path / "deep") == ["s.safetensors"]


def test_what_was_loaded_does_not_follow_its_file(tmp_path) -> None:
    """A copy that somebody puts over the file, in place, is not read by whoever has read the file."""
    path, size = tmp_path / "s", 4096
    MemoryState({"a": torch.ones(1, size)}, 1).save(path)
    MemoryState({"a": torch.zeros(1, size)}, 1).save(tmp_path / "other")
    loaded = MemoryState.load(path)
    shutil.copyfile(tmp_path / "other", path)
    assert loaded["a"].sum() == size
    os.truncate(path, 0)
    # Of a tensor that is the file itself this would end the process.
    assert loaded["a"].sum() == size


def test_a_state_without_tensors_keeps_its_rows(tmp_path) -> None:
    MemoryState({}, 4).save(tmp_path / "s")
    assert MemoryState.load(tmp_path / "s").batch_size == 4


def test_damaged_foreign_and_newer_files_are_refused_by_name(tmp_path, state) -> None:
    path = tmp_path / "s.safetensors"
    state.save(path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a state at all, only text"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"s\.safetensors"):
            MemoryState.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no memlm-state"):
        MemoryState.load(path)
    save_file(
        {"a": torch.zeros(1)},
        path,
        metadata={"format": "memlm-state", "version": "99", "batch_size": "1"},
    )
    with pytest.raises(ValueError, match="upgrade memlm"):
        MemoryState.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MemoryState.load(tmp_path / "nowhere")


def test_a_failing_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(temporary) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_deep_copy_is_detached_and_independent() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    state = MemoryState({"a": leaf * 2}, 2, "some")
    again = copy.deepcopy({"state": state})["state"]
    assert torch.equal(again["a"], state["a"]) and not again["a"].requires_grad
    assert (again.batch_size, again.signature) == (2, "some")
    again["a"].zero_()
    assert float(state["a"].detach().sum()) == 12.0

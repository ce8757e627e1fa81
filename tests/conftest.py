"""Shared setting: one thread, no network, a seed before every test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
import transformers

# Tokenizer, haystack and shared data of tests/tasks and tests/eval.
pytest_plugins = ["tests.stories"]

torch.set_num_threads(1)
LOCAL = ("127.0.0.1", "::1", "localhost")


def _stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, as nothing else sees every socket: none may go beyond this machine."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        place = arguments[1][0]
    elif event == "socket.getaddrinfo":
        place = arguments[0]
    else:
        return
    if place is not None and (place.decode() if isinstance(place, bytes) else place) not in LOCAL:
        raise RuntimeError(f"a test asks for {place!r} ({event}); tests open no socket")


sys.addaudithook(_stay_here)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays, and no collection of garbage need walk over it.

    That is half a million objects, a quarter of a second each time, and every run of a Trainer collects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_stays() -> None:
    """So does what the files before this one have left: models that are made once, late imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_sequence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under schedule="auto" nothing is measured: it takes long, and may come out otherwise the next time.

    Law 10 ties the wavefront to the sequence. A test of what is measured asks for `measured`.
    """
    if "measured" not in request.fixturenames:
        monkeypatch.setattr("memlm.scheduling.LEAST_SEGMENTS", float("inf"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets sleeps five seconds where the reading of a parquet file ends, in case Python ends there."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


@pytest.fixture
def measured() -> None:
    """For a test of what "auto" measures and picks."""


@pytest.fixture(autouse=True)
def _float64_in_recurrences(request: pytest.FixtureRequest) -> Iterator[None]:
    """The float64 tests of a memory at a recurrence of the base's own are tests in float64."""
    # Not at the head of this file: what is imported there has to come after the environment is set.
    from tests.cases import CASES, float64_stays, needs_recurrence

    memory = getattr(getattr(request.node, "callspec", None), "params", {}).get("memory")
    # Tests of single mechanisms call a length by this name.
    named = isinstance(memory, str) and memory in CASES
    with float64_stays() if named and needs_recurrence(memory) else nullcontext():
        yield

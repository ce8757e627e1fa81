"""What is delivered: typed, and without a socket to anywhere unless somebody asks."""

from __future__ import annotations

import re
import socket
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import memlm

ROOT = Path(__file__).resolve().parent.parent


def test_no_test_reaches_beyond_this_machine() -> None:
    with pytest.raises(RuntimeError, match="tests open no socket"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(RuntimeError, match="tests open no socket"):
        socket.getaddrinfo("example.org", 80)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(memlm.__file__).parent / "py.typed").is_file()


def test_what_is_installed_is_within_the_bounds_that_are_stated() -> None:
    """So that `make test-min`, which installs the lower bounds, tests them, and no other version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, least = re.match(r"([\w.-]+)>=([\w.]+)", requirement).groups()
        numbers = [
            tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])
            for text in (version(name), least)
        ]
        assert numbers[0] >= numbers[1], requirement

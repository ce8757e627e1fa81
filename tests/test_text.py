"""Text files: pieces, and refusals by name."""

from __future__ import annotations

import pytest

import memlm.text
from memlm.text import check_text_file, read_text


def test_pieces_join_to_the_text_even_inside_a_character(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memlm.text, "PIECE", 3)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffnaïve — 日本語 text".encode())
    sizes: list[int] = []
    assert "".join(read_text(path, sizes.append)) == "naïve — 日本語 text"
    assert sum(sizes) == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\0more", "zero byte at 4"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"", "holds no text"),
        (b" \n ", "holds no text"),
        (b"cut in a char \xc3", "not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path, content, message) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        check_text_file(path)
        list(read_text(path))
    assert "odd.txt" in str(caught.value)


def test_missing_files_and_folders_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_text_file(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder"):
        check_text_file(tmp_path)

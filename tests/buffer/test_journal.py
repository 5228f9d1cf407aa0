"""The journal's file: checksums, torn and damaged lines, epochs and seals."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.journal import Journal, counted, encode, file_name, read, read_counted
from common.errors import RunStopped, UserError


def opened(folder: Path) -> Journal:
    journal = Journal(folder)
    seals = {str(epoch): size for epoch, size in journal.seals.items()}
    journal.append(({"kind": "opened", "epoch": journal.epoch, "seals": seals},))
    return journal


def said(what: str) -> tuple[dict[str, Any], ...]:
    return ({"kind": "said", "what": what},)


def words(records: list[dict[str, Any]]) -> list[str]:
    return [record["what"] for record in records if record["kind"] == "said"]


def test_a_restart_reads_what_was_appended(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.append(said("äöü \n 'quoted'"))
    first.append((*said("b"), *said("c")))
    assert words(Journal(tmp_path).history) == ["äöü \n 'quoted'", "b", "c"]


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_torn_line_is_dropped_and_all_before_it_counts(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bool
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    journal = opened(folder)
    path = folder / file_name(1)
    sizes = [path.stat().st_size]
    for word in "abc":
        journal.append(said(word))
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    length = cut % (len(whole) + 1)
    whole_lines = sum(size <= length for size in sizes)
    torn = b"\x00" * 7 if junk and length not in (0, *sizes) else b""
    path.write_bytes(whole[:length] + torn)
    history, read_bytes = read_counted(folder, before=2)
    if whole_lines == 0:
        assert history == [] and read_bytes == {1: 0}
    else:
        assert words(history) == list("abc")[: whole_lines - 1]
        assert read_bytes == {1: sizes[whole_lines - 1]}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_with_others_after_it_is_refused(tmp_path: Path, line: int) -> None:
    journal = opened(tmp_path)
    for word in "abc":
        journal.append(said(word))
    path = tmp_path / file_name(1)
    lines = path.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b"said", b"sAid").replace(b"opened", b"0pened")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"Line {line + 1} of the journal"):
        Journal(tmp_path)


def test_a_line_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / file_name(1)
    path.write_bytes(encode(0, ({"kind": "opened", "seals": {}},)) + encode(2, said("b")) + encode(3, said("c")))
    with pytest.raises(UserError, match="Line 2"):
        read(path)


def test_what_a_cut_off_buffer_appends_counts_for_nobody(tmp_path: Path) -> None:
    old = opened(tmp_path)
    old.append(said("before"))
    new = opened(tmp_path)
    old_file = tmp_path / file_name(old.epoch)
    with old_file.open("ab") as file:  # it has not noticed yet
        file.write(encode(2, said("cut off")))
    new.append(said("after"))
    for _ in range(3):
        later = opened(tmp_path)
        assert words(later.history) == ["before", "after"]
        with old_file.open("ab") as file:
            file.write(encode(3, said("and again")))


def test_a_cut_off_buffer_stops_once_it_sees_the_later_epoch(tmp_path: Path) -> None:
    old = opened(tmp_path)
    Journal(tmp_path)  # only the file is there, nothing is written yet
    size = (tmp_path / file_name(1)).stat().st_size
    with pytest.raises(RunStopped, match="Another driver has opened this run"):
        old.append(said("too late"))
    assert old.superseded() is not None
    assert (tmp_path / file_name(1)).stat().st_size == size


def test_a_start_that_died_before_its_first_record_changes_nothing(tmp_path: Path) -> None:
    opened(tmp_path).append(said("a"))
    Journal(tmp_path).close()
    (tmp_path / file_name(3)).write_bytes(b'{"n": 0, "records": [{"kind": "op')
    last = opened(tmp_path)
    assert last.epoch == 4
    assert words(last.history) == ["a"]
    assert words(opened(tmp_path).history) == ["a"]


def test_two_starts_never_share_an_epoch(tmp_path: Path) -> None:
    journals = [Journal(tmp_path) for _ in range(5)]
    assert [journal.epoch for journal in journals] == [1, 2, 3, 4, 5]


def test_a_sealed_journal_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).append(said("a"))
    opened(tmp_path)
    path = tmp_path / file_name(1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="a later epoch has read"):
        Journal(tmp_path)


def test_counted_follows_the_newest_epoch_that_began() -> None:
    assert counted({}) == {}
    assert counted({1: {}}) == {1: None}
    assert counted({1: {}, 2: None}) == {1: None, 2: 0}
    assert counted({1: {}, 2: {1: 10}, 3: {1: 10, 2: 20}, 4: None}) == {1: 10, 2: 20, 3: None, 4: 0}
    # 2 and 3 began at once: 3 read epoch 1 before 2 had written anything, so nothing of 2 counts
    assert counted({1: {}, 2: {1: 10}, 3: {1: 30, 2: 0}}) == {1: 30, 2: 0, 3: None}

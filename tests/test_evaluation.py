"""Grids, the comparison of evaluations, and the report, on a made-up run folder."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.grids import grid, save_grid
from evaluation.machine import machine_info
from evaluation.report import write_report
from evaluation.summary import compare, curve, read_evaluations
from tests.synthetic_run import synthetic_run, write_evaluation


def test_a_grid_holds_every_picture_enlarged_by_a_whole_factor() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 64, 64, 3), 50, np.uint8)
    picture = np.asarray(grid(images, columns=3))
    assert picture.shape == (2 * (128 + 6) + 6, 3 * (128 + 6) + 6, 3)
    assert [int(picture[6 + 64, 6 + 64 + 134 * column, 0]) for column in range(3)] == [0, 50, 100]


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), None),
        (np.zeros((0, 8, 8, 3), np.uint8), None),
        (np.zeros((2, 8, 8, 3), np.uint8), ["only one"]),
    ],
)
def test_a_grid_refuses_what_is_no_list_of_pictures(images: np.ndarray, captions: list[str] | None) -> None:
    with pytest.raises(ValueError):
        grid(images, captions)


def test_a_saved_grid_opens(tmp_path: Path) -> None:
    save_grid(tmp_path / "deep" / "grid.png", np.zeros((4, 16, 16, 3), np.uint8), ["a very long caption " * 9] * 4)
    assert Image.open(tmp_path / "deep" / "grid.png").format == "PNG"


def test_the_gain_is_of_pairs_and_in_stds_of_the_first_evaluation(tmp_path: Path) -> None:
    before, after = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 3.0, 5.0, 8.0])
    write_evaluation(tmp_path, 0, before)
    write_evaluation(tmp_path, 7, after)
    change = compare(tmp_path)
    assert change is not None and (change.before, change.after, change.count) == (0, 7, 4)
    assert change.difference == pytest.approx(1.5)
    assert change.gain == pytest.approx(1.5 / before.std(ddof=1))
    assert change.standard_error == pytest.approx((after - before).std(ddof=1) / 2)


def test_a_pair_without_a_reward_on_one_side_is_left_out(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0, 3.0]), set_aside=(1,))
    write_evaluation(tmp_path, 1, np.array([5.0, 6.0, 7.0]))
    change = compare(tmp_path)
    assert change is not None and change.count == 2 and change.before_mean == 2.0
    assert [point.count for point in curve(read_evaluations(tmp_path))] == [2, 3]


def test_one_evaluation_is_nothing_to_compare(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, np.array([1.0, 2.0]))
    assert compare(tmp_path) is None


class Tags(HTMLParser):
    """Fails on an element that is closed but not open; collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "input", "br", "link", "line", "path", "circle", "rect"):
            self.open.append(tag)
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "path", "circle", "rect"):
            assert self.open.pop() == tag


def test_the_report_is_one_page_with_nothing_to_fetch(tmp_path: Path) -> None:
    page = write_report(synthetic_run(tmp_path)).read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert all(source.startswith("data:") for source in tags.fetched)
    assert not re.search(r"\$\w", page)  # a placeholder that was left
    for says in ("base standard deviations", "before: the base model", "sampler-0", "load_lora_weights", "learner.lr"):
        assert says in page, says
    assert "in &lt;place&gt; &amp;" in page and "<place>" not in page  # prompts are text, not markup
    assert "the reward was nan" in page


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path)
    for part in ("evaluation", "samples", "trajectories"):
        for file in (run_dir / part).iterdir():
            file.unlink()
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "run.json").unlink()
    assert "no two evaluations" in write_report(run_dir).read_text()


def test_the_machine_says_what_decides_speed() -> None:
    machine = machine_info()
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["versions"]["torch"]

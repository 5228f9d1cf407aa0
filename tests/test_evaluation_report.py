"""The report of a made-up run says what it must, in one file that needs no other; grids; curves."""

import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conf.errors import UserError
from conf.load import load
from conf.resume import save_config
from evaluation.grids import CAPTION_SIZE, GAP, captions_of, grid, save_grid
from evaluation.machine import describe, machine_info
from evaluation.record import read_record, record_sitting
from evaluation.report import spread, write_report
from evaluation.summary import compare
from evaluation.svg import Curve, chart, number, ticks
from tests.synthetic_run import synthetic_run

VOID = {"meta", "img", "input", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """<line/> and its like open nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def test_the_report_is_whole_and_self_contained(page: str, run_dir: Path) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "$" not in page.replace("${", "")
    assert not list(run_dir.glob(".*"))


def test_the_report_says_what_the_run_did(page: str, run_dir: Path) -> None:
    change = compare(run_dir)
    assert change is not None
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for fact in (
        "40 of 40 batches",
        f"+{number(change.gain)} standard deviations of the base model",
        f"{number(change.before_mean)} ± {number(change.before_std)}",
        f"+{number(change.difference)} ± {number(change.standard_error)}",
        "the reward was nan: 1",
        "raised ValueError: 1",
        "largest age",
        "waiting for batches: rollouts 60%",
        "In the last batches the bottleneck is the samplers: raise samplers.count from 1 to 2.",
        "rolling out 67%",
        "learner.lr",
        "tracker_min_count: 2",
        machine_info()["cpu"],
        "pipe.load_lora_weights",
        "num_inference_steps=6, guidance_scale=1,",
        "animal 0 in <place> & 0",
        "KL to the base model",
    ):
        assert fact in text, fact


@pytest.mark.parametrize("missing", ["evaluation", "samples", "trajectories", "metrics.jsonl", "run.json"])
def test_a_run_without_some_of_its_files_still_has_a_report(missing: str, tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    (run_dir / missing).rename(tmp_path / "away")
    parser = Balanced()
    parser.feed(write_report(run_dir).read_text())
    assert parser.open == []


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    save_config(tmp_path / "new", load(["compressibility"]), ["a cat"])
    text = write_report(tmp_path / "new").read_text()
    assert "0 of 120 batches trained; no two evaluations to compare yet." in text


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        write_report(tmp_path)


def test_sittings_add_up(tmp_path: Path) -> None:
    record_sitting(tmp_path, 1, 0.0, {"sampler-0": {"rolling out": 1.0}})
    record_sitting(tmp_path, 2, 5.0, {"sampler-0": {"rolling out": 2.0}})
    record_sitting(tmp_path, 2, 5.0, {"sampler-0": {"rolling out": 3.0}})
    sittings = read_record(tmp_path)["sittings"]
    assert list(sittings) == ["1", "2"] and sittings["2"]["seconds"]["sampler-0"] == {"rolling out": 3.0}


def test_the_machine_is_named() -> None:
    info = machine_info()
    assert info["cores"] >= 1 and info["memory_gib"] > 0 and {"torch", "diffusers", "ray"} <= set(info["versions"])
    assert info["cpu"] in describe(info) and f"{info['cores']} cores" in describe(info)


# ---- grids


@pytest.mark.parametrize(
    ("count", "side", "columns", "size"),
    [
        (16, 64, None, (4 * 128 + 5 * GAP, 4 * 128 + 5 * GAP)),  # enlarged twofold
        (5, 512, None, (3 * 512 + 4 * GAP, 2 * 512 + 3 * GAP)),
        (1, 128, None, (128 + 2 * GAP, 128 + 2 * GAP)),
        (6, 128, 6, (6 * 128 + 7 * GAP, 128 + 2 * GAP)),
    ],
)
def test_grid_sizes(count: int, side: int, columns: int | None, size: tuple[int, int]) -> None:
    images = np.zeros((count, side, side, 3), np.uint8)
    assert grid(images, columns=columns).size == size
    captioned = grid(images, ["a hedgehog washing the dishes in a very long sentence"] * count, columns=columns)
    assert captioned.size[0] == size[0] and captioned.size[1] > size[1] + CAPTION_SIZE


def test_captions_are_the_prompt_and_what_rewards_said() -> None:
    rows = pa.table({"prompt": ["a cat", "a dog"], "caption": [0.5, 0.2], "caption.caption": ["two cats", None]})
    assert captions_of(rows, ("caption",)) == ["a cat\n“two cats”", "a dog"]
    assert captions_of(rows, ("other",)) == ["a cat", "a dog"]
    images = np.zeros((2, 64, 64, 3), np.uint8)
    assert grid(images, ["a cat\n“two cats”", "a dog"]).height > grid(images, ["a cat", "a dog"]).height


def test_pictures_stand_row_by_row_unchanged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 160, 3), dtype=np.uint8)
    pixels = np.asarray(grid(images, columns=2))
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = GAP + row * (128 + GAP), GAP + column * (160 + GAP)
        assert (pixels[top : top + 128, left : left + 160] == images[index]).all()


def test_a_saved_grid_is_a_png_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "v00000.png"
    save_grid(path, np.full((4, 64, 64, 3), 7, np.uint8), ["a cat"] * 4)
    assert Image.open(path).format == "PNG" and [p.name for p in path.parent.iterdir()] == ["v00000.png"]


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), None),
        (np.zeros((0, 8, 8, 3), np.uint8), None),
        (np.zeros((8, 8, 3), np.uint8), None),
        (np.zeros((2, 8, 8, 3), np.uint8), ["one"]),
    ],
)
def test_what_is_no_list_of_pictures_is_refused(images: np.ndarray, captions: list[str] | None) -> None:
    with pytest.raises(ValueError, match="pictures"):
        grid(images, captions)


# ---- curves

VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=12)


@given(VALUES, st.sampled_from(["line", "faint", "points"]))
def test_every_chart_is_valid_svg_within_its_frame(values: list[float], kind: str) -> None:
    drawing = chart([Curve("<a & b>", range(len(values)), values, kind=kind)], width=400, height=200)
    if not any(math.isfinite(value) for value in values):
        assert drawing == ""
        return
    tree = ElementTree.fromstring(drawing)
    heights = [float(circle.attrib["cy"]) for circle in tree.iter("circle")]
    for line in tree.iter("polyline"):
        heights += [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights and all(0 <= height <= 200 for height in heights)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_few_even_and_inside(low: float, span: float, count: int) -> None:
    found = ticks(low, low + span, count)
    assert 1 <= len(found) <= 2 * count + 2
    slack = 1e-6 * span + 4 * math.ulp(abs(low) + span)  # far from 0 a float is no finer than its ulp
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_numbers_are_short() -> None:
    values = [0, 1.23456, -0.00012345, 123456, math.nan, 1e-300]
    assert [number(value) for value in values] == ["0", "1.235", "−1.23e−4", "1.23e5", "–", "1e−300"]


def test_spread_keeps_the_ends() -> None:
    assert spread([1, 2, 3], 12) == [1, 2, 3]
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]

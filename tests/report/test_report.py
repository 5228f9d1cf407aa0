"""The report of a made-up run says what it must, in one file that needs no other; grids; curves."""

import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from buffer.run_folder import RunFolder
from common.errors import UserError
from common.machine import describe, machine_info
from conf.load import load
from conf.resume import save_config
from emoji_world import judge
from evaluation.summary import compare, compare_tables
from report.grids import CAPTION_SIZE, GAP, MISSING, captions_of, cells, grid, save_grid
from report.record import by_place, record_sitting
from report.report import spread, write_report
from report.sections import signed
from report.svg import Curve, chart, figure, number, ticks
from tests.synthetic_run import PAIRS, evaluation_table, synthetic_run, write_evaluation

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
        f"+{number(change.gain)} standard deviations of the rewards before",
        f"{number(change.before_mean)} ± {number(change.before_std)}",
        f"+{number(change.difference)} ± {number(change.standard_error)}",
        "the reward was nan: 1",
        "raised ValueError: 1",
        "largest age",
        "waiting for batches: rollouts 60%",
        "In the last batches the bottleneck is the samplers: raise samplers.count from 1 to 2.",
        "rolling out 67%",
        "learner.lr",
        "train_share: 0.5",
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
    save_config(tmp_path / "new", load(["compressibility", "run.batches=9"]), ["a cat"])
    text = write_report(tmp_path / "new").read_text()
    assert "0 of 9 batches trained; no two evaluations to compare yet." in text


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        write_report(tmp_path)


def test_sittings_add_up(tmp_path: Path) -> None:
    record_sitting(tmp_path, 1, 0.0, {"sampler-0": {"rolling out": 1.0}})
    record_sitting(tmp_path, 2, 5.0, {"sampler-0": {"rolling out": 2.0}})
    record_sitting(tmp_path, 2, 5.0, {"sampler-0": {"rolling out": 3.0}})
    sittings = RunFolder(tmp_path).record["sittings"]
    assert list(sittings) == ["1", "2"] and sittings["2"]["seconds"]["sampler-0"] == {"rolling out": 3.0}


def test_the_seconds_of_a_place_are_those_of_all_who_were_there() -> None:
    assert by_place(
        {
            "sampler-0.0": {"rolling out": 10.0, "waiting for orders: the learner": 1.0},
            "sampler-0.1": {"rolling out": 2.0, "loading the model": 3.0},
            "sampler-1.0": {"rolling out": 4.0},
            "reward-my-own.name-10.12": {"scoring": 5.0},
        }
    ) == {
        "sampler-0": {"rolling out": 12.0, "waiting for orders: the learner": 1.0, "loading the model": 3.0},
        "sampler-1": {"rolling out": 4.0},
        "reward-my-own.name-10": {"scoring": 5.0},
    }
    assert by_place({}) == {}


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
    path = tmp_path / "samples" / "v00000.train.png"
    save_grid(path, np.full((4, 64, 64, 3), 7, np.uint8), ["a cat"] * 4)
    assert Image.open(path).format == "PNG" and [p.name for p in path.parent.iterdir()] == ["v00000.train.png"]


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


def shaded(count: int) -> dict[int, np.ndarray]:
    """Pictures of an evaluation of version 0, each of a colour of its own, by trajectory id."""
    return {-1 - row: np.full((64, 64, 3), 10 + row, np.uint8) for row in range(count)}


def test_a_cell_is_the_same_pair_in_every_grid_whatever_was_set_aside() -> None:
    """A picture that is missing leaves a grey cell with its reason, and moves no other."""
    rows = evaluation_table(0, np.arange(6.0), set_aside=(1, 4))
    pictures = shaded(6)
    del pictures[-2], pictures[-5]
    images, captions = cells(rows, pictures, ("compressibility",)) or (np.empty(0), [])
    assert [int(image.min()) for image in images] == [10, MISSING, 12, 13, MISSING, 15]
    assert [int(image.max()) for image in images] == [10, MISSING, 12, 13, MISSING, 15]
    assert [caption.split("\n")[0] for caption in captions] == rows["prompt"].to_pylist()
    assert [caption.split("\n")[1:] for caption in captions] == [
        ["set aside: raised ValueError"] if row in (1, 4) else [] for row in range(6)
    ]
    whole, _ = cells(evaluation_table(0, np.arange(6.0)), shaded(6), ()) or (np.empty(0), [])
    assert whole.shape == images.shape and all((whole[row] == images[row]).all() for row in (0, 2, 3, 5))


def test_a_picture_that_is_gone_for_another_reason_leaves_its_cell_too() -> None:
    pictures = shaded(3)
    del pictures[-1]
    images, captions = cells(evaluation_table(0, np.arange(3.0)), pictures, ()) or (np.empty(0), [])
    assert int(images[0].min()) == MISSING and len(captions) == 3 and "\n" not in captions[0]


def test_there_is_no_grid_without_any_picture() -> None:
    assert cells(evaluation_table(0, np.arange(2.0), set_aside=(0, 1)), {}, ()) is None


def test_the_judge_refuses_what_it_cannot_judge_before_it_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = synthetic_run(tmp_path, batches=4)  # its prompts are no captions of Emoji World
    assert judge.main([str(foreign)]) == 2
    for path in list((foreign / "evaluation").iterdir())[1:]:
        path.unlink()
    for words in ([str(foreign)], [str(foreign / "nowhere")], ["n" * 300], [str(foreign), "--picture", "here.nope"]):
        assert judge.main(words) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    other_world, one_evaluation, nowhere, too_long, picture = errors.splitlines()
    assert "has prompts of another world: not a caption of Emoji World: 'animal 0 in" in other_world
    assert "has no two evaluations to compare" in one_evaluation
    assert "nowhere is no run" in nowhere and "nnn is no run" in too_long
    assert "--picture=here.nope must be a .png or .jpg in a folder that is there" in picture


def test_the_judges_captions_are_of_the_same_pairs(tmp_path: Path) -> None:
    """Also where rows of an evaluation are in another order, and some are missing."""
    run_dir = synthetic_run(tmp_path, batches=4)
    after = next((run_dir / "evaluation").glob("v00004*"))
    texts = pa.array([f"said of {row}" for row in range(PAIRS)])
    rows = pq.read_table(after).append_column("compressibility.text", texts)
    pq.write_table(rows.take([*range(PAIRS - 1, 3, -1), 0, 1]), after)  # without the third and the fourth pair
    captions = judge.captions(run_dir)
    prompts = [f"animal {row % 8} in <place> & {row % 4}" for row in range(judge.SHOWN)]
    assert captions[: judge.SHOWN] == prompts
    assert captions[judge.SHOWN :] == [
        prompt if row in (2, 3) else f"{prompt}\n“said of {row}”" for row, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("rewards", [np.full(PAIRS, 0.1), np.zeros(PAIRS)])
def test_the_judges_row_of_rewards_that_do_not_vary(rewards: np.ndarray, tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    for version in RunFolder(run_dir).evaluations:
        write_evaluation(run_dir, version, rewards)
    change = compare(run_dir)
    assert change is not None
    pictures = np.zeros((PAIRS, 64, 64, 3), np.uint8)
    row = judge.row(run_dir, change, ["a cat"] * PAIRS, pictures, pictures)
    assert "nan" not in row and "did not vary" in row and row.count("|") == judge.HEAD.splitlines()[0].count("|")


# ---- reports of unusual runs


def page_text(run_dir: Path) -> str:
    page = write_report(run_dir).read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (np.full(4, 0.1), np.full(4, 0.3), "from rewards that did not vary"),
        (np.full(4, 0.1), np.full(4, 0.1), "stayed at"),
        (np.array([1.0]), np.array([2.0]), "over 1 fixed pair of prompt and seed"),
        (np.array([2.0, 3.0]), np.array([1.0, 2.5]), "fell from"),
    ],
)
def test_the_report_says_in_words_what_has_no_number(
    before: np.ndarray, after: np.ndarray, says: str, tmp_path: Path
) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    for path in (run_dir / "evaluation").iterdir():
        path.unlink()
    write_evaluation(run_dir, 0, before)
    write_evaluation(run_dir, 4, after)
    text = page_text(run_dir)
    assert says in text and not re.search(r"\bnan\b", text.replace("the reward was nan", ""))
    assert "+−0" not in text and "−0 " not in text


def test_the_report_of_a_run_whose_evaluations_were_all_set_aside(tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    for version in RunFolder(run_dir).evaluations:
        write_evaluation(run_dir, version, np.zeros(PAIRS), set_aside=tuple(range(PAIRS)))
    assert "no two evaluations to compare" in page_text(run_dir)


def test_the_report_says_that_grey_cells_were_set_aside_where_there_are_some(page: str, tmp_path: Path) -> None:
    sentence = "a grey cell was set aside"
    assert sentence in page  # one of the made-up run's last evaluation was
    run_dir = synthetic_run(tmp_path, batches=4)
    for version in RunFolder(run_dir).evaluations:
        write_evaluation(run_dir, version, np.arange(float(PAIRS)))
    assert sentence not in page_text(run_dir)


def test_a_grid_that_is_not_the_base_models_is_not_called_so(tmp_path: Path) -> None:
    run_dir = synthetic_run(tmp_path, batches=4)
    (run_dir / "samples" / "v00000.train.png").unlink()
    text = page_text(run_dir)
    assert ">before training<" not in text and "after 1 batches" not in text
    assert "after 1 batch " in text


def test_signs_of_numbers() -> None:
    values = [0.5, -0.5, 0.0, -0.0, math.nan]
    assert [signed(value) for value in values] == ["+0.5", "−0.5", "0", "0", "–"]


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


@pytest.mark.parametrize(("xs", "whole"), [([0, 10, 20], True), ([0.0, 0.25, 0.6], False)])
def test_batches_are_marked_by_whole_numbers_and_gains_as_they_need(xs: list[float], whole: bool) -> None:
    tree = ElementTree.fromstring(chart([Curve("a", xs, [1.0, 2.0, 3.0])], width=400, height=200))
    marks = [float(text.text or "") for text in tree.iter("text") if text.attrib.get("text-anchor") == "middle"]
    assert len(marks) > 2 and all(mark.is_integer() for mark in marks) is whole


def test_a_legend_stands_once_beside_panels_of_the_same_curves() -> None:
    one, other = ([Curve(name, [0, 1], [0.0, 1.0]) for name in names] for names in ("ab", "ac"))
    drawn = ElementTree.fromstring(figure([[("first", one, "x"), ("second", one, "x"), ("third", other, "x")]]))
    legends = ["".join(text.itertext()) for text in drawn.findall(".//{*}text") if text.find("{*}tspan") is not None]
    assert legends == ["ab", "ac"]


def test_numbers_are_short() -> None:
    values = [0, 1.23456, -0.00012345, 123456, math.nan, 1e-300]
    assert [number(value) for value in values] == ["0", "1.235", "−1.23e−4", "1.23e5", "–", "1e−300"]


def test_spread_keeps_the_ends() -> None:
    assert spread([1, 2, 3], 12) == [1, 2, 3]
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]


def test_a_picture_that_was_set_aside_counts_for_no_reward() -> None:
    """It may have some of its rewards."""
    first, last = (evaluation_table(version, np.arange(4.0), set_aside=(3,)) for version in (0, 1))
    scores = {0: [1.0, 2.0, 3.0, 100.0], 1: [1.0, 2.0, 3.0, 0.0]}
    tables = {v: table.append_column("clip", pa.array(scores[v])) for v, table in enumerate((first, last))}
    found = compare_tables(tables, "clip")
    assert found is not None and (found.count, found.difference) == (3, 0.0)

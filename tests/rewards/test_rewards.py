"""What a reward may answer, and what happens when it answers something else."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from rewards.base import NamedReward, Scores, score_order, try_out
from rewards.jpeg import JpegCompressibility, JpegIncompressibility
from rewards.registry import resolve


def pictures(count: int) -> np.ndarray:
    """Picture i has i in its first pixel, which is how the rewards below tell one from another."""
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def numbers(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, 0].astype(np.float32)


# ---- JPEG


def test_jpeg_rewards_are_the_size_of_the_file_pillow_writes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    flat, noise = np.full((64, 64, 3), 90, np.uint8), generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    images = np.stack([flat, noise])
    sizes = []
    for i, image in enumerate(images):
        Image.fromarray(image, "RGB").save(tmp_path / f"{i}.jpg", "JPEG", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size)
    assert sizes[0] < 1000 < 5000 < sizes[1]
    np.testing.assert_array_equal(JpegIncompressibility()(images, ["", ""]), np.array(sizes, np.float32) / 1000)
    np.testing.assert_array_equal(JpegCompressibility()(images, ["", ""]), -np.array(sizes, np.float32) / 1000)


def test_jpeg_keeps_pillows_chroma_subsampling() -> None:
    """As in the paper's code: without subsampling the same colour noise is half as large again."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95, subsampling="4:4:4")
    assert JpegIncompressibility()(noise[None], [""])[0] < 0.8 * file.tell() / 1000


# ---- answers


@pytest.mark.parametrize(
    "answer",
    [
        np.array([1, 2], np.float32),
        np.array([1, 2], np.int64),
        [1.0, 2.0],
        np.array([1, 2], np.float64),
        torch.tensor([1.0, 2.0]),
        Scores(np.array([1, 2], np.float16), {"caption": np.array(["x", "y"]), "parts": [[1.0, 2], [3.0]]}),
    ],
)
def test_good_answers_become_float32(answer: object) -> None:
    scores = NamedReward("good", lambda images, prompts: answer)(pictures(2), ["a", "b"])
    assert scores.scores.dtype == np.float32
    np.testing.assert_array_equal(scores.scores, [1, 2])
    if scores.columns:
        assert scores.columns == {"caption": ["x", "y"], "parts": [[1.0, 2], [3.0]]}


def raises(images: np.ndarray, prompts: list[str]) -> None:
    raise RuntimeError("no such\nfile")


def writes(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    images[0] = 0
    return np.zeros(len(images))


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raises, "RuntimeError: no such file"),
    "changes the pictures": (writes, "read-only"),
    "NaN": (lambda i, p: np.array([1, np.nan]), "gave nan for picture 1"),
    "infinite": (lambda i, p: np.array([-np.inf, 1]), "gave -inf for picture 0"),
    "too large for float32": (lambda i, p: np.array([1e300, 1]), "finite"),
    "one short": (lambda i, p: np.zeros(1), r"shape \[1\] for 2 pictures"),
    "a column too many": (lambda i, p: np.zeros((2, 1)), r"shape \[2, 1\]"),
    "one number": (lambda i, p: 3.0, r"shape \[\]"),
    "None": (lambda i, p: None, "NoneType of dtype object"),
    "texts": (lambda i, p: ["good", "bad"], "list of dtype"),
    "complex": (lambda i, p: np.zeros(2, complex), "dtype complex128"),
    "ragged": (lambda i, p: [[1.0], [2.0, 3.0]], "no array of numbers"),
    "with gradient": (lambda i, p: torch.zeros(2, requires_grad=True), "no array of numbers"),
    "short column": (lambda i, p: Scores(np.zeros(2), {"caption": ["x"]}), "1 cells in column 'caption'"),
    "reserved column": (lambda i, p: Scores(np.zeros(2), {"score": [1, 2]}), "column 'score'"),
    "objects": (lambda i, p: Scores(np.zeros(2), {"x": [object(), object()]}), "object into column 'x'"),
    "mixed column": (lambda i, p: Scores(np.zeros(2), {"x": [1, "b"]}), "int and str into column 'x'"),
    "takes no prompts": (lambda i: np.zeros(2), "TypeError"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reward_is_refused_before_the_first_rollout_by_name(kind: str) -> None:
    call, message = BAD[kind]
    with pytest.raises(UserError, match=message) as caught:
        try_out(NamedReward("mine", call), ["a cat"], (64, 48))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


def test_trial_pictures_have_the_runs_size_and_prompts() -> None:
    seen = []

    def record(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        seen.append((images.shape, images.dtype, prompts))
        return np.zeros(2)

    try_out(NamedReward("mine", record), ["a cat", "a dog"], (64, 48))
    assert seen == [((2, 64, 48, 3), np.uint8, ["a cat", "a dog"])]


# ---- an order


@settings(deadline=None)  # a busy machine is no failure
@given(st.sets(st.integers(0, 19)), st.integers(1, 25), st.integers(1, 20), st.booleans())
def test_failures_are_the_pictures_own_and_all_calls_keep_the_slices_shapes(
    bad: set[int], batch_size: int, count: int, as_nan: bool
) -> None:
    shapes = []

    def reward(images: np.ndarray, prompts: list[str]) -> Scores:
        shapes.append(len(images))
        assert prompts == [f"prompt {int(i)}" for i in numbers(images)]
        ill = np.isin(numbers(images), list(bad))
        if ill.any() and not as_nan:
            raise RuntimeError(f"picture {int(numbers(images)[ill][0])}")
        return Scores(np.where(ill, np.nan, numbers(images)), {"twice": list(2 * numbers(images))})

    scores, failed = score_order(
        NamedReward("mine", reward), pictures(count), [f"prompt {i}" for i in range(count)], batch_size
    )
    good = [i for i in range(count) if i not in bad]
    assert scores.scores.dtype == np.float32 and scores.scores.tolist() == good
    assert list(scores.columns.get("twice", [])) == [2 * i for i in good]
    assert failed.keys() == bad & set(range(count))
    assert all(("nan" if as_nan else f"RuntimeError: picture {i}") in reason for i, reason in failed.items())
    assert set(shapes) <= {min(batch_size, count), count % batch_size}


def test_a_column_that_only_some_pictures_have_is_none_elsewhere() -> None:
    def reward(images: np.ndarray, prompts: list[str]) -> Scores:
        columns = {"caption": [str(i) for i in numbers(images)]} if numbers(images)[0] == 2 else {}
        return Scores(numbers(images), columns)

    scores, failed = score_order(NamedReward("mine", reward), pictures(4), ["p"] * 4, 2)
    assert not failed and scores.columns == {"caption": [None, None, "2.0", "3.0"]}


# ---- the registry


def test_built_in_rewards_that_need_no_weights_are_found_and_try_out_well() -> None:
    for name in ("compressibility", "incompressibility"):
        try_out(resolve(name, name, {}), ["a cat"], (64, 64))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is not on sys.path; each test names a module of its own, as imports are remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return tmp_path


def test_a_reward_of_the_users_own_by_import_path(here: Path) -> None:
    (here / "bright_rewards.py").write_text(
        "class Brightness:\n"
        "    def __init__(self, scale=1.0):\n"
        "        self.scale = scale\n"
        "    def __call__(self, images, prompts):\n"
        "        return self.scale * images.mean(axis=(1, 2, 3))\n"
    )
    reward = resolve("bright", "bright_rewards:Brightness", {"scale": 2.0})
    assert reward.name == "bright"
    np.testing.assert_allclose(reward(np.full((2, 4, 4, 3), 7, np.uint8), ["a", "b"]).scores, [14, 14])


SOURCE = """
class Fussy:
    def __init__(self, size):
        if size < 0:
            raise ValueError("size is negative")
    def __call__(self, images, prompts): ...
class Mute: ...
number = 3
def bright(images, prompts): ...
import abc
class Abstract(abc.ABC):
    @abc.abstractmethod
    def __call__(self, images, prompts): ...
class Leaves:
    def __init__(self, size):
        raise SystemExit(4)
"""


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        (
            "compresibility",
            {},
            r"neither built in \(aesthetic, caption, clip_score, compressibility, incompressibility, vqa\)",
        ),
        ("their_rewards.py:Fussy", {}, "form module:Class"),
        ("their_rewards/Fussy", {}, "form module:Class"),
        ("no_such_module:Fussy", {}, "there is no module no_such_module; put no_such_module.py into"),
        ("no_such.module:Fussy", {}, "there is no module no_such.module; put no_such/module.py into"),
        ("their_rewards:Fusy", {}, "has no Fusy; it has Abstract, Fussy, Leaves, Mute"),
        ("their_rewards:number", {}, "number is a int, not a class"),
        ("their_rewards:Mute", {}, "__call__"),
        ("their_rewards:Fussy", {}, "missing a required argument: 'size'"),
        ("their_rewards:Fussy", {"sise": 1}, "sise"),
        ("their_rewards:Fussy", {"size": -1}, "size is negative"),
        ("broken_rewards:Fussy", {}, "SyntaxError"),
        ("hungry_rewards:Fussy", {}, "needs no_such_library"),
        ("compressibility", {"quality": 90}, "quality"),
        ("compressibility", {"quality": "x" * 999}, "quality"),
        ("./their_rewards.py:Fussy", {}, "form module:Class"),
        (".their_rewards:Fussy", {}, "form module:Class"),
        ("their_rewards:Fussy.Inner", {}, "form module:Class"),
        ("their_rewards:bright", {}, "bright is a function, not a class"),
        ("their_rewards:Abstract", {}, "abstract"),
        ("their_rewards:Leaves", {"size": 1}, "Leaves.* cannot be made: SystemExit: 4"),
        ("leaving_rewards:Fussy", {}, "leaving_rewards cannot be imported: SystemExit: no more"),
        ("relative_rewards:Fussy", {}, "relative_rewards cannot be imported: ImportError: attempted relative import"),
        ("their_package.relative:Gone", {}, "has no Gone; it has no class at all"),
        ("wordy_rewards:Fussy", {}, "cannot be imported: RuntimeError: word word"),
        ("sys:Fussy", {}, "sys has no Fussy"),
        ("their_package:Fussy", {}, "has no Fussy"),
        ("types:Fussy", {}, "types.py has the name of a module of Python or of an installed library; rename it"),
        ("random:Random", {}, "random.py has the name of a module of Python"),
        ("torch:Fussy", {}, "torch.py has the name of a module of Python"),
        ("json:Fussy", {}, "json has the name of a module of Python"),
        ("rewards:Fussy", {}, "rewards.py has the name of a module of Python or of an installed library"),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_a_reward_that_cannot_be_had_is_one_sentence(here: Path, path: str, args: dict, message: str) -> None:
    for name in ("types", "random", "torch", "rewards"):
        (here / f"{name}.py").write_text(SOURCE)
    (here / "json").mkdir()
    (here / "their_package").mkdir()
    (here / "their_package" / "relative.py").write_text("from . import __path__\n")
    (here / "leaving_rewards.py").write_text("import sys\nsys.exit('no more')\n")
    (here / "relative_rewards.py").write_text("from . import helper\n")
    (here / "wordy_rewards.py").write_text("raise RuntimeError('word ' * 1000)\n")
    (here / "their_rewards.py").write_text(SOURCE)
    (here / "broken_rewards.py").write_text("class Fussy(:\n")
    (here / "hungry_rewards.py").write_text("import no_such_library\n")
    with pytest.raises(UserError, match=message) as caught:
        resolve("mine", path, args)
    assert "mine" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_reward_in_a_package_of_the_users_own_may_import_its_neighbours(here: Path) -> None:
    (here / "mild_rewards").mkdir()
    (here / "mild_rewards" / "helper.py").write_text("gain = 2.0\n")
    (here / "mild_rewards" / "bright.py").write_text(
        "from .helper import gain\nprint('hello')\n"
        "class Bright:\n    def __call__(self, images, prompts):\n        return [gain] * len(images)\n"
    )
    reward = resolve("bright", "mild_rewards.bright:Bright", {})
    assert reward(np.zeros((1, 1, 1, 3), np.uint8), ["a"]).scores.tolist() == [2]


def test_memory_that_runs_out_while_a_reward_is_made_is_no_mistake_of_the_users(here: Path) -> None:
    (here / "hungry_for_memory.py").write_text("class Big:\n    def __init__(self): raise MemoryError\n")
    with pytest.raises(MemoryError):
        resolve("mine", "hungry_for_memory:Big", {})

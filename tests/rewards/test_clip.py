"""Rewards on CLIP embeddings: whole models of the published layouts, small and with random weights."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from rewards.aesthetic import PLACES, Aesthetic, load_head
from rewards.base import Reward, Scores
from rewards.clip_model import ClipModel
from rewards.clip_score import ClipScore
from rewards.registry import resolve
from tests.clip_models import WIDTH, aesthetic_state, tiny_clip

PROMPTS = ["a cat", "two dogs on the beach", "a very long line of geese that walk to the sea", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(aesthetic_state(), file)
    return file


def pictures(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth ones and noisy ones, uint8 [count, height, width, 3], read-only as in a run."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    images = np.stack(smooth)
    images[::2] ^= rng.integers(0, 64, images[::2].shape).astype(np.uint8)
    images.flags.writeable = False
    return images


@pytest.fixture(params=["aesthetic", "clip_score"])
def reward(request: pytest.FixtureRequest, model: Path, head: Path) -> Reward:
    args = {"model": str(model), **({"head": str(head)} if request.param == "aesthetic" else {})}
    return resolve(request.param, request.param, args)


def test_a_score_does_not_depend_on_its_batch(reward: Callable[..., Scores]) -> None:
    images, prompts = pictures(32), PROMPTS * 8
    whole = reward(images, prompts).scores
    assert whole.std() > 1e-3
    order = np.random.default_rng(1).permutation(32)
    for size in (1, 5, 32):
        for start in range(0, 32, size):
            rows = order[start : start + size]
            np.testing.assert_allclose(reward(images[rows], [prompts[i] for i in rows]).scores, whole[rows], atol=1e-5)


def test_the_same_slice_gives_the_same_bits(reward: Callable[..., Scores]) -> None:
    images, prompts = pictures(8), PROMPTS * 2
    np.testing.assert_array_equal(reward(images, prompts).scores, reward(images, prompts).scores)


@pytest.mark.parametrize("size", [(64, 64), (20, 20), (48, 80), (32, 32)])
def test_pictures_are_prepared_as_open_clip_does(model: Path, size: tuple[int, int]) -> None:
    clip, images = ClipModel(str(model)), pictures(3, *size)
    own = image_transform_v2(PreprocessCfg(**clip.preprocessing), is_train=False)
    expected = torch.stack([own(Image.fromarray(image)) for image in images])
    difference = (clip.preprocess(images) - expected).abs() * torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1) * 255
    assert difference.mean() < 0.2 and difference.max() < 2.5  # levels of 255: Pillow rounds between its two passes


def test_embeddings_are_of_length_one_and_those_of_open_clip(model: Path) -> None:
    clip, images = ClipModel(str(model)), pictures(4)
    raw = clip.model.encode_image(clip.preprocess(images)).detach()
    embedded = clip.embed_images(images)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(embedded, raw / raw.norm(dim=-1, keepdim=True))
    assert not ClipScore(str(model))(images, PROMPTS).columns
    answer = ClipScore(str(model), embeddings=True)(images, PROMPTS)
    np.testing.assert_array_equal(answer.columns["embedding"], embedded.detach())
    scores = answer.scores
    np.testing.assert_allclose(scores, (embedded * clip.embed_texts(PROMPTS)).sum(-1), atol=1e-6)
    assert (np.abs(scores) <= 1).all()


# ---- the aesthetic head


def collapsed(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The one affine map that linear layers are together: weight [E] and bias, float64."""
    weight, bias = torch.eye(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    for place in PLACES:
        layer, shift = state[f"layers.{place}.weight"].double(), state[f"layers.{place}.bias"].double()
        weight, bias = layer @ weight, layer @ bias + shift
    return weight[0], bias[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_head_of_the_published_layout_is_its_affine_map(suffix: str, model: Path, tmp_path: Path) -> None:
    state, file = aesthetic_state(), tmp_path / f"head{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    images = pictures(16)
    embeddings = ClipModel(str(model)).embed_images(images).double()
    weight, bias = collapsed(state)
    np.testing.assert_allclose(
        Aesthetic(str(model), None, str(file))(images, ["a cat"] * 16), (embeddings @ weight + bias).numpy(), atol=1e-5
    )


class Code:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return (Path.touch, (Path("it_ran"),))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.weight": Code()}, "head.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Code()))
    for name in ("head.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name} holds more than weights"):
            load_head(name, WIDTH)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: torch.save(aesthetic_state(768), file), "layers.0.weight has the shape [1024, 768], not"),
        (lambda file: torch.save({"a": torch.ones(1)}, file), "layers.0.weight has the shape none"),
        (lambda file: torch.save([1, 2], file), "no state dict"),
        (lambda file: file.write_bytes(b""), "cannot be read as weights"),
        (lambda file: None, "is no file"),
    ],
    ids=["another CLIP's", "another model's", "a list", "empty", "missing"],
)
def test_a_head_that_is_none_is_refused(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    make(file)
    with pytest.raises(UserError) as caught:
        load_head(str(file), WIDTH)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [
        ("ViT-L-41", "openai", "no name that open_clip knows"),
        ("ViT-L-14", "opennai", "no weights pretrained=opennai"),
        ("tests", None, "cannot be loaded"),
    ],
)
def test_a_clip_model_that_is_none_is_refused(name: str, pretrained: str | None, says: str) -> None:
    with pytest.raises(UserError) as caught:
        ClipModel(name, pretrained)
    assert says in str(caught.value) and "\n" not in str(caught.value)

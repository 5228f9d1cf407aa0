"""Rewards that ask a vision-language model: captions with BERTScore, and questions with answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from conf.errors import UserError
from rewards.base import NamedReward, try_out
from rewards.bert_score import BertScore
from rewards.caption import CaptionRecall
from rewards.vision_language import VisionLanguageModel
from rewards.vqa import QuestionAnswering, graded, says
from tests import vlm_models

COUNT = 32  # pictures
QUESTIONS = ["what is going on in this image?", "how many cats are there?", "what animal?", "how many cats?"]
SENTENCES = ["a cat", "two cats on the beach", "two dogs playing chess in the snow", "four birds", "the bike"]


def pictures() -> np.ndarray:
    """uint8 [32, 48, 64, 3], each quite different from the others."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 48, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module", params=list(vlm_models.CLASSES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision-language model of each class."""
    make: Callable[[Path], Path] = vlm_models.CLASSES[request.param]
    return make(tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_models.text_model(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_models.llava(tmp_path_factory.mktemp("vlm") / "llava")


# ---- the vision-language model


def test_an_answer_depends_on_its_picture_and_question_alone(folder: Path) -> None:
    model = VisionLanguageModel(str(folder), max_new_tokens=6)
    images, questions = pictures(), QUESTIONS * (COUNT // len(QUESTIONS))
    together = model.answer(images, questions)
    assert len(set(together)) > 3, "the model is blind, so this test shows nothing"
    for size in (1, 5):
        slices = [slice(start, start + size) for start in range(0, COUNT, size)]
        assert [text for part in slices for text in model.answer(images[part], questions[part])] == together
    order = np.random.default_rng(1).permutation(COUNT)
    assert model.answer(images[order], [questions[row] for row in order]) == [together[row] for row in order]
    assert not any("user" in text and "assistant" in text and "?" in text for text in together)  # no question echoed


def test_a_model_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The vision-language model .*nothing cannot be loaded"):
        VisionLanguageModel(str(tmp_path / "nothing"))


# ---- BERTScore


def test_recall_is_the_mean_over_the_reference_of_the_best_cosine(text: Path) -> None:
    """Pairs of different lengths in one call, which torchmetrics 1.9 itself mixes up."""
    score = BertScore(str(text))
    candidates, references = SENTENCES, SENTENCES[2:] + SENTENCES[:2]
    expected = []
    for candidate, reference in zip(candidates, references, strict=True):
        with torch.no_grad():
            states = [
                score.model(**score.tokenizer(words, return_tensors="pt")).last_hidden_state[0, 1:-1]
                for words in (candidate, reference)
            ]
        ours, theirs = (functional.normalize(state, dim=-1) for state in states)
        expected.append((theirs @ ours.T).amax(dim=1).mean().item())
    np.testing.assert_allclose(score.recall(candidates, references), expected, atol=1e-5)
    np.testing.assert_allclose(score.recall(SENTENCES, SENTENCES), 1, atol=1e-5)


def test_layers_are_those_of_the_model(text: Path) -> None:
    last, first = BertScore(str(text)), BertScore(str(text), layer=1)
    assert abs(last.recall(["a cat"], ["two dogs"]) - first.recall(["a cat"], ["two dogs"])) > 1e-3
    with pytest.raises(UserError, match=r"text_layer=40 is none of .*choose 0 to 2"):
        BertScore(str(text), layer=40)


# ---- captions


def test_captions_are_scored_stored_and_independent_of_the_batch(llava: Path, text: Path) -> None:
    reward = NamedReward("caption", CaptionRecall(str(llava), text_model=str(text), max_new_tokens=6))
    images, prompts = pictures(), (SENTENCES * 7)[:COUNT]
    whole = reward(images, prompts)
    assert whole.scores.std() > 0.01 and len(set(whole.columns["caption"])) > 10
    for size in (1, 5):
        parts = [reward(images[start : start + size], prompts[start : start + size]) for start in range(0, COUNT, size)]
        np.testing.assert_allclose(np.concatenate([part.scores for part in parts]), whole.scores, atol=1e-5)
        assert [text for part in parts for text in part.columns["caption"]] == whole.columns["caption"]
    again = reward(images, prompts)
    assert (again.scores == whole.scores).all() and again.columns == whole.columns
    try_out(reward, SENTENCES, (48, 64))


def test_an_empty_answer_scores_the_minimum_and_is_marked(llava: Path, text: Path) -> None:
    reward = CaptionRecall(str(llava), text_model=str(text))
    head = reward.captioner.model.lm_head.weight
    with torch.no_grad():  # a model that can say nothing but full stops
        head.zero_()[reward.captioner.processor.tokenizer.convert_tokens_to_ids(".")] = 1
    scores = reward(pictures()[:3], ["a cat"] * 3)
    assert set("".join(scores.columns["caption"])) <= set(". ")
    assert scores.columns["empty"] == [True] * 3
    assert scores.scores.tolist() == [0] * 3 and scores.scores.dtype == np.float32


# ---- questions


@pytest.mark.parametrize(
    ("answer", "words", "right"),
    [
        ("three", "three", True),
        ("There are 3 cats.", "three", True),
        ("Three", "3", True),
        ("thirteen", "3", False),
        ("23", "3", False),
        ("twenty-one geese", "21", True),
        ("a mouse", "mice", True),
        ("Mice!", "mouse", True),
        ("polar bears", "polar bear", True),
        ("a bear at the polar circle", "polar bear", False),
        ("two wolves and a fox", "fox", True),
        ("a caterpillar", "cat", False),
        ("", "cat", False),
        ("anything", "", False),
    ],
)
def test_words_are_matched_in_any_number(answer: str, words: str, right: bool) -> None:
    assert says(answer, words) is right


@pytest.mark.parametrize(("strict", "expected"), [(False, [1, 0.5, 0.5, 0]), (True, [1, 0, 0, 0])])
def test_half_of_a_counting_score_is_the_number_and_half_the_animal(strict: bool, expected: list[float]) -> None:
    answers = [["3", "three", "four", ""], ["cats", "dogs", "a cat", "a dog"]]
    scores = graded(answers, [["three"] * 4, ["cats"] * 4], strict)
    assert scores.scores.tolist() == expected
    assert scores.columns["answer_1"] == answers[0]
    assert scores.columns["right_2"] == [True, False, True, False]


def test_answers_are_independent_of_the_batch(llava: Path) -> None:
    reward = QuestionAnswering(str(llava), max_new_tokens=4)
    images, prompts = pictures(), ["two cats", "three dogs", "four birds", "two birds"] * (COUNT // 4)
    whole = reward(images, prompts)
    for size in (1, 5):
        parts = [reward(images[start : start + size], prompts[start : start + size]) for start in range(0, COUNT, size)]
        for column, cells in whole.columns.items():
            assert [cell for part in parts for cell in part.columns[column]] == list(cells)
        assert (np.concatenate([part.scores for part in parts]) == whole.scores).all()


def test_a_prompt_of_another_form_is_refused_before_the_first_rollout(llava: Path) -> None:
    with pytest.raises(UserError, match=r"prompt 'cats' does not match pattern"):
        try_out(NamedReward("vqa", QuestionAnswering(str(llava))), ["cats"], (48, 64))

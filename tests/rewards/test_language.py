"""Rewards that ask a vision-language model: captions with BERTScore, and questions with answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from torch.nn import functional
from transformers import DebertaV2Config, DebertaV2Model

from common.errors import UserError
from rewards.base import NamedReward, try_out
from rewards.bert_score import BertScore
from rewards.caption import CaptionRecall
from rewards.vision_language import VisionLanguageModel
from rewards.vqa import QuestionAnswering, graded, says
from tests import vlm_models
from tests.rewards import vlm_others

pytestmark = pytest.mark.long

COUNT = 32  # pictures
QUESTIONS = ["what is going on in this image?", "how many cats are there?", "what animal?", "how many cats?"]
SENTENCES = ["a cat", "two cats on the beach", "two dogs playing chess in the snow", "four birds", "the bike"]


def pictures() -> np.ndarray:
    """uint8 [32, 48, 64, 3], each quite different from the others."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 48, 64, 3)).astype(np.uint8)


CLASSES = {**vlm_models.CLASSES, **vlm_others.CLASSES}


@pytest.fixture(scope="module", params=list(CLASSES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision-language model of each class."""
    make: Callable[[Path], Path] = CLASSES[request.param]
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


def test_an_answer_is_all_that_the_model_says_and_nothing_of_the_question(folder: Path) -> None:
    """Also behind an encoder (T5, BART), whose question is no part of what the decoder gives."""
    model = VisionLanguageModel(str(folder), max_new_tokens=6)
    images = pictures()[:8]
    expected = []
    for image, question in zip(images, QUESTIONS * 2, strict=True):
        inputs = model.processor(
            images=[[Image.fromarray(image)]], text=[model._prompt(question)], return_tensors="pt"
        ).to(model.model.dtype)
        said = model.model.generate(
            **inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, output_scores=True
        )  # one row of scores for each token that it generated
        tokens = said.sequences[:, -len(said.scores) :]
        (text,) = model.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        expected.append(" ".join(text.split()))
    assert model.answer(images, QUESTIONS * 2) == expected
    assert any(expected), "the model says nothing, so this test shows nothing"


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (1, 64), (130, 20)])
def test_pictures_of_odd_sizes_are_answered(folder: Path, shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    assert len(VisionLanguageModel(str(folder), max_new_tokens=2).answer(images, QUESTIONS[:2])) == 2


def test_a_model_that_reads_no_question_is_refused(tmp_path: Path) -> None:
    model = VisionLanguageModel(str(vlm_others.pix2struct(tmp_path / "pix2struct")))
    with pytest.raises(UserError, match="pix2struct reads no question"):
        model.answer(pictures()[:2], QUESTIONS[:2])


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
    with pytest.raises(UserError, match=r"text_layer=40 is not a layer of .*choose 0 to 2"):
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


def silenced(model: VisionLanguageModel) -> None:
    """From now on it can say nothing but full stops."""
    with torch.no_grad():
        head = model.model.lm_head.weight
        head.zero_()[model.processor.tokenizer.convert_tokens_to_ids(".")] = 1


def test_a_model_that_says_nothing_at_all_is_refused_before_the_first_rollout(llava: Path, text: Path) -> None:
    caption = CaptionRecall(str(llava), text_model=str(text), max_new_tokens=4)
    silenced(caption.captioner)
    questions = QuestionAnswering(str(llava), max_new_tokens=4)
    silenced(questions.model)
    for reward in (caption, questions):
        with pytest.raises(UserError, match="answered nothing about the two pictures of the trial"):
            try_out(NamedReward("mine", reward), ["two cats"], (48, 64))


def test_an_empty_answer_scores_the_minimum_and_is_marked(llava: Path, text: Path) -> None:
    reward = CaptionRecall(str(llava), text_model=str(text))
    silenced(reward.captioner)
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


def test_every_prompt_of_the_run_has_to_match_the_pattern(llava: Path) -> None:
    """Not the two alone that the trial asks about."""
    reward = NamedReward("vqa", QuestionAnswering(str(llava), max_new_tokens=4))
    try_out(reward, ["two cats", "three dogs", "four birds"], (48, 64))
    with pytest.raises(UserError, match=r"prompt 'dogs' does not match pattern"):
        try_out(reward, ["two cats", "dogs", "four birds"], (48, 64))


def test_braces_in_prompts_and_questions_are_what_they_are(llava: Path) -> None:
    asked = []
    reward = QuestionAnswering(
        str(llava),
        questions=[{"ask": "{a} {} { } {0} {{a}} {a:>9} {b}?", "expect": "{a}"}],
        pattern="(?P<a>.*?)(?P<b> x)?",
        max_new_tokens=2,
    )

    class Listening(VisionLanguageModel):
        def _prompt(self, question: str) -> str:
            asked.append(question)
            return super()._prompt(question)

    reward.model = Listening(str(llava), max_new_tokens=2)
    reward(pictures()[:2], ["{b}", "cats {"])
    assert asked == ["{b} {} { } {0} {{b}} {a:>9} ?", "cats { {} { } {0} {cats {} {a:>9} ?"]


@pytest.mark.parametrize(
    "prompt", ["", "{prompt}", "{", "cat " * 5000, "\x00", "猫", "a\nb"], ids=lambda t: f"{t!r:.9}"
)
def test_a_caption_is_compared_with_whatever_the_prompt_is(llava: Path, text: Path, prompt: str) -> None:
    reward = NamedReward("caption", CaptionRecall(str(llava), text_model=str(text), max_new_tokens=2))
    try_out(reward, [prompt], (1, 1))


def test_an_empty_text_says_nothing_of_a_reference(text: Path) -> None:
    assert BertScore(str(text)).recall(["", " \n", "a cat"], ["a cat"] * 3).tolist() == pytest.approx([0, 0, 1])


def test_a_text_model_with_a_sentencepiece_file_alone_is_loaded(tmp_path: Path) -> None:
    """As microsoft/deberta-v3-large comes."""
    prefix = tmp_path / "spm"
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(prefix), vocab_size=30, minloglevel=2,
        unk_id=3, pad_id=0, bos_id=1, eos_id=2, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]",
    )  # fmt: skip
    torch.manual_seed(0)
    DebertaV2Model(DebertaV2Config(vocab_size=64, **vlm_models.SMALL)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    prefix.with_suffix(".model").rename(tmp_path / "spm.model")
    scores = BertScore(str(tmp_path)).recall(["a cat", "two dogs"], ["a cat", "a cat"])
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.999

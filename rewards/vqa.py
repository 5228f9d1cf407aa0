"""Are the questions about a picture answered as its prompt would? The counting reward of Black et al. 2023.

Half of the reward is "how many are there", half is "what are they", each by matching words.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import inflect
import numpy as np

from common.blame import shortened
from common.errors import UserError
from rewards.base import Scores
from rewards.vision_language import VisionLanguageModel

COUNTING = (
    {"ask": "How many {animals} are there?", "expect": "{number}"},
    {"ask": "What animal?", "expect": "{animals}"},
)
GROUP = re.compile(r"\{([^\W\d]\w*)\}")  # in a question: stands for what the prompt has there
WORDS = inflect.engine()
NUMBERS = {str(WORDS.number_to_words(str(number))): str(number) for number in range(101)}


class QuestionAnswering:
    """The share of questions that are answered right; with `strict`, 1 if all are and 0 if not.

    Stores `answer_1`, `right_1`, ... of the first question and on.

    model, revision, dtype, max_new_tokens: see `VisionLanguageModel`. pattern: a regular expression that every prompt
    matches as a whole; its named groups may stand in the questions and expected answers. questions: each a question
    to `ask` and the words to `expect` somewhere in the answer: "3" and "three" are the same word, so are "mouse" and
    "mice".
    """

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        revision: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 16,
        questions: Sequence[Mapping[str, str]] = COUNTING,
        pattern: str = r"(?P<number>\S+) (?P<animals>.+)",
        strict: bool = False,
    ) -> None:
        try:
            self.pattern = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"pattern={pattern!r:.200} is no regular expression: {error}; mend it.") from error
        self.questions = [self._checked(question) for question in _listed(questions)]
        self.strict = strict
        self.model = VisionLanguageModel(model, revision, dtype, max_new_tokens)

    def __call__(self, images: np.ndarray, prompts: list[str]) -> Scores:
        named = [self._named(prompt) for prompt in prompts]
        answers = [self.model.answer(images, [_filled(ask, names) for names in named]) for ask, _ in self.questions]
        wanted = [[_filled(expect, names) for names in named] for _, expect in self.questions]
        return graded(answers, wanted, self.strict)

    def check_trial(self, prompts: Sequence[str], scores: Scores) -> None:
        """See `try_out`."""
        for prompt in prompts:
            self._named(prompt)
        answers = [cells for key, cells in scores.columns.items() if key.startswith("answer_")]
        self.model.check_it_speaks([text for cells in answers for text in cells])

    def _checked(self, question: Any) -> tuple[str, str]:
        """What is asked and expected. Raises UserError where it is no question, or names a group that is none."""
        shown = shortened(repr(question), 200)
        if not isinstance(question, Mapping) or question.keys() != {"ask", "expect"}:
            raise UserError(f"questions holds {shown}: give each as {{ask: ..., expect: ...}}.")
        for text in question.values():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"questions holds {shown}: both have to be text; write numbers and yes in quotes.")
            unknown = next((name for name in GROUP.findall(text) if name not in self.pattern.groupindex), None)
            if unknown is not None:
                known = ", ".join(self.pattern.groupindex) or "none"
                raise UserError(f"questions holds {shown}: {{{unknown}}} is no group of pattern, which has {known}.")
        return question["ask"], question["expect"]

    def _named(self, prompt: str) -> dict[str, str]:
        match = self.pattern.fullmatch(prompt)
        if match is None:
            raise ValueError(f"the prompt {prompt!r} does not match pattern={self.pattern.pattern!r}")
        return match.groupdict(default="")


def _listed(questions: Any) -> Sequence[Any]:
    if not isinstance(questions, Sequence) or isinstance(questions, str) or not questions:
        raise UserError(f"questions={questions!r:.200} is no list of questions: give [{{ask: ..., expect: ...}}].")
    return questions


def _filled(text: str, names: Mapping[str, str]) -> str:
    """The text with {name} for each name; other braces are what they are."""
    return GROUP.sub(lambda group: names[group[1]], text)


def graded(answers: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], strict: bool) -> Scores:
    """Scores of B pictures from the answers to Q questions and the words that they should say, [Q][B] both."""
    right = [[says(*pair) for pair in zip(*both, strict=True)] for both in zip(answers, wanted, strict=True)]
    shares = np.array(right, np.float32).mean(axis=0)
    columns: dict[str, Sequence[Any]] = {f"answer_{number}": texts for number, texts in enumerate(answers, start=1)}
    columns |= {f"right_{number}": hits for number, hits in enumerate(right, start=1)}
    return Scores(np.floor(shares) if strict else shares, columns)


def says(answer: str, words: str) -> bool:
    """Whether the words stand in the answer, next to one another: numbers in digits or letters, nouns in any number."""
    text, wanted = normalised(answer), normalised(words)
    starts = range(len(text) - len(wanted) + 1)
    return bool(wanted) and any(text[start : start + len(wanted)] == wanted for start in starts)


def normalised(text: str) -> list[str]:
    """The words in lower case, numbers as digits, nouns in the singular."""
    return [_normalised_word(word) for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower())]


@cache
def _normalised_word(word: str) -> str:
    return NUMBERS.get(word) or WORDS.singular_noun(word) or word

"""Settings of the rewards that ask models: what makes no question is refused before a model is loaded."""

import pytest

from common.errors import UserError
from rewards.registry import resolve


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dtype": "float99"}, "dtype=float99 is no format"),
        ({"dtype": "nn"}, "dtype=nn is no format"),
        ({"dtype": "int8"}, "dtype=int8 is no format"),
        ({"dtype": None}, "dtype=null must be a text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no room"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"max_new_tokens": "many"}, "max_new_tokens=many must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be a whole number"),
        ({"pattern": "("}, "pattern='(' is no regular expression"),
        ({"pattern": 3}, "pattern=3 must be a text"),
        ({"questions": []}, "questions=[] is no list"),
        ({"questions": "What animal?"}, "questions='What animal?' is no list"),
        ({"questions": {"ask": "What?", "expect": "a"}}, "is no list"),
        ({"questions": ["What animal?"]}, "give each as {ask: ..., expect: ...}"),
        ({"questions": [{"ask": "What?"}]}, "give each as"),
        ({"questions": [{"ask": "What?", "expect": "a", "weight": 2}]}, "give each as"),
        ({"questions": [{"ask": "How many?", "expect": 3}]}, "have to be text"),
        ({"questions": [{"ask": "Any?", "expect": True}]}, "have to be text"),
        ({"questions": [{"ask": "", "expect": "a"}]}, "have to be text"),
        (
            {"questions": [{"ask": "How many {animal}?", "expect": "a"}]},
            "{animal} is no group of pattern, which has num",
        ),
        ({"questions": [{"ask": "What?", "expect": "{place}"}]}, "{place} is no group of pattern"),
        ({"questions": [{"ask": "{x}" * 999, "expect": "a"}], "pattern": ".*"}, "{x} is no group of pattern"),
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_a_setting_that_makes_no_question_is_refused_before_the_model_is_loaded(args: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("mine", "vqa", {"model": "no/such", **args})
    text = str(caught.value)
    assert message in text and text.startswith("rewards.mine") and len(text) < 500

import pytest

from r2m_async.from_scratch.short_answers import short_answer


@pytest.mark.parametrize(
    "response, reward",
    [
        (" ".join(["word"] * 10) + ".", 1.0),
        (" ".join(["word"] * 10) + '."', 0.5),
        (" ".join(["word"] * 25) + "!\n", 1.0),
        (" ".join(["word"] * 30) + "?", 0.9),
        (" ".join(["word"] * 40), 0.2),
        (" ".join(["word"] * 60) + ".", 0.5),
        (" ".join(["word"] * 60), 0.0),
        ("Yes, it is.", 0.0),
        ("", 0.0),
    ],
)
def test_a_short_answer_has_a_sentences_end_and_few_words_but_some(response, reward):
    assert short_answer("say something", response) == pytest.approx(reward)
    assert short_answer("", response, False) == pytest.approx(reward)

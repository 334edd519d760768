"""Clean-up of texts, rule by rule; whole sentences are in the golden tests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.detokenizers import (
    DETOKENIZERS,
    TEXT8,
    detokenize,
    in_parts,
    text8_normalize,
)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("wikitext", "1 @,@ 000 well @-@ known", "1,000 well-known"),
        ("wikitext", " = = Heading = = \n", " == Heading ==\n"),
        ("wikitext", "a ( b ) c", "a (b) c"),
        ("wikitext", 'he said " so "', 'he said "so"'),
        ("wikitext", "20 ° C", "20°C"),
        ("ptb", "N N N <unk> did n't", "N 1 1 ? didn't"),
        ("ptb", "$ 1 # 1 a\\/b", "$1 #1 a/b"),
        ("lm1b", "Was it over ?", "Was it over?"),
        ("lm1b", "http : / / a . It ended . Then", "http://a . It ended. Then"),
        ("lm1b", "it 's $ 5", "it's $5"),
        ("lambada", " \u201chi\u201d \n", '\n"hi"'),
        ("none", " as it  is ", " as it  is "),
    ],
)
def test_rules(name, text, expected):
    assert detokenize(text, DETOKENIZERS[name]) == expected


@given(st.text(max_size=60))
def test_papers_are_cleaned_twice(text):
    """First as WikiText, then as LM1B."""
    once = detokenize(text, DETOKENIZERS["wikitext"])
    both = detokenize(once, DETOKENIZERS["lm1b"])
    assert detokenize(text, DETOKENIZERS["scientific_papers"]) == both


@given(st.text(max_size=60))
def test_text8_is_a_rule_of_its_own(text):
    assert detokenize(text, TEXT8) == text8_normalize(text)


def test_rules_are_told_apart_by_what_they_print():
    """So that rows of other rules are not taken for those of these."""
    prints = {repr(rules) for rules in (*DETOKENIZERS.values(), TEXT8)}
    assert len(prints) == len(DETOKENIZERS) + 1
    changed = DETOKENIZERS["ptb"][0]._replace(new="x")
    assert repr(changed) != repr(DETOKENIZERS["ptb"][0])
    assert "0x" not in "".join(prints)  # no address, which changes from run to run


@given(st.text("abZ9 \n.\u0130\u03a3\u1e9e\u0301", max_size=40), st.integers(1, 9))
def test_long_texts_of_text8_are_cleaned_in_parts(text, size):
    assert "".join(in_parts(text, TEXT8, size)) == text8_normalize(text)
    assert "".join(in_parts(text, (), size)) == text
    assert in_parts(text, DETOKENIZERS["lm1b"], size) is None

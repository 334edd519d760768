"""Fingerprints: what tells two sets of rows apart, and those of published data sets."""

import posixpath
from typing import NamedTuple

from omegaconf import DictConfig

# ---------------------------------------------------------------- rows


class Fingerprint(NamedTuple):
    """Of a split's rows; equal for equal rows, however they were made."""

    rows: int
    tokens: int  # bos and eos included, padding not
    sha256: str  # of the rows' numbers of tokens and of the tokens, int32 each

    def line(self) -> str:
        return f"{self.rows} rows, {self.tokens} tokens, sha256 {self.sha256[:16]}"


# ---------------------------------------------------------------- what others measured

# Validation rows of GPT-2 tokens, packed to 1024, by data set and
# `data.insert_valid_eos`; measured on complete copies of the published splits.
FINGERPRINTS: dict[tuple[str, bool], Fingerprint] = {
    ("wikitext2", False): Fingerprint(
        231, 236544, "a739b16ce860d98bf2c052a7271bba31793f9ea309d72047b0f923ed0b19e3b0"
    ),
    ("wikitext2", True): Fingerprint(
        234, 239616, "8aa3cf0b19d3807f89445e3154a8a3d606adecbc4faeef861e821e59b025a3d0"
    ),
    ("ptb", False): Fingerprint(
        76, 77824, "65af8bfe475364a909d2de69eb49ebdef2c587ec3f564d26770c90931969184c"
    ),
    ("ptb", True): Fingerprint(
        80, 81920, "50415f0440169bfad84ae696ea96539f071666503b4a76f2cd4d14c0c7164343"
    ),
    ("lambada", False): Fingerprint(
        414, 423936, "88887c0c8bb4b17d8c7090c27bc073e9dc4c400224effe33afbb346a2cd11ec3"
    ),
    ("lambada", True): Fingerprint(
        419, 429056, "1403ae330a3b12a7b9e1bca2e91f46ac38e403b36635efeb33a6b2f84b54c615"
    ),
    ("ag_news", False): Fingerprint(
        384, 393216, "b189c085e7828a70cb1b579d70685593adf15833388ca8341456c8936f6d2680"
    ),
    ("ag_news", True): Fingerprint(
        391, 400384, "56b60fc8cb2a6a0d5c6b51f952fab3eb2a6c4d422b388a6c3cb503766ccfdcb3"
    ),
}


def known_fingerprint(config: DictConfig) -> Fingerprint | None:
    """The one that validation rows laid out like these should have, where known."""
    data = config.data
    tokenizer = posixpath.basename(data.tokenizer_name_or_path)
    usual = (tokenizer, config.model.length, data.wrap) == ("gpt2", 1024, True)
    if not usual or data.keep_remainder or data.detokenizer is not None:
        return None
    return FINGERPRINTS.get((data.valid, data.insert_valid_eos))

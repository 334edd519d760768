"""What the published validation sets are, packed to 1024 GPT-2 tokens.

Each is computed twice: by the code, and by plain lists in this file.
"""

import hashlib

import numpy as np
import pytest
from stand_ins import FOLDERS, SHARED

from data.detokenizers import DETOKENIZERS, detokenize
from data.fingerprints import FINGERPRINTS, known_fingerprint
from data.published import CORPORA
from data.registry import DATASETS
from data.sources import documents_of
from data.tokenizers import get_tokenizer

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is not on this machine"
)


def config_of(compose, tmp_path, name, insert_eos):
    return compose(
        f"data={name}",
        f"data.source={SHARED / FOLDERS[name]}",
        f"data.tokenizer_name_or_path={SHARED}/gpt2",
        f"data.insert_valid_eos={insert_eos}",
        f"data.cache_dir={tmp_path}",
        "data.num_proc=2",
        "model.length=1024",
    )


def plainly(config, tokenizer):
    """The rows by the protocol, as lists."""
    documents = documents_of(config, "valid", f"{config.data.cache_dir}/texts")
    rules = DETOKENIZERS[CORPORA[config.data.valid].detokenizer]
    eos, stream = tokenizer.eos_token_id, []
    for text in documents.texts(0, len(documents)):
        stream += tokenizer(detokenize(text, rules), verbose=False)["input_ids"]
        stream += [eos] * config.data.insert_valid_eos
    rows = [stream[i : i + 1022] for i in range(0, len(stream), 1022)]
    return [[eos, *row, eos] for row in rows if len(row) == 1022]


@pytest.mark.parametrize("key", FINGERPRINTS, ids=lambda key: f"{key[0]}-{key[1]}")
def test_published_sets_have_these_rows(compose, tmp_path, key):
    config = config_of(compose, tmp_path, *key)
    tokenizer = get_tokenizer(config)
    rows = DATASETS[key[0]].load(config, tokenizer, "valid")
    assert rows.fingerprint() == FINGERPRINTS[key] == known_fingerprint(config)


# Of test splits, which no published number is of, by data set and eos.
TEST_SPLITS = {
    ("wikitext2", False): (264, 270336, "6a8f4ef54a189a81"),
    ("wikitext2", True): (268, 274432, "e2d48aa7e97a6636"),
    ("ptb", False): (85, 87040, "1911d4090cd79c87"),
    ("ptb", True): (89, 91136, "8b0719ad88e74abe"),
}


@pytest.mark.parametrize("key", TEST_SPLITS, ids=lambda key: f"{key[0]}-{key[1]}")
def test_test_splits_have_these_rows(compose, tmp_path, key):
    config = config_of(compose, tmp_path, *key)
    file = {"wikitext2": "wikitext-2-raw-v1/test.parquet", "ptb": "test.parquet"}
    config.data.source = f"{config.data.source}/{file[key[0]]}"
    rows = DATASETS[key[0]].load(config, get_tokenizer(config), "valid")
    found = rows.fingerprint()
    assert (*found[:2], found.sha256[:16]) == TEST_SPLITS[key]


@pytest.mark.parametrize("name", ["ptb", "wikitext2"])
def test_the_rows_are_those_of_the_protocol(compose, tmp_path, name):
    config = config_of(compose, tmp_path, name, False)
    expected = plainly(config, get_tokenizer(config))
    known = FINGERPRINTS[name, False]
    assert len(expected) == known.rows
    assert known.tokens == 1024 * known.rows
    widths = np.full(len(expected), 1024, dtype="<i4").tobytes()
    tokens = np.array(expected, dtype="<i4").tobytes()
    parts = (hashlib.sha256(part).digest() for part in (widths, tokens))
    assert hashlib.sha256(b"".join(parts)).hexdigest() == known.sha256


@pytest.mark.parametrize(
    "override",
    [
        "model.length=512",
        "data.wrap=False",
        "data.keep_remainder=True",
        "data.detokenizer=none",
        "data.tokenizer_name_or_path=bytes",
        "data.valid=wikitext103",
    ],
)
def test_other_layouts_have_no_known_fingerprint(compose, tmp_path, override):
    assert known_fingerprint(config_of(compose, tmp_path, "ptb", False))
    usual = ("data=ptb", f"data.tokenizer_name_or_path={SHARED}/gpt2")
    config = compose(*usual, "model.length=1024", override)
    assert known_fingerprint(config) is None

"""Sums of two numbers, one a document."""

import random

import duo


@duo.dataset("sums", num_documents=2000, tokenizer_name_or_path="bytes")
def sums(config, split):
    draw = random.Random(split)
    for _ in range(config.data.num_documents):
        a, b = draw.randrange(100), draw.randrange(100)
        yield f"{a} + {b} = {a + b}. "

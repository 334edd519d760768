"""Small tokenizers of the kinds that there are, trained on a few words."""

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the cat sat on the mat and didn't see the dog; it's 1234 of 56,789 words.\n",
    "return value of the function, if not none: x_1 = f(y) + 3.14\n\n\tand so on\n",
    "слово за слово, der Fluß, niño, 你好世界。한국어 말 🙂 the end.\n",
] * 3
# The pattern of Llama 3 and of Qwen.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(core: Tokenizer, trainer: Any) -> Tokenizer:
    core.train_from_iterator(TEXTS, trainer)
    return core


def byte_level(inside: tuple[str, ...] = ()) -> Tokenizer:
    """Of GPT-2's kind."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return trained(core, _bpe(350, inside))


def by_pattern(inside: tuple[str, ...] = ()) -> Tokenizer:
    """Of Llama 3's kind, and of Qwen's, which normalises."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    return trained(core, _bpe(350, inside))


def _bpe(size: int, inside: tuple[str, ...]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(inside),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def sentence_pieces(normalised: bool) -> Tokenizer:
    """Of Llama 2's kind: blanks are letters of a BPE; a prefix comes from a normaliser
    or from the pre-tokenizer."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=specials, show_progress=False
    )
    trained(core, trainer)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if normalised:
        core.pre_tokenizer = None
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Metaspace()
    return core


def unigram(inside: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<mask>")) -> Tokenizer:
    """Of the kind of T5 and XLM-R, whose special tokens are entries like others."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=list(inside),
        unk_token="<unk>",
        show_progress=False,
    )
    return trained(core, trainer)


def word_pieces() -> Tokenizer:
    """Of BERT's kind."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=specials, show_progress=False
    )
    return trained(core, trainer)


def words() -> Tokenizer:
    """Whole words, the special tokens among them."""
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        special_tokens=["[UNK]", "[EOS]", "[MASK]"], show_progress=False
    )
    return trained(core, trainer)


def blanks_behind() -> Tokenizer:
    """Of Gemma's kind: a blank belongs to the word before it."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    return trained(core, trainer)


def across_words() -> Tokenizer:
    """A BPE whose tokens reach from word to word."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    return trained(core, trainer)


END = "<|endoftext|>"
# Name -> (core, special tokens behind the vocabulary, roles).
KINDS: dict[str, tuple[Callable[[], Tokenizer], tuple[str, ...], dict[str, str]]] = {
    "gpt2": (lambda: byte_level((END,)), (), {"bos": END, "eos": END, "unk": END}),
    "gpt2_with_pad": (
        lambda: byte_level((END,)),
        ("[PAD]",),
        {"bos": END, "eos": END, "pad": "[PAD]"},
    ),
    "gpt2_with_mask": (
        lambda: byte_level((END,)),
        ("[MASK]",),
        {"bos": END, "eos": END, "mask": "[MASK]"},
    ),
    "gpt2_with_mask_and_pad": (
        lambda: byte_level((END,)),
        ("[MASK]", "[PAD]"),
        {"bos": END, "eos": END, "mask": "[MASK]", "pad": "[PAD]"},
    ),
    "llama3": (by_pattern, ("<bos>", "<eos>"), {"bos": "<bos>", "eos": "<eos>"}),
    "qwen": (by_pattern, ("<eos>", "<pad>"), {"eos": "<eos>", "pad": "<pad>"}),
    "roberta": (
        lambda: byte_level(("<s>", "<pad>", "</s>", "<unk>")),
        ("<mask>",),
        {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"},
    ),
    "llama2": (
        lambda: sentence_pieces(True),
        (),
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "mistral": (
        lambda: sentence_pieces(False),
        (),
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "t5": (
        unigram,
        ("<extra 0>",),
        {"eos": "</s>", "bos": "<s>", "unk": "<unk>", "mask": "<mask>"},
    ),
    "bert": (
        word_pieces,
        (),
        {
            "cls": "[CLS]",
            "sep": "[SEP]",
            "pad": "[PAD]",
            "mask": "[MASK]",
            "unk": "[UNK]",
        },
    ),
    "words": (words, (), {"eos": "[EOS]", "mask": "[MASK]", "unk": "[UNK]"}),
    "gemma": (blanks_behind, (), {"eos": "<eos>", "unk": "<unk>"}),
    "across_words": (across_words, (), {"eos": "<eos>", "unk": "<unk>"}),
}


@functools.cache
def _core(name: str) -> str:
    return KINDS[name][0]().to_str()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of a kind."""
    _, behind, roles = KINDS[name]
    core = Tokenizer.from_str(_core(name))
    core.add_special_tokens([AddedToken(x, special=True) for x in behind])
    given: dict[str, Any] = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **given
    )

"""Local files in place of the published data sets, and which configs need which.

Real ones where the folder of small data sets is on this machine; else a few made up
sentences, so that a clone alone tests as much as it can.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted(
    path.stem
    for path in (ROOT / "configs" / "data").glob("*.yaml")
    if path.stem not in ("_base", "cifar10", "docstrings", "images", "text_files")
    and path.stem != "synthetic"
)
# Config -> folder of its files.
FOLDERS = {
    "ag_news": "ag_news/ag_news",
    "lambada": "lambada/lambada_openai",
    "lm1b": "lm1b/lm1b",
    "ptb": "ptb/ptb_text_only",
    "scientific_papers": "scientific_papers/scientific_papers",
    "text8": "text8/text8",
    "wikitext2": "wikitext2/wikitext",
}


def write_documents(folder: Path, num: int = 60) -> Path:
    """A folder with train, validation and test files, each with all columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = []
        for n in range(num):
            text = f"document {n} of the {split} set says : it is number {n} , again . "
            text = " ".join([text] * (1 + n % 4))
            lines.append(
                json.dumps(dict.fromkeys(("text", "sentence", "article"), text))
            )
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def tokenizer_of(config: str) -> list[str]:
    """Overrides: the folder of the published tokenizer, or bytes without it."""
    if config.startswith("text8"):
        return []
    is_bert = config.startswith("lm1b") and config != "lm1b-gpt2"
    folder = SHARED / ("bert-base-uncased" if is_bert else "gpt2")
    name = folder if folder.is_dir() else "bytes"
    return [f"data.tokenizer_name_or_path={name}"]


def stand_in(config: str, folder: Path) -> list[str]:
    """Overrides that give a data config local files, and its tokenizer.

    Args:
        config: Of configs/data.
        folder: For files that have to be written.
    """
    made = write_documents(folder / "documents")
    known = [name for name in FOLDERS if config.startswith(name)]
    real = [path for name in known if (path := SHARED / FOLDERS[name]).is_dir()]
    overrides = [f"data={config}", f"data.source={(real or [made])[0]}"]
    if config in ("openwebtext", "openwebtext-streaming"):
        overrides.append(f"data.valid_source={made}")
    if config == "fineweb-edu":  # validation is on the end of another set
        valid = write_documents(folder / "openwebtext", 50)
        overrides.append(f"data.valid_source={valid}")
    if config in ("openwebtext-split", "fineweb-edu"):
        overrides.append("data.valid_documents=20")
    return [*overrides, *tokenizer_of(config)]

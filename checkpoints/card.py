"""The model card of a folder that `mode=export` writes."""

import re
from collections.abc import Mapping
from typing import Any

from utils import printable

TOKENIZER = "data.tokenizer_name_or_path"

CARD = """\
---
library_name: transformers
{pipeline_tag}tags:
- discrete-diffusion
- {algorithm}
---

# Language model ({algorithm})

| | |
| --- | --- |
| algorithm | {algorithm}, {process} process |
| training data | {training_data} |
| training step | {step} |
| validation data | {validation_data} |
| validation perplexity | {val_ppl}{of_validations} |
| likelihood | {likelihood} |
| tokenizer | {tokenizer} |
| length | {model_length} tokens |
{blocks}| vocabulary | {vocab_size} |
| parameters | {parameters} |
| weights | {weights} |
| licence | to be filled in by who publishes this model |

## With transformers

No other package than torch is needed.

```python
import torch
from transformers import AutoTokenizer, {auto_model}

model = {auto_model}.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
ids = model.generate(num_samples=2, num_steps=128, seed=1)
print(tokenizer.batch_decode(ids))
logits = model(ids{timesteps}).logits  # raw, (B, L, K)
```
{about_timesteps}{about_blocks}{pipeline}
## With the code it was trained with

```bash
# Samples, the perplexity of your text, and further training on it.
python main.py mode=sample_eval eval.checkpoint_path=FOLDER
python main.py mode=ppl_eval data=text_files data.path='corpus/*.txt' eval.checkpoint_path=FOLDER
python main.py {settings} data=text_files data.path='corpus/*.txt' training.finetune_path=FOLDER
```
"""  # noqa: E501

ABOUT_TIMESTEPS = """
`timesteps` is the noise level -log(alpha_t) of each sequence, (B,), where alpha_t is
the share of tokens that are still clean.
"""

ABOUT_BLOCKS = """
Text is written in blocks of {block_size} tokens, each by diffusion given the clean ones
before it, whose keys and values are kept. There may be any number of blocks, and a text
may end at its first eos, behind which all is eos:

```python
ids = model.generate(
    num_samples=2, num_steps={block_size}, num_blocks={num_blocks}, stop_at_eos=True
)
```

A token sees its block and those before it. A pass with `use_cache=True` is over clean
blocks and is kept; any other leaves the cache as it is:

```python
from transformers import DynamicCache

cache = DynamicCache()
model(ids[:, :{block_size}], past_key_values=cache, use_cache=True)
block = ids[:, {block_size} : {twice}]
logits = model(block{timesteps}, past_key_values=cache).logits
```
"""

# The pipeline of `transformers` that these models work in, with its use.
PIPELINES = {
    "text-generation": """
```python
from transformers import pipeline

write = pipeline("text-generation", model="FOLDER", trust_remote_code=True)
start = write.tokenizer.bos_token + "Once upon a time"
print(write(start, max_new_tokens=50, do_sample=True))
```
""",
    "fill-mask": """
```python
from transformers import pipeline

fill = pipeline("fill-mask", model="FOLDER", trust_remote_code=True)
print(fill("Once upon a" + fill.tokenizer.mask_token))
```
""",
}


def _plain(value: Any) -> Any:
    """A text that may stand in a cell and between quotes."""
    if not isinstance(value, str):
        return value
    return re.sub(r'["`|<>\\]', " ", printable(value, keep=""))


def card(fields: Mapping[str, Any], num_parameters: int, has_mask: bool) -> str:
    """The model card of a folder.

    Args:
        fields: Its config.json.
        num_parameters: Of the network.
        has_mask: Whether the mask is a token of the tokenizer.
    """
    fields = {name: _plain(x) for name, x in fields.items()}
    shown = {name: "not stated" if x is None else x for name, x in fields.items()}
    (auto_model,) = fields["auto_map"].keys() - {"AutoConfig", "AutoModel"}
    causal, timed = (
        fields["causal"],
        fields["time_conditioning"] and not fields["causal"],
    )
    pipeline = "text-generation" if causal else "fill-mask" if has_mask else None
    backbone = f"algo={fields['algorithm']} algo.backbone=hf_dit"
    length, tokenizer = fields["model_length"], fields["tokenizer"]
    name = tokenizer or "FOLDER"
    told = ", timesteps=torch.ones(2)" if timed else ""
    blocks = _of_blocks(fields.get("block_size"), length, told)
    settings = f"{backbone}{blocks.pop('setting')}"
    return CARD.format(
        **shown | {"tokenizer": tokenizer or "beside this file"},
        parameters=f"{num_parameters:,}",
        auto_model=auto_model,
        pipeline_tag=f"pipeline_tag: {pipeline}\n" if pipeline else "",
        pipeline=PIPELINES[pipeline] if pipeline else "",
        of_validations=", the lowest of its run" if fields["val_ppl"] else "",
        timesteps=told,
        about_timesteps=ABOUT_TIMESTEPS if timed else "",
        settings=f"{settings} model.length={length} {TOKENIZER}={name}",
        **blocks,
    )


def _of_blocks(size: int | None, length: int, told: str) -> dict[str, str]:
    """What there is to say of blocks: a row of the table, a setting, and the calls."""
    if size is None:
        return {"blocks": "", "setting": "", "about_blocks": ""}
    calls = ABOUT_BLOCKS.format(
        block_size=size,
        twice=2 * size,
        num_blocks=2 * length // size,  # beyond the length
        timesteps=told,
    )
    return {
        "blocks": f"| blocks | of {size} tokens |\n",
        "setting": f" algo.block_size={size}",
        "about_blocks": calls if size < length else "",  # one block has none before it
    }

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
| vocabulary | {vocab_size} |
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
{about_timesteps}{pipeline}
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
    return CARD.format(
        **shown | {"tokenizer": tokenizer or "beside this file"},
        parameters=f"{num_parameters:,}",
        auto_model=auto_model,
        pipeline_tag=f"pipeline_tag: {pipeline}\n" if pipeline else "",
        pipeline=PIPELINES[pipeline] if pipeline else "",
        of_validations=", the lowest of its run" if fields["val_ppl"] else "",
        timesteps=", timesteps=torch.ones(2)" if timed else "",
        about_timesteps=ABOUT_TIMESTEPS if timed else "",
        settings=f"{backbone} model.length={length} {TOKENIZER}={name}",
    )

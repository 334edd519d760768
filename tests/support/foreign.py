"""Loads exported folders as somebody does who has torch, transformers and safetensors.

    python -I foreign.py inputs.json outputs.safetensors

Isolated, so that nothing of this repository can be imported. An input is a folder with
an auto class, ids, timesteps and arguments of `generate`; outputs are named by folder.
"""

import importlib.util
import json
import sys

import torch
import transformers
from safetensors.torch import save_file


def main(inputs: str, outputs: str) -> None:
    for name in ("hub", "models", "checkpoints", "flash_attn"):
        assert importlib.util.find_spec(name) is None, name
    torch.set_num_threads(1)
    with open(inputs) as file:
        jobs = json.load(file)
    found = {}
    for name, job in jobs.items():
        auto = getattr(transformers, job["auto_class"])
        model = auto.from_pretrained(job["folder"], trust_remote_code=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            job["folder"], trust_remote_code=True
        )
        ids, sigma = torch.tensor(job["ids"]), torch.tensor(job["timesteps"])
        with torch.no_grad():
            out = model(ids, timesteps=sigma, output_hidden_states=True)
            (logits,) = model(ids, sigma, return_dict=False)
            half = model.to(torch.bfloat16)(ids, sigma).logits
            model = auto.from_pretrained(job["folder"], trust_remote_code=True)
            samples = model.generate(**job["generate"])
        if job["template"] is not None:
            template = torch.tensor(job["template"])
            given = model.generate(**job["generate"], template=template)
            found[f"{name}.given"] = given
        tokens = torch.tensor(tokenizer(job["text"])["input_ids"])
        found |= {
            f"{name}.logits": logits,
            f"{name}.same": (logits - out.logits).abs().max()[None],
            f"{name}.states": torch.tensor([len(out.hidden_states)]),
            f"{name}.half": half.float(),
            f"{name}.samples": samples,
            f"{name}.tokens": tokens,
        }
    save_file({k: x.contiguous() for k, x in found.items()}, outputs)
    sys.stdout.write(f"transformers {transformers.__version__}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

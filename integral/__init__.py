"""The diffusion transformation operator of DUO (arXiv:2506.10892).

The argmax of a Gaussian-diffused one-hot vector is a uniform-state diffusion; the
operator gives that diffusion's signal level alpha_t. `transform.py` has the operator
itself, `approximations.py` its closed-form stand-ins, `tables.py` tables in files, and
`registry.py` says which one `algo.curriculum.mode` names.

`python utils.py --vocab_size=N` (or `python -m integral`) writes tables and suggests a
range of gamma for a tokenizer.
"""

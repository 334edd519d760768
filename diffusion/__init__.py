"""Forward processes and the negative ELBO's skeleton; objectives are in `algo.py`."""

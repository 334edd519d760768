"""`report.table=operator`: the diffusion transformation operator of DUO, drawn."""

import numpy as np
from omegaconf import DictConfig, OmegaConf

from integral.transform import SUGGESTED_ALPHA, quadrature, suggest_gammas
from report.curves import POINTS, Curves, Panel

# Tokens of uniform-state models, by tokenizer.
VOCABULARIES = {"text8": 35, "bytes": 260, "BERT": 30_522, "GPT-2": 50_258}
GAMMAS = (-6.0, 2.0)  # that are drawn


def operator(config: DictConfig) -> Curves:
    """alpha = T(gauss_alpha) of a Gaussian latent, and its curve over gamma.

        alpha = (K P - 1) / (K - 1),  gauss_alpha^2 = sigmoid(-gamma)

    Args:
        config: The run's config; with algo=duo the table has its range of gamma, too.

    Reference: DUO (arXiv:2506.10892), the diffusion transformation operator.
    """
    gamma = np.linspace(*GAMMAS, POINTS)
    gauss_alpha = np.sqrt(1 / (1 + np.exp(gamma)))
    by_signal, by_gamma = {}, {}
    lines = []
    chosen = OmegaConf.select(config, "algo.curriculum")
    ends = [chosen.gamma_min, chosen.gamma_max] if chosen is not None else []
    ends = [x for x in ends if x != "auto"]
    for tokenizer, K in VOCABULARIES.items():
        name = f"{tokenizer}, K = {K}"
        P, _ = quadrature(gamma, K)
        alpha = (K * P - 1) / (K - 1)
        by_signal[name] = gauss_alpha.tolist(), alpha.tolist()
        by_gamma[name] = gamma.tolist(), alpha.tolist()
        line = [tokenizer, str(K), *(f"{x:.3f}" for x in suggest_gammas(K))]
        levels = quadrature(np.array(ends, float), K)[0]
        lines.append([*line, *(f"{(K * x - 1) / (K - 1):.4f}" for x in levels)])
    low, high = SUGGESTED_ALPHA
    clean = "alpha (probability of a clean token)"
    return Curves(
        "the operator of DUO",
        "alpha: the discrete signal level of a Gaussian latent of K tokens",
        [
            Panel("gauss_alpha (signal level of the latent)", clean, by_signal),
            Panel("gamma (log of noise to signal)", clean, by_gamma),
        ],
        [
            *("tokenizer", "K", f"gamma at {high}", f"gamma at {low}"),
            *(f"alpha at gamma = {x:g}" for x in ends),
        ],
        lines,
        [
            f"gamma at {high} and at {low}: where alpha is that, which is the range of "
            "algo.curriculum.gamma_min=auto and gamma_max=auto; alpha at gamma: at the "
            "ends that algo=duo gives."
        ],
    )

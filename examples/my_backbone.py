"""A network of convolutions along the sequence."""

import torch.nn.functional as F
from torch import nn

import duo
from models.dit import Embedding, NoiseEmbedding
from models.network import Network


@duo.backbone("convolution", hidden_size=64, n_blocks=4, kernel_size=7, dropout=0.1)
class Convolution(Network):
    """Residual blocks, each of which mixes `model.kernel_size` neighbours."""

    def __init__(self, vocab_size, hidden_size, n_blocks, kernel_size, dropout):
        super().__init__()
        self.vocab_embed = Embedding(vocab_size, hidden_size)
        self.sigma_map = NoiseEmbedding(hidden_size)
        self.blocks = nn.ModuleList(
            nn.Conv1d(hidden_size, hidden_size, kernel_size, padding="same")
            for _ in range(n_blocks)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)
        self.output_embedding = nn.Linear(hidden_size, vocab_size)

    @classmethod
    def from_config(cls, config, vocab_size):
        model = config.model
        return cls(
            vocab_size,
            model.hidden_size,
            model.n_blocks,
            model.kernel_size,
            model.dropout,
        )

    def trunk(self, x, sigma=None):
        """Hidden states (B, L, D) of ids (B, L) at noise levels (B,)."""
        h = (self.vocab_embed(x) + self.sigma_map(sigma)[:, None]).mT
        for block in self.blocks:
            h = h + self.dropout(F.gelu(block(h)))
        return self.norm(h.mT)

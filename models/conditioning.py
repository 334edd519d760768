"""What networks are told beside the noise level: the class of each sample."""

import torch
from torch import Tensor, nn


class ClassEmbedding(nn.Module):
    """Adds the embedding of a class to another one; one row more is for "no class".

    Args:
        num_classes: Of labels, 0 .. num_classes - 1; the label num_classes is none.
        width: E, of the embedding.
        adds_null_class: What no labels at all mean: True, no class of any sample.
            NOTE(compat): the published code then adds nothing.
        std: Of the rows at the start.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        adds_null_class: bool = True,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.adds_null_class = adds_null_class
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=std)

    def forward(self, embedding: Tensor, labels: Tensor | None) -> Tensor:
        """The sum, (B, E).

        Args:
            embedding: (B, E).
            labels: (B,) or None.
        """
        if labels is None:
            if not self.adds_null_class:
                return embedding
            labels = torch.full(
                embedding.shape[:1], self.num_classes, device=embedding.device
            )
        return embedding + self.embedding_table(labels)

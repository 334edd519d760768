"""One teacher, several objectives: students that need fewer steps than it."""

from distillation.dcd import Distillation
from distillation.sdtt import SDTT

__all__ = ["SDTT", "Distillation"]

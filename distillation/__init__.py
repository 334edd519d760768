"""One teacher, several objectives: students that need fewer steps than it."""

from distillation.dcd import Distillation
from distillation.dimo import DiMO
from distillation.sdtt import SDTT

__all__ = ["SDTT", "DiMO", "Distillation"]

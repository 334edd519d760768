"""One teacher, several objectives: students that need fewer steps than it."""

from distillation.dcd import Distillation

__all__ = ["Distillation"]

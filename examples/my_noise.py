import duo
from models.noise import Noise, NoiseLevel


@duo.schedule("power", power=2.0)
class Power(Noise):
    """alpha_t = 1 - (1 - eps) t^power."""

    def __init__(self, power: float, eps: float = 1e-3) -> None:
        super().__init__(eps)
        self.power = power

    def forward(self, t):
        scale = 1 - self.eps
        return NoiseLevel(
            alpha_t=1 - scale * t**self.power,
            dalpha_t=-scale * self.power * t ** (self.power - 1),
        )

    def inverse(self, alpha_t):
        return ((1 - alpha_t) / (1 - self.eps)) ** (1 / self.power)

import duo
from sampling.predictors import Ancestral


@duo.sampler("power_grid", exponent=2.0)
class PowerGrid(Ancestral):
    """`Ancestral` whose steps become smaller towards t = 0."""

    def __init__(self, config, compat="paper"):
        super().__init__(config, compat)
        self.exponent = config.power_grid.exponent

    def time_grid(self, noise, num_steps):
        return super().time_grid(noise, num_steps) ** self.exponent

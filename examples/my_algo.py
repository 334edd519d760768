import duo
from algo import MDLM


@duo.algorithm("bounded", extends="mdlm", max_weight=10)
class BoundedMDLM(MDLM):
    """MDLM whose loss weight stays below algo.max_weight near t = 0."""

    def nll_per_token(self, log_x_theta, *, xt, x0, alpha_t, dalpha_t):
        bound = self.config.algo.max_weight * (1 - alpha_t)
        return super().nll_per_token(
            log_x_theta,
            xt=xt,
            x0=x0,
            alpha_t=alpha_t,
            dalpha_t=dalpha_t.clamp(min=-bound),
        )

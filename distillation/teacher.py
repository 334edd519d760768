"""The teacher of a distillation: where its weights live, and how a run that goes on has
it again; and when a round with a new teacher begins.
"""

import copy
import hashlib
import posixpath
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import key_report
from checkpoints.reading import read_checkpoint
from models.head import Head
from models.network import Network
from models.shards import split_as, whole
from training.resume import KEY, TEACHER_PREFIX
from utils import ConfigError, copy_file, path_exists, require

# ---------------------------------------------------------------- rounds


class RoundCounter(Protocol):
    """In which round a step lies; every round has a teacher of its own."""

    def number(self, step: int) -> int:
        """The round of a step, from 0."""

    def start(self, number: int) -> int:
        """The first step of a round."""


class Rounds:
    """Time gap dt and round of the teacher, by step.

        n = step // update_teacher_every,  dt = 2^n / T

    as long as dt <= 1; training stays in the last such round. With linear growth dt
    goes from linear_growth_min to linear_growth_max over trainer.max_steps.
    """

    def __init__(self, config: DictConfig) -> None:
        self.T: int = config.algo.T
        self.length: int = config.algo.update_teacher_every
        self.is_linear: bool = config.algo.linear_growth_dt
        self.bounds = config.algo.linear_growth_min, config.algo.linear_growth_max
        self.max_steps: int = config.trainer.max_steps
        self.last = None if self.is_linear else self.T.bit_length() - 1

    @staticmethod
    def validate_config(config: DictConfig) -> None:
        """Refuses gaps that are none."""
        algo = config.algo
        require(algo.linear_growth_dt, (True, False), "algo.linear_growth_dt")
        if not algo.linear_growth_dt and algo.T < 1:
            raise ConfigError(f"algo.T={algo.T}: the first time gap is 1 / T; T >= 1.")
        low, high = algo.linear_growth_min, algo.linear_growth_max
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"algo.linear_growth_min={low}, algo.linear_growth_max={high}: the "
                "time gap must grow within (0, 1]."
            )

    def number(self, step: int) -> int:
        """n, from 0."""
        number = step // self.length
        return number if self.last is None else min(number, self.last)

    def start(self, number: int) -> int:
        """The first step of a round."""
        return number * self.length

    def gap(self, step: int) -> float:
        """dt, in (0, 1]."""
        if self.is_linear:
            low, high = self.bounds
            return min(low + step / self.max_steps * (high - low), high)
        return 2 ** self.number(step) / self.T


# ---------------------------------------------------------------- the network


class Teacher:
    """The network that a student learns from: the student's own with other weights.

    It is never trained. No state dict and no list of the student's parameters has its
    weights: optimiser, EMA, DDP and checkpoints of the student do not see them. What a
    checkpoint of the student says of the teacher is `state`: its round and a
    fingerprint. The weights themselves are in a file of each round, round_N.ckpt, which
    is a checkpoint of the student as it was when the round began.

    Weights are taken over from a state dict (`take`) or from a checkpoint, whichever
    run has written it (`take_checkpoint`).

    Args:
        student: The student's network, which is copied with the first weights.
        config: The run's config: where its files are, and whether it compiles networks.
        use_ema: Whether the EMA weights of a checkpoint are the teacher's, and not the
            raw ones.
        is_wide: Whether it computes in float32 in any run, as the published code of
            DCD; or else in the precision of the run.
    """

    def __init__(
        self,
        student: Network,
        config: DictConfig,
        *,
        use_ema: bool = False,
        is_wide: bool = True,
    ) -> None:
        self.use_ema = use_ema
        self.is_wide = is_wide
        self.round: int | None = None
        self._student = student
        self._config = config
        self._network: Network | None = None
        self._sha256 = ""
        self._expected_sha256 = ""  # in the checkpoint from which the run goes on

    @property
    def is_there(self) -> bool:
        """Whether it has weights."""
        return self._network is not None and self.round is not None

    @property
    def network(self) -> Network:
        """The network, in evaluation mode; a RuntimeError if it has no weights yet."""
        if self._network is None or self.round is None:
            raise RuntimeError("the teacher has no weights yet")
        return self._network

    @torch.no_grad()
    def head(self, ids: Tensor, condition: Tensor | None = None) -> Head:
        """Hidden states (B, L, D) with the head; its weights are as they are.

        Args:
            ids: What the teacher sees, (B, L).
            condition: What its network is told of the noise, as the student's is.
        """
        device = ids.device.type
        in_run = not self.is_wide and torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=in_run):
            hidden = self.network.trunk(ids, condition)
        return self.network.head_of(hidden)

    def move(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Takes it along to another device or type, as `nn.Module._apply` does."""
        if self._network is not None:
            self._network._apply(fn, recurse)

    # ---- where its weights come from

    def take(self, weights: Mapping[str, Tensor], number: int) -> None:
        """Makes weights of the student's network those of the teacher of a round."""
        network = self.prepared()
        own = network.state_dict()
        network.load_state_dict({k: split_as(x, own[k]) for k, x in weights.items()})
        self.round, self._sha256 = number, weights_digest(network)

    def prepared(self) -> Network:
        """Its network, whose weights have no meaning before it is given some.

        Weights may be split over processes: before those of the student are, since
        it is a copy of the student's network, and a split one cannot be copied.
        """
        if self._network is None:
            network = copy.deepcopy(self._student)  # draws nothing, unlike a new one
            if self._config.training.compile:
                network.compile_blocks()
            network.half_parts &= not self.is_wide
            self._network = network.eval().requires_grad_(False)
        return self._network

    def take_checkpoint(self, checkpoint: Checkpoint, number: int, where: str) -> None:
        """Makes the weights of a checkpoint those of the teacher of a round.

        Args:
            checkpoint: Of a network like the student's.
            number: The round.
            where: What the checkpoint is called in messages.

        Raises:
            ConfigError: If it does not fit the student's network, has no EMA weights
                where those are asked for, or has other weights than the teacher of the
                run that goes on.
        """
        prefix = "backbone."
        weights = {
            name.removeprefix(prefix): value
            for name, value in (checkpoint.weights or {}).items()
            if name.startswith(prefix)
        }
        key_report(self._student, weights).raise_if_any(where)
        if self.use_ema:
            parameters = list(self._student.parameters())
            shadow = (checkpoint.ema or {}).get("shadow_params", ())
            if len(parameters) != len(shadow):
                raise ConfigError(
                    f"{where} has no EMA weights of this network, which its teacher "
                    "takes; give a checkpoint that has them."
                )
            averages = dict(zip(parameters, shadow, strict=True))
            every = self._student.named_parameters(remove_duplicate=False)
            weights |= {name: averages[parameter] for name, parameter in every}
            key_report(self._student, weights).raise_if_any(where)
        self.take(weights, number)
        if self._expected_sha256 not in ("", self._sha256):
            self.round = None
            raise ConfigError(f"{where} is not the teacher of the run that is resumed.")

    # ---- files of its rounds

    def path(self, number: int) -> str:
        """The file of a round."""
        folder = f"{self._config.checkpointing.save_dir}/checkpoints"
        return f"{folder}/{TEACHER_PREFIX}{number}.ckpt"

    def write(self, trainer: lightning.Trainer) -> None:
        """Writes the file of its round; all ranks call this when the round begins.

        Args:
            trainer: Of the student, whose weights are the teacher's now.
        """
        if self.round is None:
            raise RuntimeError("the teacher has no weights yet")
        trainer.save_checkpoint(self.path(self.round), weights_only=True)

    def restore(self, number: int) -> None:
        """Reads the teacher of a round in which a run was interrupted.

        The file is that of this run, or else the one beside the checkpoint from which
        the run goes on, which is then copied.

        Args:
            number: The round.

        Raises:
            ConfigError: If there is no such file, or it is not the teacher's.
        """
        if number == self.round:
            return
        checkpointing, own = self._config.checkpointing, self.path(number)
        beside = posixpath.dirname(checkpointing.resume_ckpt_path)
        places = [own, posixpath.join(beside, posixpath.basename(own))]
        path = next((path for path in places if path_exists(path)), None)
        if path is None:
            raise ConfigError(
                f"{KEY}: a run that goes on within a round of distillation needs the "
                f"teacher of round {number}, {own}, which is not there."
            )
        checkpoint = read_checkpoint(path, KEY, checkpointing.trusted_classes)
        self.take_checkpoint(checkpoint, number, f"{KEY}: {path}")
        if path != own:
            rank_zero_only(copy_file)(path, own)

    # ---- what the student's checkpoints say of it

    def state(self) -> dict[str, Any]:
        """Its round and the fingerprint of its weights, as plain data."""
        return {"round": self.round, "sha256": self._sha256}

    def expect(self, state: Mapping[str, Any]) -> None:
        """Notes a `state`: weights that are read from now on must be those.

        Args:
            state: Of the checkpoint from which a run goes on; empty if it has none.
        """
        self._expected_sha256 = state.get("sha256", "")


def weights_digest(network: nn.Module) -> str:
    """A fingerprint of a network's weights."""
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(name.encode())
        data = whole(value).cpu().contiguous()
        total.update(data.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()

"""Finds golden cases and compares numbers with them.

A case is a folder with `case.json` (config, values, tolerances, what each tensor
means) and mostly `tensors.safetensors`. Cases are found by the kind at the front of
their names and by what they hold, never by a full name, and all sizes come from
`case.json`: other sets of such cases run through the same tests.
"""

import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "golden" / "cases"  # a part of the cases, in every clone
FORWARD = {"rtol": 1e-5, "atol": 1e-5}  # float32 network, where a case states nothing
EXACT = {"rtol": 0.0, "atol": 0.0}


def golden_dir() -> Path:
    """The folder of cases: `GOLDEN_DIR`, which may be relative to the repository, if
    it is set; else `../shared/golden`, if that exists; else `tests/golden/cases`."""
    if named := os.environ.get("GOLDEN_DIR"):
        return ROOT / named
    fuller = ROOT.parent / "shared" / "golden"
    return fuller if fuller.is_dir() else COMMITTED


class Case:
    """One golden case.

    Args:
        folder: Holds `case.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        with open(folder / "case.json") as file:
            self.info: dict[str, Any] = json.load(file)
        self.values: dict[str, Any] = self.info.get("values", {})
        self.stated: dict[str, Any] = self.info.get("tensors", {})

    def __repr__(self) -> str:
        return self.name

    @property
    def config(self) -> DictConfig:
        """The reference's settings, a fresh copy."""
        return OmegaConf.create(self.info.get("config", {}))

    def setting(self, key: str, default: Any = None) -> Any:
        """The value that the case's config states for a dotted key, or `default`."""
        return OmegaConf.select(self.config, key, default=default)

    def holds(self, name: str) -> bool:
        """Whether it has a tensor, a group of tensors ('weights/*') or a value."""
        return name in self.stated or name in self.values

    # ---- tensors

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with `prefix`, under the rest of their names."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def meaning(self, name: str) -> str:
        return self.stated[name]["meaning"]

    # ---- tolerances

    def tolerance(
        self, name: str, default: dict[str, float] | None = None
    ) -> dict[str, float]:
        """rtol and atol that the case states for a tensor or a value.

        The case maps patterns, several of them joined by commas, or names of types
        to sentences such as 'atol 1e-6, rtol 1e-4 (float32)' or 'exact'.
        """
        kind = self.stated.get(name, {}).get("dtype")
        parts = {name, name.split("/")[0], name.split("/")[-1]}
        fitting = [
            (key, text)
            for keys, text in self.info["tolerance"].items()
            for key in (key.strip() for key in keys.split(","))
            if key == kind or any(fnmatchcase(part, key) for part in parts)
        ]
        if not fitting:
            assert default is not None, f"{self}: no tolerance is stated for {name}"
            return default
        # Of several, the most special one: a name before a pattern, then the longest.
        _, text = max(fitting, key=lambda item: ("*" not in item[0], len(item[0])))
        return parse_tolerance(text)

    def check(
        self,
        name: str,
        ours: Tensor,
        *,
        factor: float = 1.0,
        rows: Tensor | None = None,
        default: dict[str, float] | None = None,
    ) -> None:
        """Compares `ours` with a recorded tensor, to the tolerance that is stated.

        Args:
            name: Of the recorded tensor.
            ours: Our numbers.
            factor: Known error of the reference: `ours` must be golden * factor.
            rows: Mask of the rows to compare; default all.
            default: Tolerance if the case states none.
        """
        golden = self[name]
        if rows is not None:
            golden, ours = golden[rows], ours[rows]
        limits = self.tolerance(name, default)
        if "grad" in name and "atol" not in limits:
            # A gradient entry is a sum with cancellation: its rounding error goes
            # with the tensor's size, not its own.
            limits = limits | {
                "atol": 1e-2 * limits["rtol"] * float(golden.abs().max())
            }
        close(ours, golden.to(torch.float64) * factor, f"{self}: {name}", **limits)


def parse_tolerance(text: str) -> dict[str, float]:
    """'rtol 1e-4, atol 1e-5 (...)' -> {'rtol': 1e-4, 'atol': 1e-5}; 'exact' -> 0."""
    found = dict(re.findall(r"\b([ar]tol) (\d[\d.]*(?:e-?\d+)?)", text))
    if not found:
        assert text.startswith("exact"), f"a tolerance that is not understood: {text!r}"
        return EXACT
    return {kind: float(number) for kind, number in found.items()}


def approx(golden: float, limits: dict[str, float]) -> Any:
    """A recorded number with its tolerance, to be compared with ours by `==`."""
    return pytest.approx(golden, rel=limits.get("rtol", 0), abs=limits.get("atol", 0))


def close(
    ours: Tensor, golden: Tensor, what: str, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Compares values of equal shape; the type is the caller's business."""
    torch.testing.assert_close(
        ours.detach().to(torch.float64),
        golden.to(torch.float64),
        rtol=rtol,
        atol=atol,
        msg=lambda text: f"{what}\n{text}",
    )


# ---------------------------------------------------------------- discovery


def find_cases(folder: Path, kind: str = "", holding: str = "") -> list[Case]:
    """Cases whose names start with `kind`, sorted by name.

    Args:
        folder: Of the cases; it need not exist.
        kind: Front of the name, such as 'dit' or 'optim'.
        holding: Tensor, group of tensors or value that the case must have.
    """
    files = sorted(folder.glob(f"{kind}*/case.json"))
    cases = [Case(file.parent) for file in files]
    return [case for case in cases if not holding or case.holds(holding)]


def parameters(cases: list[Case], what: str, folder: Path | None = None) -> list[Any]:
    """Arguments of `parametrize`: a case each, or one skip that says why."""
    folder = golden_dir() if folder is None else folder
    if cases:
        return [pytest.param(case, id=case.name) for case in cases]
    reason = f"no golden case of kind {what} in {folder}"
    if not folder.is_dir():
        reason = f"GOLDEN_DIR: there is no folder {folder}, so no golden cases"
    return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]


def for_cases(
    kind: str, holding: str = "", where: Callable[[Case], bool] = lambda case: True
) -> pytest.MarkDecorator:
    """Runs a test once for each case of a kind; see `find_cases`.

    Args:
        kind, holding: As for `find_cases`.
        where: What else the case must be like.
    """
    cases = [case for case in find_cases(golden_dir(), kind, holding) if where(case)]
    what = f"{kind}* with {holding}" if holding else f"{kind}*"
    return pytest.mark.parametrize("case", parameters(cases, what))

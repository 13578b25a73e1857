"""Progress and warnings on stderr: one bar at a time, with what the solver is doing and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from ..control import Progress


class Meter:
    """Shows how far a run is, and clears the line at the end. Silent if stderr is not a terminal, or `quiet`."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._bar: tqdm | None = None
        self._key = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def bytes(self, progress: Progress) -> None:
        """A file being read or written."""
        self._show(progress.phase, progress.step, progress.total, unit="B", unit_scale=True)

    def encoding(self, progress: Progress) -> None:
        """Given frames passing through the VAE."""
        self._show(progress.phase, progress.step, progress.total, unit="frame")

    def preparing(self, progress: Progress) -> None:
        """Files, windows and prompts that become data to learn from."""
        unit = {"read": "file", "encode": "window", "text": "prompt"}.get(progress.phase, "sample")
        self._show(progress.phase, progress.step, progress.total, unit=unit)

    def sampling(self, frames: int) -> SamplingBar:
        """For one job that makes this many frames."""
        return SamplingBar(self._show, frames)

    def warn(self, message: str) -> None:
        """A warning, above the bar."""
        self.close()
        warn(message)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._key = None

    def _show(self, key: str, done: int, total: int, phase: str = "", note: str = "", **style) -> None:
        if (key, total) != self._key:
            self.close()
            self._key = (key, total)
            shown = {"disable": self._quiet or None, "leave": False, "dynamic_ncols": True}
            self._bar = tqdm(total=total, initial=done, **shown, **style)
        self._bar.set_description_str(phase or key, refresh=False)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


class SamplingBar:
    """A bar for the deep block's tokens, then one for the frames still to come. Other work (shallow
    blocks, denoiser, VAE) is named, but has no bar of its own."""

    def __init__(self, show: Callable, frames: int):
        self._show, self._frames = show, frames
        self._deep = Progress("deep", 0, 1, tokens=1)
        self.written = self.sweeps = 0

    def __call__(self, progress: Progress) -> None:
        """What the core reports."""
        if progress.phase == "deep":
            self._deep = progress
            self.sweeps += 1
        self._draw(progress.phase, progress.residual)

    def wrote(self, frames: int) -> None:
        """This many more frames have left the VAE."""
        self.written += frames
        self._draw("decode", 0.0)

    def _draw(self, phase: str, residual: float) -> None:
        state = [f"residual {residual:.0e}"] if residual else []
        if self._deep.settled < self._deep.tokens or not self.sweeps:
            state += [f"{self.sweeps} sweeps", f"{self.written}/{self._frames} frames"]
            self._show("tokens", self._deep.settled, self._deep.tokens, f"{phase:>7}", ", ".join(state), unit="token")
        else:
            self._show("frames", self.written, self._frames, f"{phase:>7}", ", ".join(state), unit="frame")


def warn(message: str) -> None:
    print("warning:", message, file=sys.stderr)

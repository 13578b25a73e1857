"""Trains the demo model from scratch: `python -m starflow_core.training`.

Stages (VAE, bank of encoded clips, flow with text encoder, denoiser) resume where they stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ...bundled import BUNDLED
from ...cli.arguments import whole
from ...model.placement import pick_device
from ...weights.tensorfiles import DTYPES
from ..files import make_folder
from ..loop import Loop
from .bank import make_banks
from .bundle import write_bundle
from .flow import demo_config, train_denoiser, train_flow
from .tokenizer import build_tokenizer
from .vae import train_vae


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m starflow_core.training", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="folder for states that can be resumed (default: runs)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=BUNDLED,
        help="folder for the finished files (default: the bundled demo's, which is replaced)",
    )
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the matrix products")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the schedule, to try things out")
    options = parser.parse_args()
    if not 0 < options.scale <= 100:
        parser.error(f"--scale is {options.scale}: expected a number above 0, up to 100")
    if not 0 <= options.seed < 1 << 63:
        parser.error(f"--seed is {options.seed}: expected 0 to {(1 << 63) - 1}")
    if options.scale != 1 and options.output == BUNDLED:
        parser.error("a shortened schedule would replace the shipped demo; give --output")
    for folder in (options.work, options.output):
        make_folder(folder)
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"{(time.monotonic() - began) / 60:6.1f} min  {line}", flush=True)

    device = pick_device(options.device)
    train_demo(Loop(options.work, device, DTYPES[options.dtype], options.seed, options.scale, log=log), options.output)


def train_demo(loop: Loop, output: Path) -> None:
    """All stages, and the finished files in `output`."""
    vae = train_vae(loop).eval()
    banks = make_banks(vae, loop)
    model = train_flow(loop, demo_config(vae), banks, build_tokenizer(loop.folder))
    train_denoiser(loop, model, banks)
    write_bundle(output, vae, model, banks)
    loop.log(f"wrote {output}")

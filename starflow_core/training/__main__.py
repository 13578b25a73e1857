"""Trains the demo model from nothing: `python -m starflow_core.training`.

Stages (VAE, bank of encoded clips, flow with text encoder, denoiser) resume where they stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..bundled import BUNDLED
from ..model.placement import pick_device
from ..weights.tensorfiles import DTYPES
from .demo import bank, bundle, flow, vae
from .demo.tokenizer import build_tokenizer
from .loop import Loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m starflow_core.training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for states that can be resumed")
    parser.add_argument("--output", type=Path, default=BUNDLED, help="folder for the finished files")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the schedule, to try things out")
    options = parser.parse_args()
    if options.scale != 1 and options.output == BUNDLED:
        parser.error("a shortened schedule would replace the shipped demo; give --output")
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"{(time.monotonic() - began) / 60:6.1f} min  {line}", flush=True)

    device = pick_device(options.device)
    loop = Loop(options.work, device, DTYPES[options.dtype], options.seed, options.scale, log=log)
    module = vae.train(loop).eval()
    banks = bank.make(module, loop)
    tokenizer = build_tokenizer(options.work)
    model = flow.train_flow(loop, flow.demo_config(module), banks, tokenizer)
    flow.train_denoiser(loop, model, banks)
    bundle.write(options.output, module, model, banks)
    log(f"wrote {options.output}")


if __name__ == "__main__":
    main()

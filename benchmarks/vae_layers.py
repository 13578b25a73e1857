"""What the VAE gains from layers of our own on a machine's CPU: `python -m benchmarks.vae_layers`

The bundled VAE as diffusers builds it, and as `load_vae` does, take turns at encoding and decoding one clip. It
counts CPU seconds, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKLWan

from benchmarks.report import write_json
from starflow_core.bundled import BUNDLED, VAE_FILE
from starflow_core.model.vae.codec import VAE
from starflow_core.weights.vae import load_vae


@torch.no_grad()
def measure(frames: int, side: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, their ratio, and the largest difference of a pixel in [-1, 1]."""
    ours = load_vae(BUNDLED / VAE_FILE)
    module = AutoencoderKLWan.from_config(ours.module.config)
    module.load_state_dict(ours.module.state_dict())
    vaes = {"diffusers": VAE(module.eval()), "ours": ours}
    pixels = torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ours.encode(pixels)
    seconds = {(name, task): [] for name in vaes for task in ("encode", "decode")}
    for _ in range(rounds):
        for name, vae in vaes.items():
            seconds[name, "encode"].append(_timed(lambda vae=vae: vae.encode(pixels)))
            seconds[name, "decode"].append(_timed(lambda vae=vae: vae.decode(latents)))
    found = {f"{task} {name}": median(times) for (name, task), times in seconds.items()}
    for task in ("encode", "decode"):
        found[f"{task} ratio"] = found[f"{task} diffusers"] / found[f"{task} ours"]
    found["difference"] = float((vaes["diffusers"].decode(latents) - ours.decode(latents)).abs().max())
    return found


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options.frames, options.side, options.rounds)
    for name, value in results.items():
        print(f"{name:18} {value:.3g}")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()

"""What should the learned denoiser see in the overlap of its chunks? `python -m benchmarks.overlap`

A clip longer than the window is denoised in chunks. This compares the two readings of the frames
that a chunk shares with the last one, as they were sampled ("noisy", ours) or denoised already (the
reference's), on drawn clips whose noise is known. Error is that of the denoised latents against the
clean ones, relative to the noise that was added, over the frames of later chunks.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from benchmarks.report import write_json
from starflow_core.jobs.context import later_factors
from starflow_core.model.latent import to_flow_space
from starflow_core.pipeline import load_pipeline
from starflow_core.solve.denoising import denoise
from starflow_core.training.demo import clips


@torch.no_grad()
def measure(count: int, latent_frames: int) -> dict[str, float]:
    pipeline = load_pipeline()
    flow, config = pipeline.flow, pipeline.config
    rng = random.Random(3)
    scenes = [clips.random_scene(rng, 96, 96) for _ in range(count)]
    frames = config.latent.frames(latent_frames)
    job = pipeline.job(height=96, width=96, frames=frames, batch=count)
    captions = [clips.caption(scene, rng) for scene in scenes]
    text, _, _ = pipeline.encode_text(captions, "", job)
    latents = pipeline.vae.encode(clips.render(scenes, frames, 96, 96))
    clean = to_flow_space(config.latent, latents, later_factors(config, "text", 0, latent_frames))
    noise = config.noise_std * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    later = slice(config.window, None)

    def left(output) -> float:
        return float((output - clean)[:, later].square().mean() / noise[:, later].square().mean())

    results = {overlap: left(denoise(flow, clean + noise, text, overlap=overlap)) for overlap in ("noisy", "denoised")}
    return {"untouched": left(clean + noise), **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--latent-frames", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options.clips, options.latent_frames)
    for name, value in results.items():
        print(f"{name:12} {value:.4f} of the noise is left")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()

"""STARFlow and STARFlow-V: text to image and video with normalising flows.

from starflow_core import load_pipeline, write_video

pipeline = load_pipeline()  # the bundled demo; or load_pipeline(model, text_encoder, vae)
output = pipeline.text_to_video("a red circle moving left", seed=1)
write_video("circle.mp4", output.pixels[0], fps=16)
"""

from importlib import import_module

__version__ = "0.2.0"

# Loaded on first use: importing the package costs nothing.
_WHERE = {
    "load_pipeline": "pipeline",
    "Pipeline": "pipeline",
    "Output": "pipeline",
    "Job": "jobs.tasks",
    "Generation": "jobs.tasks",
    "Piece": "jobs.tasks",
    "Context": "jobs.context",
    "Timeline": "jobs.timeline",
    "Control": "control",
    "Progress": "control",
    "Flow": "model.flow",
    "Encoding": "model.flow",
    "FlowConfig": "model.config",
    "Placement": "model.placement",
    "sample": "solve.sampling",
    "Sampler": "solve.sampling",
    "SolverSettings": "solve.solvers",
    "PRESETS": "solve.solvers",
    "AUTOREGRESSIVE": "solve.solvers",
    "denoise": "solve.denoising",
    "score_denoise": "solve.denoising",
    "load_flow": "weights.flow",
    "convert": "weights.flow",
    "LoraFile": "weights.lora",
    "merge_loras": "weights.lora",
    "load_text_encoder": "weights.text",
    "load_vae": "weights.vae",
    "read_image": "media",
    "read_video": "media",
    "write_video": "media",
    "read_metadata": "media",
    "VideoWriter": "media",
    "fit": "media",
    "Noise": "jobs.noises",
    "fresh_noise": "jobs.noises",
    "Inversion": "applications.inversion",
    "encode_to_noise": "applications.inversion",
    "decode_from_noise": "applications.inversion",
    "reprompt": "applications.reprompt",
    "Wish": "applications.reprompt",
    "Candidate": "applications.reprompt",
    "Edited": "applications.reprompt",
    "fill": "applications.fill",
    "Filled": "applications.fill",
    "outpainted": "jobs.masks",
    "Surprise": "jobs.surprise",
    "choose_caption": "applications.likelihood",
    "best_of": "applications.likelihood",
    "StarflowError": "errors",
    "CheckpointError": "errors",
    "InputError": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryForecast": "errors",
    "Cancelled": "errors",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)

"""Faults in filling in: forced tokens, weights, masks."""

from __future__ import annotations

from . import Fault

SOLVE, MASKS, FILL = (
    "starflow_core/solve/filling.py",
    "starflow_core/jobs/masks.py",
    "starflow_core/applications/fill.py",
)
FILLING, MASKED, FILLED = (
    "tests/core/solve/test_filling.py", "tests/core/jobs/test_masks.py", "tests/core/applications/test_fill.py"
)  # fmt: skip
CLI, COMMAND = "starflow_core/cli/fill.py", "tests/core/cli/test_cli.py::test_fill_missing_frames_and_around"

FAULTS = [
    Fault(
        SOLVE,
        "torch.where(self.forced[index].to(x.device).unsqueeze(-1), self.cells[index], x)",
        "x",
        "known cells aren't put back",
        f"{FILLING}::test_with_everything_known_the_clip_comes_back",
    ),
    Fault(
        SOLVE,
        "self.evaluate.take(lived)",
        "pass",
        "the cache stays with particles that ended",
        f"{FILLING}::test_resampled_particles_keep_their_own_past",
    ),
    Fault(
        SOLVE,
        "nats[:, forced].sum(-1).cpu() + self.counted",
        "nats[:, forced].sum(-1).cpu() * 0",
        "whole known frames weigh nothing",
        f"{FILLING}::test_the_frames_after_a_missing_one_choose_the_likeliest",
    ),
    Fault(
        SOLVE,
        "self.first = index - self.keep",
        "self.first = index - self.keep + 1",
        "the window keeps one frame less",
        f"{FILLING}::test_beyond_the_window_it_is_plain_sampling_too",
    ),
    Fault(
        SOLVE,
        "particles * OPENING if particles > 1 and",
        "particles if particles > 1 and",
        "a seam in the first frame gets no more particles",
        f"{FILLING}::test_the_first_frame_takes_more_particles_where_it_has_a_seam",
    ),
    Fault(
        SOLVE,
        "self.seed + i * PARTICLE_STREAM for",
        "self.seed * PARTICLE_STREAM + i for",
        "seed 0 shares its noise with other seeds",
        f"{FILLING}::test_seeds_share_no_noise",
    ),
    Fault(
        SOLVE,
        'self.control.report(Progress("deep", settled, total, settled, total))',
        "pass",
        "filling reports nothing",
        f"{FILLING}::test_cancelled_at_any_token",
    ),
    Fault(MASKS, "mask = (mask > 0).expand", "mask = (mask > 0.5).expand", "half masked pixels are known", MASKED),
    Fault(
        MASKS,
        "clear[1:].view(-1, config.latent.temporal, *clear.shape[1:]).amin(1)",
        "clear[1:].view(-1, config.latent.temporal, *clear.shape[1:]).amax(1)",
        "a cell is known by one of its frames",
        MASKED,
    ),
    Fault(MASKS, "torch.where(mask.unsqueeze(1), 0, pixels)", "pixels", "what was masked is encoded", MASKED),
    Fault(
        MASKS,
        "share = (index - first) / (last - first)",
        "share = (last - index) / (last - first)",
        "missing frames run backwards",
        MASKED,
    ),
    Fault(
        FILL,
        "torch.where(cells, clean, made)",
        "made",
        "known cells are denoised, too",
        f"{FILLED}::test_known_cells_of_the_latents_stay_as_clean_as_they_were",
    ),
    Fault(
        FILL,
        "torch.where(mask.unsqueeze(1), made.to(pixels), pixels)",
        "made.to(pixels)",
        "known pixels went through the VAE",
        f"{FILLED}::test_a_picture_of_an_image_model_is_denoised_by_its_score",
    ),
    Fault(
        FILL,
        "(replace(job, batch=particles), first)",
        "(job, first)",
        "particles take no memory",
        f"{FILLED}::test_particles_take_memory_and_too_many_are_refused_before_any_work",
    ),
    Fault(CLI, "mask[first : last + 1] = 1", "mask[first:last] = 1", "the last missing frame stays", COMMAND),
]

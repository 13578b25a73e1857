"""Faults in training."""

from __future__ import annotations

from . import Fault

GENERAL = "tests/core/training/test_training.py::"
RECIPE = "tests/core/training/test_recipe.py::"
STATE_TESTS, RUN_TESTS = (f"tests/core/training/test_{name}.py::" for name in ("processes", "train"))
FORECASTS = "tests/benchmarks/test_training.py::"
LOOP, OPTIMISER, OBJECTIVES, STATES, PROCESSES, RUN, WATCH, FORECAST, SETTINGS = (
    f"starflow_core/training/{name}.py"
    for name in ("loop", "optimiser", "objectives", "states", "processes", "train", "watch", "forecast", "settings")
)
CLIPS, VAE, BANK, BATCHES, FLOW, BUNDLE, MAIN = (
    f"starflow_core/training/demo/{name}.py" for name in ("clips", "vae", "bank", "batches", "flow", "bundle", "recipe")
)
REHEARSAL = "starflow_core/training/rehearsal.py"
EDITS = RUN_TESTS + "test_edits_and_last_frames_are_rehearsed_as_they_are_learned"

FAULTS: list[Fault] = [
    # The loop
    Fault(
        STATES, "return done[-1]\n", "return done[-1] + 1\n",
        "a resumed run skips a step", GENERAL + "test_a_resumed_run_is_the_unbroken_one",
    ),
    Fault(
        LOOP, 'tensors |= {f"average/{key}": value for key, value in average.items()}', "pass",
        "the average isn't saved", GENERAL + "test_a_resumed_run_is_the_unbroken_one",
    ),
    Fault(
        LOOP, 'f"{name}:{self.seed}:{index}"', 'f"{name}:{self.seed}"',
        "every step draws the same", GENERAL + "test_draws_depend_on_stage_seed_and_step",
    ),
    Fault(
        LOOP, "manual_seed(rng.getrandbits(62))", "manual_seed(index)",
        "noise depends on the step alone", GENERAL + "test_draws_depend_on_stage_seed_and_step",
    ),
    Fault(
        LOOP, "min(ema, (index + 1) / (index + 10))", "ema",
        "the average decays slowly from the start", GENERAL + "test_the_average_forgets_its_beginning_sooner",
    ),
    Fault(
        LOOP, "kept.lerp_(weights[key], 1 - decay)", "kept.lerp_(weights[key], decay)",
        "the average decays the wrong way round", GENERAL + "test_the_average_forgets_its_beginning_sooner",
    ),
    Fault(
        LOOP, "nn.utils.clip_grad_norm_(weights.values(), self.clip)", "torch.ones(())",
        "gradients aren't clipped", GENERAL + "test_each_step_takes_its_own_gradient_clipped",
    ),
    Fault(
        LOOP, "        optimizer.zero_grad(set_to_none=True)\n", "",
        "gradients add up", GENERAL + "test_each_step_takes_its_own_gradient_clipped",
    ),
    Fault(
        LOOP, "(1 - index / total)", "(1 - index / total) ** 2",
        "the rate falls too soon", GENERAL + "test_schedule_rises_stays_and_falls",
    ),
    Fault(
        LOOP, "enabled=self.dtype != torch.float32", "enabled=self.dtype == torch.float32",
        "bfloat16 isn't used", GENERAL + "test_matrix_products_are_in_the_loops_type",
    ),
    Fault(
        LOOP, '"seed": self.seed, ', "",
        "another seed's state is resumed", GENERAL + "test_the_state_of_another_run_is_refused",
    ),
    Fault(
        "starflow_core/training/files.py", "except Exception as error:", "except KeyError as error:",
        "a damaged state ends in a traceback", GENERAL + "test_a_damaged_state_is_named",
    ),
    Fault(
        "starflow_core/training/__main__.py", "exit_code_of(main)", "main()",
        "an interrupted training ends in a traceback", RECIPE + "test_an_interruption_is_told_in_a_line",
    ),
    Fault(
        MAIN, "if not 0 < options.scale <= 100:", "if options.scale <= 0:",
        "a schedule's share may be NaN", RECIPE + "test_bad_options_are_told_in_a_line",
    ),
    # States, processes, the run
    Fault(
        STATES, "if self.processes.leads:\n            try:", "if True:\n            try:",
        "every process publishes a state",
        "tests/core/training/test_together.py::test_two_processes_then_three_follow_one",
    ),
    Fault(
        STATES, "part.rename(self._path(done))", "shutil.copytree(part, self._path(done))",
        "parts of states stay", STATE_TESTS + "test_two_states_are_kept",
    ),
    Fault(
        STATES, "self._steps()[:-KEPT]", "self._steps()[:-1]",
        "only one state is kept", STATE_TESTS + "test_two_states_are_kept",
    ),
    Fault(
        STATES, 'if not HARMLESS.fullmatch(f"{module}.{name}"):', "if False:",
        "a state's pickle may run code", GENERAL + "test_a_damaged_state_is_named",
    ),
    Fault(
        STATES, "        if found != run:", "        if False:",
        "a state of another run is resumed", GENERAL + "test_the_state_of_another_run_is_refused",
    ),
    Fault(
        PROCESSES, "self.count / batch if row < batch", "self.count / batch if True",
        "rows that are taken twice count twice", STATE_TESTS + "test_shares_add_up_to_the_mean_over_the_batch",
    ),
    Fault(
        LOOP, "with averaged(module, weights, average), self.autocast():",
        "if True:", "the last weights are measured, not their average",
        GENERAL + "test_checks_see_the_average_and_leave_the_weights",
    ),
    Fault(
        LOOP, "figures[key] = figures.get(key, 0.0) + (value if finite else float(\"nan\"))",
        "figures[key] = value", "figures of the last piece alone are told",
        RUN_TESTS + "test_micro_batches_and_recomputing_change_nothing",
    ),
    Fault(
        RUN, "noise[share.rows]", "noise[: len(share.rows)]",
        "every piece has the noise of the first", RUN_TESTS + "test_micro_batches_and_recomputing_change_nothing",
    ),
    Fault(
        RUN, "if after > before", "if after >= before",
        "every step rehearses", RUN_TESTS + "test_rehearsals_are_the_models_own_and_come_in_their_share",
    ),
    Fault(
        REHEARSAL, "given = self.dataset.practice.given(bucket, task)", "given = 0",
        "a rehearsed edit's source is learned", EDITS,
    ),
    Fault(
        REHEARSAL, "self._key(bucket, self._source(w))", "self._key(bucket, self.texts_alone[0])",
        "all rehearsed edits change one clip", EDITS,
    ),
    Fault(
        REHEARSAL, "self.parts[bucket, task]", "self.parts[bucket, 'text']",
        "edits aren't rehearsed", EDITS,
    ),
    Fault(
        RUN, 'name not in (*FREE, "steps")', "name not in FREE",
        "a finished run takes no more steps", RUN_TESTS + "test_a_finished_run_takes_more_steps_but_not_fewer",
    ),
    Fault(
        LOOP, "if first > total:", "if False:",
        "fewer steps than there are go on", RUN_TESTS + "test_a_finished_run_takes_more_steps_but_not_fewer",
    ),
    Fault(
        "starflow_core/training/processes.py", "mp_policy=policy, ignored_params=scales)\n        fully_shard(net",
        "mp_policy=policy)\n        fully_shard(net",
        "scales of 8-bit weights are rounded", STATE_TESTS + "test_weights_in_8_bit_are_the_same_when_they_are_spread",
    ),
    Fault(
        RUN, "with self._naming(index, seen, plan), ", "with ",
        "numbers that go bad aren't named", RUN_TESTS + "test_numbers_that_go_bad_are_named",
    ),
    Fault(
        WATCH, "_step_of(line) < first", "_step_of(line) <= first",
        "figures of a step are there twice", STATE_TESTS + "test_figures_go_on_where_a_state_was",
    ),
    Fault(
        FORECAST, "(0 if whole else 4)", "0",
        "the forecast leaves the LoRA's own numbers out", FORECASTS + "test_forecasts_are_what_is_counted",
    ),
    Fault(
        FORECAST, "(1 if settings.recompute else KEPT)", "1",
        "the forecast thinks that all is computed again", FORECASTS + "test_forecasts_are_what_is_counted",
    ),
    Fault(
        SETTINGS, "if value is None and field.default is None:", "if value is None:",
        "settings may be left empty", "tests/core/training/test_settings.py::test_bounds_and_kinds_are_kept",
    ),
    # The optimizer
    Fault(
        OPTIMISER, "lerp_(parameter.grad, 1 - beta)", "lerp_(parameter.grad, beta)",
        "Muon's momentum forgets at once", GENERAL + "test_matrices_follow_their_orthogonalised_momentum",
    ),
    Fault(
        OPTIMISER, 'parameter.grad.lerp(state["momentum"], beta)', 'state["momentum"]',
        "Muon doesn't look ahead", GENERAL + "test_matrices_follow_their_orthogonalised_momentum",
    ),
    Fault(
        OPTIMISER, "max(1.0, rows / columns)", "max(1.0, columns / rows)",
        "Muon scales wide matrices, not tall ones",
        GENERAL + "test_matrices_follow_their_orthogonalised_momentum",
    ),
    Fault(
        OPTIMISER, "0.99**step", "0.9**step",
        "Adam's bias correction of the squares", GENERAL + "test_vectors_and_embeddings_are_updated_by_adam",
    ),
    Fault(
        OPTIMISER, "_is_matrix(p) and id(p) not in keep", "_is_matrix(p)",
        "embeddings are updated by Muon", GENERAL + "test_vectors_and_embeddings_are_updated_by_adam",
    ),
    Fault(
        OPTIMISER, 'group.setdefault("initial_lr", group["lr"])', 'group["lr"]',
        "scales of the learning rate multiply", GENERAL + "test_both_learning_rates_are_scaled",
    ),
    # Objectives
    Fault(
        OBJECTIVES, "(taken + pull)", "(taken - pull)",
        "the denoiser learns to add noise", GENERAL + "test_the_denoiser_learns_the_score_step",
    ),
    Fault(
        OBJECTIVES, "latents + sigma * noise", "latents + sigma**2 * noise",
        "noise level squared", GENERAL + "test_noise_has_its_level_and_generator",
    ),
    Fault(
        OBJECTIVES, '"attention.proj.weight", "main.2.weight"', '"attention.proj.weight"',
        "fresh layers change what passes", GENERAL + "test_a_fresh_flow_adds_nothing",
    ),
    Fault(
        FLOW, ", model.embed(batch.prompts), batch.given)", ", model.embed(batch.prompts))",
        "given frames are learned", RECIPE + "test_flow_and_denoiser_learn",
    ),
    # What the demo learns from
    Fault(
        CLIPS, "self.start + frames", "frames",
        "later scenes forget their start", RECIPE + "test_recolouring_changes_only_the_colour",
    ),
    Fault(
        CLIPS, "x.abs() - 0.5 * (y + radius)", "x.abs() - 0.5 * (y - radius)",
        "triangles are too wide", RECIPE + "test_every_kind_keeps_its_margin",
    ),
    Fault(
        VAE, "moving=frames > 1", "moving=False",
        "the VAE sees only stills", RECIPE + "test_stills_stand_and_clips_move",
    ),
    Fault(
        VAE, "mean + strength * deviation * noise", "mean",
        "the decoder sees clean latents", RECIPE + "test_the_decoder_learns_from_disturbed_latents",
    ),
    Fault(
        VAE, ", clamp=False", "",
        "saturated pixels have no gradient", RECIPE + "test_saturated_pixels_have_a_gradient",
    ),
    Fault(
        VAE, "    torch.manual_seed(loop.seed)\n", "",
        "the VAE's first weights have no seed", RECIPE + "test_the_seed_decides_the_first_weights",
    ),
    Fault(
        VAE, "latents_std=latents.std(1)", "latents_std=latents.var(1)",
        "variance for deviation in the VAE's statistics", RECIPE + "test_statistics_are_those_of_the_latents",
    ),
    Fault(
        BANK, " if c != s.colour]", "]",
        "edits to the same colour", RECIPE + "test_banks_hold_clips_edits_and_last_frames",
    ),
    Fault(
        BANK, "range(4, 33, 4)", "range(3, 33, 4)",
        "last frames are one too early", RECIPE + "test_banks_hold_clips_edits_and_last_frames",
    ),
    Fault(
        BATCHES, "direction=None)", "start=0)",
        "captions of stills name a direction", RECIPE + "test_captions_of_every_task",
    ),
    Fault(
        BATCHES, 'task == "extend" or not scene.start', "True",
        "shapes that have stopped in every task", RECIPE + "test_captions_of_every_task",
    ),
    Fault(
        BATCHES, '"" if rng.random() < CAPTION_DROP else c for c', "c for c",
        "no caption is dropped", RECIPE + "test_captions_of_every_task",
    ),
    Fault(
        BATCHES, "rng.random() < PREFIX_DROP", "False",
        "no prefix is dropped", RECIPE + "test_captions_of_every_task",
    ),
    Fault(
        BATCHES, "later_factors(config, task, given,", 'later_factors(config, "text", given,',
        "factors of continuations and edits", RECIPE + "test_frames_of_every_task",
    ),
    Fault(
        BATCHES, "bank.clips[picks, :, 1 : frames + 1]", "bank.clips[picks, :, :frames]",
        "continuations hold a clip's first frame", RECIPE + "test_frames_of_every_task",
    ),
    Fault(
        BATCHES, "bank.edits[picks]), 2)", "bank.clips[picks, :, : bank.edits.shape[2]]), 2)",
        "edits change nothing", RECIPE + "test_frames_of_every_task",
    ),
    Fault(
        BATCHES, "length - 3 : length - 2", "frames - 3 : frames - 2",
        "clips end where the batch does", RECIPE + "test_last_frames_end_their_clips",
    ),
    Fault(
        BATCHES, "progress > GROWTH", "progress >= 0",
        "long clips from the start", RECIPE + "test_short_clips_come_first",
    ),
    # The finished files
    Fault(
        BUNDLE, "with_preview(model.flow.config, banks[0])", "model.flow.config",
        "no preview factors", RECIPE + "test_the_files_are_a_demo",
    ),
    Fault(
        BUNDLE, "torch.ones(1, x[:, 0].numel())", "torch.zeros(1, x[:, 0].numel())",
        "preview factors without a bias", RECIPE + "test_preview_factors_turn_latents_into_colours",
    ),
    Fault(
        BUNDLE, 'shape = {**CONFIG, "latents_mean": vae.config.latents_mean, ', "shape = {**CONFIG, ",
        "the VAE's file lacks its means", RECIPE + "test_the_files_are_a_demo",
    ),
    Fault(
        MAIN, "options.scale != 1 and", "False and",
        "a trial replaces the demo", RECIPE + "test_a_shortened_schedule_does_not_replace_the_demo",
    ),
]  # fmt: skip

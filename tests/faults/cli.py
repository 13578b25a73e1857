"""Faults in cli."""

from __future__ import annotations

from . import Fault

TOGETHER = "tests/core/parallel/test_command.py::test_"
TESTS, LORA = "tests/core/cli/test_cli.py::", "tests/core/cli/test_lora.py::"
COMMANDS, ARGUMENTS, FILES, GENERATE, INVERT, PLAN, PROGRESS, SETTINGS = (
    f"starflow_core/cli/{name}.py"
    for name in ("__init__", "arguments", "files", "generate", "invert", "plan", "progress", "settings")
)

FAULTS: list[Fault] = [
    # From options to a job
    Fault(
        PLAN, ', "frames": file_frames(setup, job, given.pixels["clip"])', "",
        "a joined clip's metadata has the job's length", TESTS + "test_the_given_frames_are_shown",
    ),
    Fault(
        PLAN, "{**given.settings, **job_settings(args, setup, given, args.best_of or len(captions))}",
        "{**job_settings(args, setup, given, args.best_of or len(captions)), **given.settings}",
        "a source's frame rate beats --fps", TESTS + "test_size_and_rate_of_a_clip_can_be_changed",
    ),
    Fault(
        PLAN, 'rate = {"fps": self.fps} if self.fps else {}', "rate = {}",
        "a source's frame rate is forgotten", TESTS + "test_every_task",
    ),
    Fault(
        PLAN, "read_video(args.video, 1).pixels, **size_options(args))", "read_video(args.video, 1).pixels)",
        "--size is ignored with --video", TESTS + "test_size_and_rate_of_a_clip_can_be_changed",
    ),
    Fault(
        PLAN, 'args.frames if args.task == "edit" else None', "None",
        "edit reads all of its source", TESTS + "test_every_task",
    ),
    Fault(
        PLAN, '"guidance", "window", "keep")', '"guidance", "window")',
        "--keep is ignored", TESTS + "test_metadata_tells_how_to_make_it_again",
    ),
    Fault(
        PLAN, "min(args.batch or 1, results)", "args.batch or 1",
        "the forecast is of more results than are made", TESTS + "test_the_text_encoder_stays_until_the_last_batch",
    ),
    Fault(
        PLAN, "several = len(captions) > job.batch or", "several = False or",
        "the forecast leaves out the text encoder that stays",
        TESTS + "test_the_text_encoder_stays_until_the_last_batch",
    ),
    Fault(
        PLAN, '"denoise": args.denoise, ', "",
        "--no-denoise is ignored", TESTS + "test_metadata_tells_how_to_make_it_again",
    ),
    Fault(
        SETTINGS, "PRESETS[args.preset or args.default_preset].with_numbers(**numbers)",
        "PRESETS[args.preset or args.default_preset]",
        "a preset's numbers can't be overridden", TESTS + "test_choices_are_the_cores",
    ),
    Fault(
        SETTINGS, "dtype = DTYPES.get(args.dtype, default_dtype(devices[0], parts.config))",
        "dtype = default_dtype(devices[0], parts.config)",
        "--dtype is ignored", TESTS + "test_model_is_found_before_it_is_loaded",
    ),
    Fault(
        SETTINGS, "tile < LEAST_TILE", "tile < 1",
        "tiles too small to blend", TESTS + "test_impossible_jobs",
    ),
    Fault(
        ARGUMENTS, '_add_solver(command, "exact")', '_add_solver(command, "balanced")',
        "decode is not exact", TESTS + "test_decoding_is_exact_unless_told_otherwise",
    ),
    # Running
    Fault(
        GENERATE, "part = replace(job, seed=plan.seeds[first])", "part = job",
        "every batch begins with the same seed", TESTS + "test_prompt_file",
    ),
    Fault(
        GENERATE, "plan.writers[chunk]", "plan.writers[:together]",
        "every batch goes to the first files", TESTS + "test_prompt_file",
    ),
    Fault(
        GENERATE, "or chunk.stop < len(plan.captions)", "or chunk.stop <= len(plan.captions)",
        "the text encoder stays for the last frames", TESTS + "test_the_text_encoder_stays_until_the_last_batch",
    ),
    Fault(
        GENERATE, "keep_text_encoder=more,", "keep_text_encoder=False,",
        "the text encoder is read for every batch", TESTS + "test_the_text_encoder_stays_until_the_last_batch",
    ),
    Fault(
        GENERATE, "pipeline, captions, part, args.negative, control,", 'pipeline, captions, part, "", control,',
        "the negative prompt is ignored", TESTS + "test_guidance_steers_away_from_the_negative_prompt",
    ),
    Fault(
        GENERATE, "plan.source, args.tile)", "plan.source)",
        "generate ignores --tile", TESTS + "test_tiles_reach_the_decoder",
    ),
    Fault(
        GENERATE, "max(repeated - frames.shape[1], 0)", "0",
        "a joined clip repeats the end of its source", TESTS + "test_the_given_frames_are_shown",
    ),
    Fault(
        GENERATE, "statistics.append(run.statistics)", "statistics = [run.statistics]",
        "only the last batch's sweeps are reported", TESTS + "test_sweeps_of_all_batches_are_counted",
    ),
    Fault(
        GENERATE, "sampling.wrote(frames.shape[1])", "sampling.wrote(len(frames))",
        "results are counted as frames", TESTS + "test_every_written_frame_is_counted",
    ),
    Fault(
        GENERATE, "        warn_of_cut(str(caption), rest, pipeline.config)", "        pass",
        "a prompt is cut without a word", TESTS + "test_what_the_text_encoder_cut_off",
    ),
    # Names, metadata, warnings
    Fault(
        PLAN, '"seed": seed,', '"seed": job.seed,',
        "all results claim the first seed", TESTS + "test_batch_is_each_alone",
    ),
    Fault(
        PLAN, '        "negative": args.negative,\n', "",
        "metadata without the negative prompt", TESTS + "test_metadata_tells_how_to_make_it_again",
    ),
    Fault(
        PLAN, '{slug(str(c))}-{seed}"', '{slug(str(c))}-{job.seed}"',
        "default names that collide", TESTS + "test_image_model",
    ),
    Fault(
        PLAN, "job.task not in setup.config.tasks", "job.task in setup.config.tasks",
        "warnings of trained tasks", TESTS + "test_task_that_was_not_trained",
    ),
    Fault(
        SETTINGS, 'return f"{path.rstrip(\'/\' + os.sep)}-{index}/"', "return path",
        "numbered picture sequences share a folder", TESTS + "test_numbered",
    ),
    # Encode, decode, score
    Fault(
        INVERT, "rate = args.fps or clip.fps", "rate = clip.fps",
        "encode ignores --fps", TESTS + "test_decoding_is_exact_unless_told_otherwise",
    ),
    Fault(
        INVERT, "noise.job(config, solver(args), **settings)", "noise.job(config, **settings)",
        "decode ignores the solver's options", TESTS + "test_decoding_is_exact_unless_told_otherwise",
    ),
    Fault(
        INVERT, "[writer], sampling, tile=args.tile)", "[writer], sampling)",
        "decode ignores --tile", TESTS + "test_tiles_reach_the_decoder",
    ),
    Fault(
        INVERT, "    warn_of_cut(args.prompt, cut, pipeline.config)\n    return Surprise", "    return Surprise",
        "score cuts a prompt without a word", TESTS + "test_what_the_text_encoder_cut_off",
    ),
    Fault(
        INVERT, "measure(pipeline, given.pixels, args.prompt,", 'measure(pipeline, given.pixels, "",',
        "score ignores the prompt", TESTS + "test_score",
    ),
    Fault(
        INVERT, "latent.frames((found - 1) // latent.temporal + 1)", "found",
        "odd frames are not left out", TESTS + "test_frames_that_do_not_fill_a_latent_frame",
    ),
    Fault(
        INVERT, "if noise.model != config.name:", "if False:",
        "noise of another model is decoded without a word",
        TESTS + "test_a_picture_and_back_by_an_image_model",
    ),
    # Inspect, progress, exit codes
    Fault(
        FILES, 'chosen(args, "frames", "guidance")', 'chosen(args, "frames")',
        "inspect's memory ignores --guidance", TESTS + "test_inspect_forecasts",
    ),
    Fault(
        FILES, "batch=args.batch, ", "",
        "inspect's memory ignores --batch", TESTS + "test_inspect_forecasts",
    ),
    Fault(
        FILES, "args.dtype, overwrite=args.overwrite, progress=meter.bytes)\n", "args.dtype, overwrite=True)\n",
        "convert replaces files unasked", TESTS + "test_convert",
    ),
    Fault(
        PROGRESS, "self._bar.update(done - self._bar.n)", "self._bar.update(done)",
        "bars run ahead", TESTS + "test_bars_count_up_and_go",
    ),
    Fault(
        PROGRESS, "self.sweeps += 1", "self.sweeps = progress.step",
        "sweeps are mistaken for tokens", TESTS + "test_the_bar_shows_the_solver_and_then_the_frames",
    ),
    Fault(
        COMMANDS, "else INTERRUPTED", "else 0",
        "Ctrl-C looks like success", TESTS + "test_interruption",
    ),
    Fault(
        COMMANDS, "except (MemoryError, RuntimeError)", "except RuntimeError",
        "a MemoryError ends in a traceback", TESTS + "test_out_of_memory",
    ),
    Fault(
        COMMANDS, "    except ModuleNotFoundError as error:\n", "    except ZeroDivisionError as error:\n",
        "a missing package ends in a traceback", TESTS + "test_missing_package",
    ),
    Fault(
        SETTINGS, "quantise=args.dtype == INT8", "quantise=False",
        "--dtype int8 is ignored", TESTS + "test_int8",
    ),
    Fault(
        FILES, "Means(in_int8 or name == INT8)", "Means(name == INT8)",
        "a file in 8 bit needs as much as one in 16", TESTS + "test_inspect_of_8_bit",
    ),
    Fault(
        GENERATE, "part = replace(part, seed=best.seed)", "pass",
        "the first candidate is made", TESTS + "test_best_of_makes_what_the_winners_seed_makes",
    ),
    Fault(
        GENERATE, "writers[0].tell(seed=best.seed, best_of=", "writers[0].tell(best_of=",
        "a kept candidate claims the first seed", TESTS + "test_best_of_makes_what_the_winners_seed_makes",
    ),
    Fault(
        PLAN, "job.seed + i * candidates for", "job.seed + i for",
        "prompts share candidates", TESTS + "test_best_of_several_prompts_and_tasks",
    ),
    Fault(
        INVERT, "        _map_writer(args, given)  # raises", "        pass  # raises",
        "a map that can't be written is refused after the work", TESTS + "test_what_cannot_be_inverted",
    ),
    Fault(
        INVERT, "overlaid(given.pixels, surprise.map, UNIT)", "given.pixels",
        "a map without the surprise", TESTS + "test_a_map_of_a_clip",
    ),
    Fault(
        INVERT, "surprise, prompt = choice.surprise, choice.captions[choice.winner]",
        "surprise, prompt = choice.surprise, choice.captions[0]",
        "the first caption is named the winner", TESTS + "test_which_caption_fits",
    ),
    Fault(
        "starflow_core/cli/arguments.py", "    if not colon or os.path.exists(text):\n", "    if not colon:\n",
        "a LoRA's file with a colon in its name is cut", LORA + "test_files_with_strengths",
    ),
    Fault(
        "starflow_core/cli/arguments.py", "    if not math.isfinite(strength):\n        raise argparse",
        "    if False:\n        raise argparse", "a LoRA's strength may be NaN", LORA + "test_strengths_that_are_none",
    ),
    Fault(
        "starflow_core/cli/settings.py", ", loras=args.lora)", ")", "--lora is ignored",
        LORA + "test_results_differ_and_say_by_what",
    ),
    Fault(
        "starflow_core/pipeline.py", "need.weights + sum(chosen.file.nbytes for chosen in self.loras)", "need.weights",
        "a LoRA's memory isn't counted", "tests/core/test_pipeline.py::test_loras",
    ),
    Fault(
        "starflow_core/jobs/unfinished.py", "_digest([*weights, scales])", "_digest(weights)",
        "an unfinished clip is gone on with at a LoRA's other strength",
        "tests/core/test_pipeline.py::test_a_file_of_another_strength_is_not_gone_on_from",
    ),
    Fault("starflow_core/cli/together.py", "setup.mesh.check(setup.config, job.guidance)", "pass",
          "halves of no guidance are found in the middle of it",
          TOGETHER + "what_does_not_go_together_is_refused_before_joining"),
    Fault("starflow_core/pipeline.py", "with suppress(NonFiniteError):  # the leader",
          "with suppress(InputError):  # the leader",
          "each process names the same number that isn't finite",
          TOGETHER + "numbers_that_are_not_finite_stop_all_with_the_place"),
    Fault("starflow_core/processes.py", 'raise StarflowError("another process has stopped; it says why") from None',
          "raise",
          "a process that is left alone shows its stack", TOGETHER + "a_signal_to_the_leader_stops_all"),
    Fault("starflow_core/cli/generate.py", "        team.tell(None)\n", "",
          "those that follow wait for more", TOGETHER + "one_process_writes_and_speaks"),
]  # fmt: skip

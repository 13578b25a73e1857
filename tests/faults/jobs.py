"""Faults in jobs and the pipeline: prompts, given frames, memory, one-call tasks."""

from __future__ import annotations

from . import Fault

JOBS = "starflow_core/jobs"
TASKS, MEMORY = "tests/core/jobs/test_tasks.py", "tests/core/jobs/test_memory.py tests/core/model/test_config.py"
PIPELINE = "tests/core/test_pipeline.py"
PLANNER, DRY = "tests/core/jobs/test_planner.py", "tests/benchmarks/test_dryrun.py"

FAULTS = [
    Fault(f"{JOBS}/tasks.py", "return self.given + self.flow.config.noise_std * drawn.to(self.given)",
          "return self.given", "noise of given frames left out", TASKS),
    Fault(f"{JOBS}/tasks.py", "self.flow.config.noise_std * drawn.to(self.given)", "drawn.to(self.given)",
          "noise of given frames of deviation 1", TASKS),
    Fault(f"{JOBS}/tasks.py", "noise.draw_context(self.job.seed", "noise.draw(self.job.seed",
          "noise of given frames from the first stream", TASKS),
    Fault(f"{JOBS}/tasks.py", "self.sampler.grid, text, self.layout.window, control",
          "self.sampler.grid, text, None, control", "the job's window not given to the denoiser", TASKS),
    Fault(f"{JOBS}/prompts.py", "return job.fps if job.frames > 1 else 0", "return job.fps",
          "a still gets the clip's rate", PIPELINE),
    Fault("starflow_core/pipeline.py", 'self.prompts([negative], job, "text")', "self.prompts([negative], job)",
          "the negative prompt gets the task's prefix", PIPELINE),
    Fault("starflow_core/pipeline.py", "self._encoder = encoder if keep_encoder else None", "self._encoder = None",
          "the text encoder is never kept", PIPELINE),
    Fault("starflow_core/pipeline.py", "need = need.with_text(self.text.weight_bytes(self.dtype), keep_text_encoder)",
          "pass", "the text encoder isn't counted", PIPELINE),
    Fault("starflow_core/pipeline.py", "return self.generate(prompt, job, **options)",
          "return self.generate(prompt, job)",
          "one-call tasks drop their options", PIPELINE),
    Fault(f"{JOBS}/memory.py", "LAYER[item] * item * tokens * width", "LAYER[item] * item // 2 * tokens * width",
          "activations halved", MEMORY),
    Fault(f"{JOBS}/tasks.py", "        check_kinds(self)\n", "        pass\n", "settings of any type are taken", TASKS),
    Fault(f"{JOBS}/build.py", "if pixels.ndim not in dims or pixels.shape[-3] != 3:", "if False:",
          "pixels of another layout are taken", PIPELINE),
    Fault(f"{JOBS}/memory.py", "(hidden + 24 * widest)", "(hidden + 3 * widest)",
          "the score's activations an eighth", MEMORY),
    Fault(f"{JOBS}/memory.py", "max(deep, shallow, step) + held", "max(deep, shallow)",
          "the denoiser's activations left out", MEMORY),
    Fault("starflow_core/pipeline.py", "return self.quantise or in_int8(self.checkpoint)", "return self.quantise",
          "a file in 8 bit is counted as 16 bit", PIPELINE),
    Fault("starflow_core/pipeline.py", "text = find_text_encoder(text_encoder, quantise=quantise)",
          "text = find_text_encoder(text_encoder)", "the text encoder stays in 16 bit", PIPELINE),
    Fault("starflow_core/jobs/memory.py", "4 * width**2 * item if means.int8 else 0", "0",
          "the weight that is expanded isn't counted", PIPELINE),
    Fault(f"{JOBS}/memory.py", "8 * widest**2 * item if means.int8 else 0", "0",
          "weights that wait for a gradient aren't counted", DRY),
    Fault(f"{JOBS}/memory.py", "STREAMED_LAYERS = 2", "STREAMED_LAYERS = 1", "the next layer isn't counted", DRY),
    Fault(f"{JOBS}/planner.py", "sorted(weights, reverse=streamed)", "weights", "16 bit is streamed first", PLANNER),
    Fault(f"{JOBS}/planner.py", "for in_turn in (False, True):", "for in_turn in (True, False):",
          "parts wait for their turn though there is room", PLANNER),
    Fault(f"{JOBS}/planner.py", "            return plan\n", "            least = plan\n",
          "the last means that fit", PLANNER),
    Fault(f"{JOBS}/planner.py", "text_away=True)", "text_away=False)", "the text encoder stays", PLANNER),
    Fault(f"{JOBS}/tasks.py", "yield from self._piece(0, self._denoised(torch.cat(sampled, 1)), True)",
          "yield from self._piece(0, torch.cat(sampled, 1), True)", "in turn, nothing is denoised", PLANNER),
    Fault(f"{JOBS}/planner.py", "caches[-1:] if away or streamed else caches", "caches",
          "a host moves weights for a cache that could be smaller", PLANNER),
    Fault(f"{JOBS}/planner.py", "max(forecast.weights, self.kept)", "forecast.weights",
          "weights that a host keeps on the device aren't counted", PLANNER),
    Fault(f"{JOBS}/planner.py", "self.free - plan.free if plan.means.streamed else 0", "0",
          "a host fills what a budget leaves", PLANNER),
    Fault(f"{JOBS}/planner.py", "        with suppress(InputError):", "        if True:",
          "an impossible smaller job hides why the job was refused", PLANNER),
    Fault("starflow_core/weights/flow.py", "name.endswith(int8.SCALE) for", "name.endswith(int8.WEIGHT) for",
          "every flow is in 8 bit", "tests/core/weights/test_int8.py"),
]  # fmt: skip

"""Faults in solve: solvers, windows, denoising, guidance, noise."""

from __future__ import annotations

from . import Fault

SOLVE = "starflow_core/solve"
WORK, TASKS = "tests/core/solve/test_work.py", "tests/core/jobs/test_tasks.py"
RUNS, SOLVERS, DENOISING = (f"tests/core/solve/test_{name}.py" for name in ("runs", "solvers", "denoising"))

FAULTS = [
    Fault(f"{SOLVE}/solvers.py", "return int(leading), residual", "return min(int(leading) + 1, len(change)), residual",
          "one token too many committed", WORK),
    Fault(f"{SOLVE}/solvers.py", "return int(leading), residual", "return int(leading), 0.0",
          "residual always 0", WORK),
    Fault(f"{SOLVE}/solvers.py", "return inputs + parallel_scan(slope, outputs - inputs)", "return outputs",
          "no acceleration", WORK),
    Fault(f"{SOLVE}/solvers.py", "        warm_start(window, entered, stop)\n", "", "no warm start", WORK),
    Fault(f"{SOLVE}/solvers.py", "_same_place(slots, start, window.frame_tokens)",
          "_same_place(slots, start, window.frame_tokens - 1)", "warm start from the wrong place", WORK),
    Fault(f"{SOLVE}/solvers.py", "SLOPE_LIMIT = 0.9", "SLOPE_LIMIT = 0.5", "another slope limit", WORK),
    Fault(f"{SOLVE}/solvers.py", "window.a[:, start:stop], window.b[:, start:stop] = evaluate(", "evaluate(",
          "scale and shift of known tokens dropped", WORK),
    Fault(f"{SOLVE}/solvers.py", "        if length == frame_tokens:\n", "        if length >= frame_tokens:\n",
          "an image's span for clips", WORK),
    Fault(f"{SOLVE}/solvers.py", "shift *= 2", "shift *= 4", "the parallel scan skips doublings", SOLVERS),
    Fault(f"{SOLVE}/denoising.py", "min(config.denoiser.window, self.window - 1)",
          "min(config.denoiser.window - 1, self.window - 1)", "a chunk's lead off by one", DENOISING),
    Fault(f"{SOLVE}/denoising.py", 'window: int | None = None, overlap: str = "noisy"',
          'window: int | None = None, overlap: str = "denoised"', "overlap of a stream denoised by default",
          f"{DENOISING} {TASKS}"),
    Fault(f"{SOLVE}/denoising.py", "block.recompute = recompute", "block.recompute = False",
          "the score step leaves recomputing off", DENOISING),
    Fault(f"{SOLVE}/denoising.py", "last=self.taken + 1 == self.grid.frames", "last=False",
          "a clip's last frames stay in the denoiser", DENOISING),
    Fault(f"{SOLVE}/denoising.py", "self.window = window or config.window", "self.window = config.window",
          "the job's window ignored by the denoiser", TASKS),
    Fault(f"{SOLVE}/denoising.py", "flow.config.noise_std**2 * score", "flow.config.noise_std * score",
          "the score step's size", DENOISING),
    Fault(f"{SOLVE}/noise.py", "(seed + index) ^ CONTEXT_STREAM", "(seed + index)",
          "context noise from the wrong stream", TASKS),
    Fault(f"{SOLVE}/noise.py", "[seed + index for index in range(batch)]", "[seed for index in range(batch)]",
          "one seed for a batch", TASKS),
    Fault(f"{SOLVE}/guidance.py", ".clamp(max=1)", "", "guidance trusts scales above the unconditional",
          f"{RUNS} tests/core/test_golden.py"),
    Fault(f"{SOLVE}/runs.py", "prefix, widest, make_cache))", "prefix, widest))",
          "the cache handed in is not used", RUNS),
    Fault(f"{SOLVE}/runs.py", "torch.cat([part.to(before.device) for part in both])", "torch.cat(list(both)[:1])",
          "rows of the second run dropped", RUNS),
    Fault(f"{SOLVE}/runs.py", "text = text.to(self.device, self.dtype)", "text = text.to(self.dtype)",
          "text stays on its device", RUNS),
    Fault(f"{SOLVE}/sampling.py", "self._tokens[index].to(self.placement.shallow)", "self._tokens[index]",
          "sampled tokens stay on the deep block's device", RUNS),
    Fault(f"{SOLVE}/sampling.py", "first += self.window - self.keep", "first += self.window",
          "a resumed clip begins at another window", SOLVERS),
    Fault(f"{SOLVE}/sampling.py", "beyond % (self.window - self.keep) == 0", "beyond % self.window == 0",
          "windows end where they don't", SOLVERS),
    Fault(f"{SOLVE}/sampling.py", "[-self.keep :]", "[: self.keep]", "a sliding window keeps its oldest frames",
          SOLVERS),
    Fault(f"{SOLVE}/solvers.py", "min(leading, evaluate.horizon(settled) - settled)", "leading",
          "tokens committed beyond what their group saw", "tests/core/solve/test_caches.py"),
    Fault(f"{SOLVE}/solvers.py", "bisect_right(first_sweeps, sweep + 1 - settings.max_sweeps)", "0",
          "no end of sweeps", SOLVERS),
]  # fmt: skip

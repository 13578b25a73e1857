"""Faults in model: the network, the exact map, latents."""

from __future__ import annotations

from . import Fault

MODEL = "starflow_core/model"
FLOW, GOLDEN, HOOKS = "tests/core/model/test_flow.py", "tests/core/test_golden.py", "tests/core/model/test_forward.py"
INT8 = "tests/core/model/test_int8.py"
ATTENTION, CACHES = "tests/core/model/test_attention.py", "tests/core/solve/test_caches.py"
DENOISING = "tests/core/solve/test_denoising.py"

FAULTS = [
    Fault(f"{MODEL}/transformer.py", "        x = hidden.float()\n        # A bare",
          "        x = hidden\n        # A bare",
          "final norm in the compute type", FLOW),
    Fault(f"{MODEL}/rope.py", "        even, odd = x.float().unflatten",
          "        self, x = Rotary(self.cos.to(x), self.sin.to(x)), x\n        even, odd = x.unflatten",
          "rotation in the compute type", FLOW),
    Fault(f"{MODEL}/attention.py", ".triu(1)", ".triu(2)", "the causal mask of a device without fused kernels",
          ATTENTION),
    Fault(f"{MODEL}/attention.py", "is_causal=causal)\n    if queries.device.type == \"cuda\"",
          "is_causal=False)\n    if queries.device.type == \"cuda\"", "a sweep sees what comes later", FLOW),
    Fault(f"{MODEL}/flow.py", "tuple(torch.cat(p) for p in zip(*parts, strict=True))", "parts[0]",
          "split shallow blocks drop all but the first part", FLOW),
    Fault(f"{MODEL}/flow.py", "for part in ((x - b) / a, -a.log()))", "for part in ((x - b) / a, a.log()))",
          "the sign of a log-determinant", FLOW),
    Fault(f"{MODEL}/flow.py", "UNIT = 0.541324854612918", "UNIT = 0.5413", "softplus of another unit",
          f"{GOLDEN} {FLOW}"),
    Fault(f"{MODEL}/flow.py", '== (config.seq_order == "L2R")', '!= (config.seq_order == "L2R")',
          "blocks in the other order", GOLDEN),
    Fault(f"{MODEL}/flow.py", "before, text = tokens[:, :-1].to(self.compute_dtype)",
          "before, text = tokens[:, 1:].to(self.compute_dtype)", "inputs shifted the wrong way", FLOW),
    Fault(f"{MODEL}/flow.py", "expand(len(before), 1, -1), before), 1) if first else before",
          "expand(len(before), 1, -1), before), 1)[:, : before.shape[1]]", "the start token before every slot", FLOW),
    Fault(f"{MODEL}/rope.py", "time = torch.arange(tokens, dtype=torch.float32) * (length / tokens)",
          "time = torch.arange(tokens, dtype=torch.float32)", "text positions not scaled", GOLDEN),
    Fault(f"{MODEL}/denoiser.py", "frame + self.ahead + 1)", "frame + self.ahead)",
          "a frame less of look-ahead", DENOISING),
    Fault(f"{MODEL}/denoiser.py", "if i >= until - self.behind}", "if i > until - self.behind}",
          "keys in sight forgotten too early", DENOISING),
    Fault(f"{MODEL}/latent.py", "(latents.float() - mean) / std", "(latents.float() - mean) * std",
          "latents scaled the wrong way", "tests/core/jobs/test_tasks.py"),
    Fault(f"{MODEL}/vae/layers.py", "(0, 0, 0), stride,", "(0, 0, 0), (1, 1, 1),",
          "strides of the VAE's convolutions dropped", "tests/core/weights/test_vae.py"),
    Fault(f"{MODEL}/vae/layers.py", "if x.is_cpu and x.dtype == torch.float32", "if x.dtype == torch.float64",
          "the VAE's small convolutions are slow again", "tests/core/weights/test_vae.py"),
    Fault(f"{MODEL}/int8.py", "torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))",
          "weight.amax(1, keepdim=True)",
          "scales of 8 bit from the largest weight alone", INT8),
    Fault(f"{MODEL}/int8.py", "scale = (reach.float()", "scale = (reach.amax().expand_as(reach).float()",
          "one scale for all rows", INT8),
    Fault(f"{MODEL}/int8.py", "(part / by).round_()", "(part / by)", "8 bit cut, not rounded", INT8),
    Fault(f"{MODEL}/int8.py", ".clamp_(min=LEAST_SCALE)", "", "a row of zeros divided by zero", INT8),
    Fault(f"{MODEL}/int8.py", "weight.to(dtype).mul_(scale)", "weight.to(dtype).mul_(scale.to(dtype))",
          "products in 8 bit rounded twice", INT8),
    Fault(f"{MODEL}/int8.py", "return F.linear(inputs, expand(",
          "inputs = inputs / inputs.abs().amax() * 127\n        return F.linear(inputs, expand(",
          "activations scaled by the largest of all tokens", INT8),
    Fault(f"{MODEL}/attention.py", "total = total + softplus(more)", "total = logsumexp",
          "pieces weighed against the last alone", ATTENTION),
    Fault(f"{MODEL}/attention.py", "out.float().lerp", "out.lerp", "pieces merged in 16 bit", ATTENTION),
    Fault(f"{MODEL}/cache.py", "return start - after % GROUP", "return start",
          "a group's slots leave one by one", CACHES),
    Fault(f"{MODEL}/cache.py", "recent[..., :kept, :] = recent[..., leaving : leaving + kept, :].clone()", "pass",
          "what settled after a group is lost", CACHES),
    Fault(f"{MODEL}/cache.py", "x.abs().amax(-1, keepdim=True)", "x.abs().amax()", "one scale for all rows", CACHES),
    Fault(f"{MODEL}/cache.py", "range(0, stop, PIECE)", "range(0, PIECE, PIECE)", "the first piece alone", CACHES),
    Fault(f"{MODEL}/cache.py", "(here + settled, 0)", "(here, 0)", "settled slots aren't counted", CACHES),
]  # fmt: skip

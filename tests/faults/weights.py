"""Faults in weights: tensor files, checkpoints of flows, text encoders and VAEs."""

from __future__ import annotations

from . import Fault

WEIGHTS, PARTS = "starflow_core/weights", "starflow_core/parts.py"
SHARES = "tests/core/parallel/test_shares.py"
FILES, FLOW, TEXT, VAE, INT8, LORA = (
    f"tests/core/weights/test_{name}.py" for name in ("tensorfiles", "flow", "text", "vae", "int8", "lora")
)


def in_files(old: str, new: str, what: str, tests: str = FILES) -> Fault:
    return Fault(f"{WEIGHTS}/tensorfiles.py", old, new, what, tests)


def in_lora(old: str, new: str, what: str) -> Fault:
    return Fault(f"{WEIGHTS}/lora.py", old, new, what, LORA)


def in_flow(old: str, new: str, what: str) -> Fault:
    return Fault(f"{WEIGHTS}/flow.py", old, new, what, FLOW)


def in_text(old: str, new: str, what: str) -> Fault:
    return Fault(f"{WEIGHTS}/text.py", old, new, what, TEXT)


def in_int8(old: str, new: str, what: str) -> Fault:
    return Fault(f"{WEIGHTS}/int8.py", old, new, what, INT8)


def in_vae(old: str, new: str, what: str, file: str = "vae") -> Fault:
    return Fault(f"{WEIGHTS}/{file}.py", old, new, what, VAE)


FAULTS = [
    in_flow('return "damaged file"', "return None", "a truncated file vanishes from lists"),
    in_files('name.startswith("module.")', "False", "the prefix of a parallel wrapper is kept"),
    in_files("if (shards := shards_of(path)) > 1:", "if shards := 0:", "one shard is taken for a checkpoint"),
    in_files("Path(name).name != name", "False", "an index may name files outside its folder"),
    in_files("if path.stat().st_size != size:", "if False:", "a file cut while it is read isn't noticed"),
    Fault(f"{WEIGHTS}/pickles.py", 'raise Refused(f"reading it would run {module[:60]}.{name[:60]}")',
          "return super().find_class(module, name)", "a pickle may name any function", FILES),
    Fault(f"{WEIGHTS}/pickles.py", "if count < 0 or count * dtype.itemsize > record.size:", "if False:",
          "a pickle's storages are believed", FILES),
    Fault(f"{WEIGHTS}/pickles.py", "if offset + _extent(shape, stride) > room or math.prod(shape) > room:", "if False:",
          "a pickle's tensors may reach beyond the file", FILES),
    Fault(f"{WEIGHTS}/pickles.py", "if entry.compress_type != zipfile.ZIP_STORED:", "if False:",
          "a compressed archive is inflated", FILES),
    in_files('text += b" " * (-len(text) % 8)', "pass", "the header isn't aligned", f"{FILES} {FLOW}"),
    Fault(PARTS, "    finally:\n        remove(part)", "    finally:\n        pass",
          "a failed write leaves its part behind", f"{FILES} {FLOW} tests/core/test_parts.py"),
    Fault(f"{WEIGHTS}/pickles.py", "if record.size > LARGEST_PICKLE:", "if False:",
          "a list of any length is read", FILES),
    Fault(f"{WEIGHTS}/flow.py", '"damaged file" if shards_of(Path(path)) == 1 else None', '"damaged file"',
          "each shard is listed as a damaged file", FLOW),
    in_files("if not math.isfinite(reach):", "if False:", "NaN is called an overflow", FLOW),
    in_files("if not torch.tensor(reach, dtype=tensor.dtype).to(dtype).isfinite():", "if False:",
             "overflow in fp16 is written", FLOW),
    in_files("digest.update(chunk)\n                done += len(chunk)", "done += len(chunk)",
             "the hash of nothing", FLOW),
    in_files("    if free < needed:", "    if free < 0:", "too little room is found out half way", FLOW),
    in_files("target.samefile(file)", "False", "a conversion may overwrite its source", FLOW),
    in_flow("sizes[checkpoint.dtypes[name]] += math.prod(checkpoint.shapes[name])",
            "sizes[checkpoint.dtypes[name]] += 1", "the type of most tensors, not of most weights"),
    in_flow("        **checkpoint.metadata,\n", "", "a conversion drops the source's metadata"),
    in_flow("    if CONFIG_KEY not in checkpoint.metadata:", "    if True:",
            "a model of somebody else's is put under Apple's licence"),
    in_flow('metadata.setdefault("license"', 'metadata.setdefault("licence"', "the licence goes under another key"),
    in_flow('("latent", "noise_std", "defaults", "tasks")', '("latent", "defaults", "tasks")',
            "the reference's arguments get the wrong noise"),
    in_flow("            _check_structure(checkpoint, config, where)\n", "",
            "a configuration may contradict its tensors"),
    in_flow("with torch.inference_mode(False), torch.no_grad():\n        flow", "with torch.no_grad():\n        flow",
            "weights are inference tensors"),
    in_flow("Flow(config, operations, dtype=dtype", "Flow(config, dtype=dtype", "the host's layers aren't used"),
    in_flow("progress(Progress(phase, done, total))", "progress(Progress(phase, total, total))",
            "every tensor is reported as the last"),
    in_text("return dtype == torch.float16 and name", "return False and name",
            "T5's wo is left in fp16"),
    in_text('if not name.startswith(("decoder.", "lm_head."))', 'if not name.startswith("decoder.")',
            "the head of a full T5 is no surprise"),
    in_text("EMBEDDING if name == EMBEDDING_ALIAS else name: tensor", "name: tensor",
            "the embedding's other name isn't known"),
    in_text('GATED if FIRST_BLOCK + "1.DenseReluDense.wi_0.weight" in shapes else "relu"', "GATED",
            "every T5 is gated"),
    in_text("if not 0 <= spare <= MOST_SPARE_ROWS:", "if spare < 0:", "another model's smaller tokenizer is taken"),
    in_vae("{last - int(match[2])}", "{int(match[2])}", "the decoder's blocks in latent diffusion's order",
           "vae_names"),
    in_vae("result[name] = tensor.flatten() if attention else tensor", "result[name] = tensor",
           "attention as 1 x 1 convolutions", "vae_names"),
    in_vae('(r"^conv1\\.", "quant_conv."),\n    (r"^conv2\\.", "post_quant_conv."),',
           '(r"^conv2\\.", "quant_conv."),\n    (r"^conv1\\.", "post_quant_conv."),',
           "the two quantisation layers are swapped", "vae_names"),
    in_vae("dtype or torch.float32, device", "dtype, device", "a VAE keeps the file's type"),
    in_vae('"use_quant_conv": "quant_conv.weight" in tensors', '"use_quant_conv": True',
           "every image VAE has quantisation layers"),
    in_vae("if not torch.isfinite(state[name]).all():", "if False:", "NaN in a VAE's weights"),
    in_int8("if not (scales.isfinite() & (scales > 0)).all():", "if not (scales > 0).all():",
            "infinite scales of 8 bit"),
    in_int8("if not (scales.isfinite() & (scales > 0)).all():", "if not scales.isfinite().all():",
            "negative scales of 8 bit"),
    in_int8("elif scale.dtype != torch.float32 or scale.shape != (weight.shape[0], 1):", "elif False:",
            "scales of any shape"),
    in_int8("    if found != FORMAT:", "    if False:", "layers of any format taken for 8 bit"),
    in_int8('VARIANTS = ("convrot", "params")', 'VARIANTS = ("params",)', "rotated weights taken for plain ones"),
    in_int8("stored.int8() if stored.int8 else quantise", "quantise", "8 bit is quantised once more"),
    in_int8('"full_precision_matrix_mult": True', '"full_precision_matrix_mult": False',
            "files let activations be rounded"),
    in_int8(".encode().ljust(72)", ".encode()", "the tensors after a mark aren't aligned"),
    in_int8("if not name.endswith(MARK))", ")", "marks are counted as memory"),
    Fault(f"{WEIGHTS}/flow.py", "        if not checkpoint.tensors[name].int8:\n", "        if True:\n",
          "the type of an 8-bit file is int8", INT8),
    Fault(f"{WEIGHTS}/flow.py", "checkpoint = int8.joined(checkpoint, QUANTISED)", "pass",
          "files in 8 bit aren't known", INT8),
    Fault(f"{WEIGHTS}/flow.py", "(attention\\.(qkv|proj)|mlp\\.main\\.[02])", "(attention\\.qkv|mlp\\.main\\.[02])",
          "a layer stays in 16 bit", INT8),
    in_lora("for key in (flow.ORIGIN_HASH, flow.SOURCE_HASH):", "for key in (flow.SOURCE_HASH,):",
            "a LoRA doesn't know its base converted twice"),
    in_lora("k not in (*flow.SOURCE_KEYS, flow.ORIGIN_HASH)", "k != flow.CONFIG_KEY",
            "a merged model is taken for the LoRA's base"),
    in_lora("    if version not in _hashes:\n        _hashes[version]", "    if True:\n        _hashes[version]",
            "a LoRA's base is hashed again and again"),
    in_lora("values[ALPHA].item() if ALPHA in values else len(values[DOWN])",
            "values[ALPHA].item() if ALPHA in values else 1.0", "a LoRA without alpha counts too little"),
    in_lora("found != shapes[layer]", "found[0] != shapes[layer][0]", "a LoRA's inputs aren't compared"),
    in_lora("    if flow.in_int8(checkpoint):\n", "    if False:\n", "a LoRA is merged into 8 bit"),
    in_lora("not name.startswith(flow.DENOISER)", "True", "a LoRA may have layers of the denoiser"),
    in_lora("        if known is None:\n", "        if False:\n", "a model is hashed for a LoRA that names none"),
    in_text("and not _overflows(name, dtype)\n", "\n", "T5's wo in 8 bit under fp16"),
    in_text("return others + int8.weight_bytes(", "return others + 0 * int8.weight_bytes(",
            "a text encoder's 8-bit weights aren't counted"),
    Fault(f"{WEIGHTS}/shares.py", "torch.zeros_like(tensor) if team.share else tensor", "tensor",
          "every process adds the bias", SHARES),
    Fault(f"{WEIGHTS}/shares.py", "        up = torch.cat([up[rows] for rows in team.ranges(len(up), axis[1])])",
          "        up = up[: len(up) // team.mesh.tensor]", "every process has the first share of an adapter", SHARES),
    Fault(f"{WEIGHTS}/flow.py", "own_columns(values, name, config, team).to(home), scale.to(home)",
          "*(part.to(home) for part in int8.quantise(own_columns(int8.expand(values, scale, torch.float32), name, "
          "config, team)))", "columns in 8 bit are rounded by themselves", SHARES),
    Fault(f"{WEIGHTS}/tensorfiles.py", "part = self.part or self.read().__getitem__", "part = self.read().__getitem__",
          "all rows are read for some", SHARES),
    Fault(f"{WEIGHTS}/flow.py", '.type != "meta"]', '.type != "lazy"]', "parts that are nowhere are read", SHARES),
]  # fmt: skip

"""Sockets of this pack, for values that the host has no type for."""

from comfy_api.latest import io

CATEGORY = "STARFlow"

ModelType = io.Custom("STARFLOW_MODEL")  # a model patcher of the host around a Flow
TextEncoderType = io.Custom("STARFLOW_TEXT_ENCODER")  # loaders.LoadedText
ContextType = io.Custom("STARFLOW_CONTEXT")  # starflow_core.jobs.context.Context
NoiseType = io.Custom("STARFLOW_NOISE")  # starflow_core.jobs.noises.Noise
OptionsType = io.Custom("STARFLOW_OPTIONS")  # options.Options
SolverType = io.Custom("STARFLOW_SOLVER")  # starflow_core.solve.solvers.SolverSettings

# Words that find the nodes in the page's search, on hosts that look for more than names.
WORDS = ["normalizing flow", "normalising flow", "autoregressive flow", "Apple STARFlow", "STARFlow-V"]
SEARCH = {"search_aliases": WORDS} if "search_aliases" in io.Schema.__dataclass_fields__ else {}

KEY = "starflow"  # where latents and conditionings keep what this pack knows of them
PROMPT = "starflow_prompt"  # where a conditioning keeps its prompt
LATER = "starflow_later"  # and the prompts that follow it: (seconds, embeddings (1, L, D)) of each

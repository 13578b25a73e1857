"""Sockets of this pack, for values that the host has no type for."""

from comfy_api.latest import io

CATEGORY = "STARFlow"

Model = io.Custom("STARFLOW_MODEL")  # a model patcher of the host around a Flow
TextEncoder = io.Custom("STARFLOW_TEXT_ENCODER")  # loaders.LoadedText
Context = io.Custom("STARFLOW_CONTEXT")  # starflow_core.context.Context
Solver = io.Custom("STARFLOW_SOLVER")  # starflow_core.solvers.SolverSettings

"""The demo model's files."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent


DEMO = "bundled demo"  # the demo's name in every list


FLOW_FILE, TEXT_FILE, VAE_FILE = "flow.safetensors", "text.safetensors", "vae.safetensors"

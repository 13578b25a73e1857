"""Mutated input, endless and seeded: `python -m tests.fuzz`, see there."""

"""Training. `loop`, `optimiser` and `objectives` serve any model; `demo` makes the bundled one with them."""

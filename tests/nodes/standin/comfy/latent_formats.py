"""Formats that have factors for a rough picture; the numbers are made up, the shapes are the host's."""


class SD15:
    def __init__(self):
        self.latent_rgb_factors = [[0.3, 0.2, 0.1], [-0.1, 0.4, 0.2], [0.2, -0.3, 0.1], [0.1, 0.1, -0.5]]


class Wan22:
    def __init__(self):
        self.latent_rgb_factors = [[(c * step % 11 - 5) / 50 for step in (2, 3, 5)] for c in range(48)]
        self.latent_rgb_factors_bias = [0.05, -0.1, -0.15]

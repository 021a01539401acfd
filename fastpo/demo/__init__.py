"""The embedded default: handwritten digits, a tiny SDXL base, simulated annotators, a scorer."""

"""Where preference pairs come from: a model's own images with scores, ranked lists, likes."""

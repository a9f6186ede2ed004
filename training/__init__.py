"""Training: configuration, data, loop, checkpoints, log. Knows neither the zoo nor the backbones."""

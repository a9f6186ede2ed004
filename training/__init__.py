"""Training: configuration, data, runs, checkpoints, reports. Knows neither the zoo nor the backbones."""

"""Training: state, loss, optimiser, step, loop, checkpoints, telemetry."""

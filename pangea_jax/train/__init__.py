"""Everything that knows of optimisers: state, loss, step, checkpoints, telemetry."""

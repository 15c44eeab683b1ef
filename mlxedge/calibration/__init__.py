"""Statistics of what flows through a model, so that encoders know which weights matter."""

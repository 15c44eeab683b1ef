"""What runs a model: mlxedge's own forward pass ("numpy"), or mlx-lm ("mlx")."""

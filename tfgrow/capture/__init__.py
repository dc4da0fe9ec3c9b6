"""What flows through a model: data, activations, gradients and curvature columns."""

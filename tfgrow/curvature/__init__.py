"""What a change costs: the loss at the logits, its curvature, and the quadratics in weights."""

"""What is there: a model's graph, its sites, and conversion to growable layers and back."""

"""What could change: one morphism per file, with its formula and its paper."""

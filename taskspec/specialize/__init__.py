"""Task gradients to one update: collectives, sensitivities, methods."""

"""The training step, its checkpoint and the loop of one worker."""

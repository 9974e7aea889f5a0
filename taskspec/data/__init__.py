"""Records to batches: KILT parsing, passages, the generated world, the plan and its stream."""

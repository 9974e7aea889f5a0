"""Text to embeddings: prompts, the encoder, the contrastive loss."""

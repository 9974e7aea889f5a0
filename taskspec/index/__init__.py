"""Passages to FAISS shards."""

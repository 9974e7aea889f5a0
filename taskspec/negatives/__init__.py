"""Lexical and mined negatives."""

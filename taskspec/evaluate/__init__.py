"""Metrics, evaluation runs and the report."""

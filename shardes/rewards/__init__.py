"""Scoring of responses in worker processes."""

"""Reads preference pairs and a policy or base model; writes a reward model and its diagnostics (report.json)."""

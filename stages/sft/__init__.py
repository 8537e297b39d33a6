"""Reads demonstrations and a base model or policy; writes a policy."""

"""Reads policies, reward models and prompts none of them was trained on; writes report.json and samples.jsonl."""

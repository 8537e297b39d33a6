"""Reads prompts and policies, or pairs of responses; writes preferences.jsonl, quarantine.jsonl and report.json."""

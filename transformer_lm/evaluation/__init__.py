"""The tasks of lm-evaluation-harness."""

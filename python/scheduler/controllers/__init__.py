"""Who decides how prefill and decode share the chip, and in what order prompts go: one rule a file."""

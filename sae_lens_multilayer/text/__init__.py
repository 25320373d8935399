"""From a dataset to prompts: reading, tokenising, choosing which tokens count."""

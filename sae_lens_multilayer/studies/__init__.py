"""Studies: questions answered by several runs, each with its page."""

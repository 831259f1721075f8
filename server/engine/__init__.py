"""The loop that turns requests into tokens: schedule, run, commit."""

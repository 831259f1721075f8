"""Which tokens run next and where their keys and values live; plain Python, no torch."""

"""Load on OpenAI-compatible servers, ours and others: locust users, and servers compared under equal work.

Speaks HTTP and imports nothing of the server, so that it runs where only a load generator is installed.
"""

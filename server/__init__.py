"""HTTP server: OpenAI-compatible API over a continuous-batching engine."""

"""HTTP edge: request models, routes and streaming; no tensors here."""

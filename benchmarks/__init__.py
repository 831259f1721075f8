"""Programs that measure: never imported by the product, never tests."""

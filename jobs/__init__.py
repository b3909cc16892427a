"""The jobs: one module each, called with the composed configuration."""

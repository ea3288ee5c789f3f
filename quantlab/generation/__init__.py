"""Text from models: engines, sampling, the generator."""

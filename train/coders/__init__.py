"""The coders: maths on tensors. Imports neither store nor training loop."""

"""`bsc browse --live`: latents on a text that is typed, and what the model makes of an edit."""

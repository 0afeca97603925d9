"""`bsc browse`: every latent of every coder as a folder of static pages."""
